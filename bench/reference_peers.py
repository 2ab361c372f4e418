"""The reference networks beside packages that have the same network: same work, time, memory, correctness.

    python -m bench.reference_peers FOLDER               all pairs; pip installed the peers into FOLDER with --target
    python -m bench.reference_peers FOLDER --only glow   some of them

A pair shares its residual functions, or, for flows, the form of their subnetworks. What differs is the engine. Each row
has the CPU time of a step relative to plain autograd on this project's network (median and quartiles of rounds in which
all contenders of a pair take turns), the bytes of tensors that a step adds to parameters and gradients at 4 and at 16
blocks, and the worst error in float32: of gradients against plain autograd in float64, or of an input that comes back
through the inverse. A contender that fails is named with its reason, and the others stay. Prints Markdown.

    pip install --target FOLDER --no-deps momentumnet reformer-pytorch local-attention einops \\
        axial-positional-embedding product-key-memory colt5-attention hyper-connections iunets normflows FrEIA
"""

import copy
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor, nn

from bench.reference import residual_function
from bench.small_tensors import spread
from memcnn import AdditiveCoupling, ReversibleSequential, cli
from memcnn.memory import measure_step_memory, tensor_peak_bytes
from memcnn.models.attention import Attention, FeedForward
from memcnn.models.glow import Glow
from memcnn.models.momentum import MomentumNet
from memcnn.models.reversible_unet import InvertibleUNet
from memcnn.testing.tolerances import relative_error

GAMMA = 0.97
DEPTHS = (4, 16)


@dataclass(frozen=True)
class Contender:
    """One way to run a network.

    Attributes:
        make: makes the network of a depth; two contenders with the same ``weights`` hold the same values.
        loss: returns the scalar to differentiate.
        inverse: returns the input for the network and the result of its forward pass; None: gradients are compared.
    """

    make: Callable[[int], nn.Module]
    loss: Callable[[nn.Module, Tensor], Tensor] = lambda module, x: module(x).square().mean()
    inverse: Callable[[nn.Module, Tensor], Tensor] | None = None


def stored(make: Callable[[int], nn.Module]) -> Callable[[int], nn.Module]:
    """Return a maker of the same network with all activations stored."""

    def made(depth: int) -> nn.Module:
        module = make(depth)
        for part in module.modules():
            if hasattr(part, "disable"):
                part.disable = True
        return module

    return made


def momentum() -> tuple[dict[str, Contender], Tensor]:
    """Momentum networks of the same residual functions, gamma 0.97."""
    import momentumnet

    def functions(depth: int) -> list[nn.Module]:
        return [residual_function(16) for _ in range(depth)]

    def ours(depth: int) -> nn.Module:
        return MomentumNet(*functions(depth), gamma=GAMMA)

    def unrounded(depth: int) -> nn.Module:
        return MomentumNet(*functions(depth), gamma=GAMMA, exact=False)

    def peer(depth: int) -> nn.Module:
        return momentumnet.MomentumNet(functions(depth), gamma=GAMMA, use_backprop=False)

    def peer_plain(depth: int) -> nn.Module:
        return momentumnet.MomentumNet(functions(depth), gamma=GAMMA, use_backprop=True)

    contenders = {
        "plain autograd": Contender(peer_plain),
        "MomentumNet": Contender(ours),
        "MomentumNet, exact=False": Contender(unrounded),
        "momentumnet 0.10": Contender(peer),
    }
    return contenders, torch.randn(8, 16, 16, 16)


def attention() -> tuple[dict[str, Contender], Tensor]:
    """Chains of the same attention and feed-forward branches, as in a Reformer."""
    from reformer_pytorch.reversible import ReversibleSequence

    def branches(depth: int) -> list[tuple[nn.Module, nn.Module]]:
        return [(Attention(64, 4, causal=True), FeedForward(64)) for _ in range(depth)]

    def ours(depth: int) -> nn.Module:
        return ReversibleSequential(*(AdditiveCoupling(f, g, split_dim=-1) for f, g in branches(depth)))

    def peer(depth: int) -> nn.Module:
        return ReversibleSequence(nn.ModuleList(nn.ModuleList(pair) for pair in branches(depth)))

    contenders = {
        "plain autograd": Contender(stored(ours)),
        "ReversibleSequential": Contender(ours),
        "reformer-pytorch 1.4.4": Contender(peer),
    }
    return contenders, torch.randn(8, 64, 128)


def unet() -> tuple[dict[str, Contender], Tensor]:
    """Invertible U-Nets of two resolutions with the same couplings; resampling is each package's own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SyntaxWarning of the package
        import iunets

    def coupling(channels: int, **_: object) -> nn.Module:
        def branch() -> nn.Module:
            conv = nn.Conv2d(channels // 2, channels // 2, 3, padding=1)
            return nn.Sequential(nn.GroupNorm(channels // 4, channels // 2), nn.LeakyReLU(), conv)

        return AdditiveCoupling(branch(), branch())

    def ours(depth: int) -> nn.Module:
        return InvertibleUNet(8, 2, depth)

    def peer(depth: int, **options: object) -> nn.Module:
        return iunets.iUNet(8, (depth, depth // 2), 2, create_module_fn=coupling, verbose=0, **options)

    def inverse(module: nn.Module, x: Tensor) -> Tensor:
        return module.inverse(module(x))

    contenders = {
        "plain autograd": Contender(stored(ours), inverse=inverse),
        "InvertibleUNet": Contender(ours, inverse=inverse),
        "iunets 0.1": Contender(peer, inverse=inverse),
    }
    return contenders, torch.randn(8, 8, 16, 16)


class Steps(nn.Module):
    """A chain of a peer's flow layers.

    Args:
        layers: the layers.
        run: ``run(layer, x, reverse)`` returns the result and its log-determinant.
    """

    def __init__(self, layers: Sequence[nn.Module], run: Callable):
        super().__init__()
        self.layers, self.run = nn.ModuleList(layers), run

    def forward_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        total = x.new_zeros(len(x))
        for layer in self.layers:
            x, log_det = self.run(layer, x, False)
            total = total + log_det
        return x, total

    def inverse(self, z: Tensor) -> Tensor:
        for layer in reversed(self.layers):
            z, _ = self.run(layer, z, True)
        return z


def subnet(channels_in: int, channels_out: int, hidden: int = 32) -> nn.Module:
    """Return the network within a coupling of Glow: conv3x3, ReLU, conv1x1, ReLU, conv3x3."""
    return nn.Sequential(
        nn.Conv2d(channels_in, hidden, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(hidden, hidden, 1),
        nn.ReLU(),
        nn.Conv2d(hidden, channels_out, 3, padding=1),
    )


def glow() -> tuple[dict[str, Contender], Tensor]:
    """One scale of Glow on 12 x 8 x 8; a step has two coupling layers with hidden layers of 32."""
    import FrEIA.modules as freia
    import normflows

    def ours(depth: int) -> nn.Module:
        return Glow((3, 16, 16), 1, depth, 32)

    def normflows_chain(depth: int) -> nn.Module:
        layers = [normflows.flows.GlowBlock(12, 32) for _ in range(2 * depth)]  # each has one coupling layer
        return Steps(layers, lambda layer, x, reverse: layer.inverse(x) if reverse else layer(x))

    def freia_chain(depth: int) -> nn.Module:
        def run(layer: nn.Module, x: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
            (y,), log_det = layer((x,), rev=reverse)
            return y, log_det

        shape = [(12, 8, 8)]
        layers: list[nn.Module] = []
        for _ in range(depth):
            layers += [freia.ActNorm(shape, init_data=None), freia.PermuteRandom(shape)]
            layers.append(freia.GLOWCouplingBlock(shape, subnet_constructor=subnet))
        return Steps(layers, run)

    def loss(module: nn.Module, x: Tensor) -> Tensor:
        z, log_det = module.forward_log_det(x)
        return (z.square().flatten(1).sum(1) / 2 - log_det).mean()

    def inverse(module: nn.Module, x: Tensor) -> Tensor:
        return module.inverse(module.forward_log_det(x)[0])

    contenders = {
        "plain autograd": Contender(stored(ours), loss, inverse),
        "Glow": Contender(ours, loss, inverse),
        "normflows 1.7.3": Contender(normflows_chain, loss, inverse),
        "FrEIA 0.2": Contender(freia_chain, loss, inverse),
    }
    return contenders, torch.randn(8, 3, 16, 16)


PAIRS = {"momentum": momentum, "attention": attention, "unet": unet, "glow": glow}
INPUTS: dict[tuple[str, str], Callable[[Tensor], Tensor]] = {
    ("glow", name): nn.PixelUnshuffle(2) for name in ("normflows 1.7.3", "FrEIA 0.2")
}
"""What a peer is given instead of the input, if its network begins later."""


def made(contender: Contender, depth: int, x: Tensor) -> tuple[nn.Module, Callable[[], None]]:
    """Return a network, always with the same weights, and its training step. Layers have initialised themselves."""
    torch.manual_seed(0)
    module = contender.make(depth)
    x = x.detach().clone().requires_grad_()

    def step() -> None:
        contender.loss(module, x).backward()

    step()
    return module, step


def error_of(contender: Contender, plain: Contender, x: Tensor, depth: int) -> float:
    """Return the relative error of an input that comes back, or the worst of the gradients."""
    module, _ = made(contender, depth, x)
    if contender.inverse is not None:
        with torch.no_grad():
            return relative_error(contender.inverse(module, x), x)
    reference = made(plain, depth, x)[0].double()
    gradients = []
    for one, network, given in ((contender, module, x), (plain, reference, x.double())):
        given = given.detach().clone().requires_grad_()
        network.zero_grad()
        one.loss(network, given).backward()
        gradients.append([given.grad, *(p.grad for p in network.parameters())])
    return max(relative_error(a.double(), b) for a, b in zip(*gradients, strict=True))


def compare(pair: str, rounds: int) -> tuple[list[dict], list[tuple[str, str]]]:
    """Return a row for each contender of a pair, and the names and reasons of those that failed."""
    torch.manual_seed(1)
    contenders, x = PAIRS[pair]()
    rows, steps, failures = {}, {}, []
    plain = contenders["plain autograd"]
    for name, contender in contenders.items():
        given = INPUTS.get((pair, name), copy.copy)(x)
        try:
            sizes = []
            for depth in DEPTHS:
                module, step = made(contender, depth, given)
                sizes.append(measure_step_memory(module, step, meter=tensor_peak_bytes).activation_bytes)
            steps[name] = made(contender, DEPTHS[0], given)[1]
            rows[name] = {
                "network": pair,
                "contender": name,
                "parameters": sum(p.numel() for p in module.parameters()),
                **{f"bytes at {depth}": size for depth, size in zip(DEPTHS, sizes, strict=True)},
                "worst error": error_of(contender, plain, given, DEPTHS[-1]),
                "of": "gradients" if contender.inverse is None else "round trip",
            }
        except Exception as error:  # a peer may raise anything
            failures.append((f"{pair}, {name}", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"))
            steps.pop(name, None)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds):
        for name in list(steps)[number % len(steps) :] + list(steps)[: number % len(steps)]:
            begun = time.process_time()
            steps[name]()
            seconds[name].append(time.process_time() - begun)
    times = pd.DataFrame(seconds)
    for name, row in rows.items():
        row["time / plain"] = spread(times[name] / times["plain autograd"]) if "plain autograd" in times else ""
    return list(rows.values()), failures


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows as text for readers."""
    shown = rows.copy()
    for column in ("parameters", *(f"bytes at {depth}" for depth in DEPTHS)):
        shown[column] = [f"{int(size):,}" for size in rows[column]]
    shown["worst error"] = [f"{error:.1e}" for error in rows["worst error"]]
    return shown


@cli.command("bench.reference_peers")
def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; return 0, or 1 if a contender failed."""
    parser = cli.parser_from("bench.reference_peers", __doc__, whole=True)
    parser.add_argument("folder", type=cli.input_folder, help="where pip installed the peers")
    parser.add_argument("--only", nargs="+", choices=PAIRS, default=list(PAIRS), help="default: all")
    parser.add_argument("--rounds", type=cli.count, default=9, help="rounds of steps that take turns (%(default)s)")
    parser.add_argument("--csv", type=cli.output_file, metavar="FILE", help="write the rows there, too")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    sys.path.append(str(args.folder))
    rows: list[dict] = []
    failures: list[tuple[str, str]] = []
    for pair in args.only:
        try:
            found, failed = compare(pair, args.rounds)
        except ImportError as error:
            found, failed = [], [(pair, f"{error}; install it into {args.folder}")]
        rows += found
        failures += failed
        print(f"{pair}: done", file=sys.stderr, flush=True)
    frame = pd.DataFrame(rows)
    if args.csv is not None:
        frame.to_csv(args.csv, index=False)
    if rows:
        print(table(frame).to_markdown(index=False, disable_numparse=True))
    for name, reason in failures:
        print(f"\nleft out: {name}: {reason}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
