"""Time and memory of the reference networks against their depth: stored, checkpointed and reversible activations.

    python -m bench.reference                                     bytes of all networks at depths 8, 32 and 128
    python -m bench.reference --networks irevnet vit --depths 8   some of them
    python -m bench.reference --time --depths 8                   also the time of a step, relative to plain
    python -m bench.reference --csv reports/networks/memory.csv   the data of the page docs/networks.md

The depth is the number of blocks: in each stage of a U-Net, and in the only stage or scale of other networks. Prints
Markdown. The cases of depth 8 are part of a full run of ``python -m bench``.
"""

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bench.cases import THREE, Case, Step
from bench.measure import cpu_seconds_in_turn
from bench.tables import add_csv_option
from memcnn import ReversibleSequential, cli
from memcnn.memory import measure_step_memory
from memcnn.models.glow import Glow
from memcnn.models.irevnet import IRevNet
from memcnn.models.momentum import MomentumNet
from memcnn.models.ode import ReversibleHeun
from memcnn.models.reformer import ReversibleLM
from memcnn.models.reversible_unet import InvertibleUNet, ReversibleUNet
from memcnn.models.reversible_vit import ReversibleViT

VOCABULARY = 256


class NegativeLogLikelihood(nn.Module):
    """The loss of a flow as a module: -log p(x) for each sample."""

    def __init__(self, flow: Glow):
        super().__init__()
        self.flow = flow

    def forward(self, x: Tensor) -> Tensor:
        return -self.flow.log_prob(x)


class Field(nn.Module):
    """f(t, y) of the ODE block: linear, tanh, linear, with a hidden layer of 64."""

    def __init__(self, width: int):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, 64), nn.Tanh(), nn.Linear(64, width))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.cos(t) * self.net(y)


def residual_function(width: int) -> nn.Module:
    """Return the residual function of the momentum network."""
    return nn.Sequential(
        nn.GroupNorm(4, width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1),
        nn.GroupNorm(4, width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1),
    )


def _momentum(depth: int) -> nn.Module:
    """Return a momentum network; 0.97**-128 is 49, which float32 holds on the grid of exact mode."""
    return MomentumNet(*(residual_function(16) for _ in range(depth)), gamma=0.97)


MAKERS: dict[str, tuple[Callable[[int], nn.Module], tuple[int, ...]]] = {
    "irevnet": (lambda depth: IRevNet((depth,), width=32, padding="repeat"), (3, 32, 32)),
    "irevnet-exact": (lambda depth: IRevNet((depth,), width=32), (3, 32, 32)),
    "vit": (lambda depth: ReversibleViT(depth, 64, 4), (3, 32, 32)),
    "momentum": (_momentum, (16, 16, 16)),
    "glow": (lambda depth: NegativeLogLikelihood(Glow((3, 16, 16), 1, depth, 32)), (3, 16, 16)),
    "lm": (lambda depth: ReversibleLM(VOCABULARY, depth, 64, 4, context=64), (64,)),
    "unet-3d": (lambda depth: ReversibleUNet(1, 2, (8, 16), depth, dims=3), (1, 16, 16, 16)),
    "iunet-2d": (lambda depth: InvertibleUNet(8, 2, depth), (8, 16, 16)),
    "ode": (lambda depth: ReversibleHeun(Field(2), depth), (2,)),
}
"""For each network: a function of the depth, and the shape of a sample."""


class CheckpointedBlock(nn.Module):
    """A block that stores only its input, and runs again in the backward pass."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, x, use_reentrant=False)

    def forward_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return checkpoint(self.block.forward_log_det, x, use_reentrant=False)


def as_subject(model: nn.Module, subject: str) -> nn.Module:
    """Change the model in place to store its activations ("plain") or to checkpoint every block; return the model."""
    for chain in [part for part in model.modules() if isinstance(part, ReversibleSequential)]:
        for i, wrapped in enumerate(chain):
            if subject == "plain":
                wrapped.disable = True
            elif subject == "checkpoint":
                chain[i] = CheckpointedBlock(wrapped._fn)
    return model


@dataclass(frozen=True)
class Reference(Case):
    """A training step of a reference network.

    Attributes:
        network: a key of ``MAKERS``.
        subject: "plain", "checkpoint" or "reversible".
        depth: number of blocks of a stage.
        batch: number of samples.
        series: name of the case's series.
        mode: a key of ``bench.modes.MODES``.
    """

    network: str
    subject: str
    depth: int
    batch: int = 8
    series: str = "reference"
    mode: str = "eager"

    @property
    def group(self) -> str:
        return f"{self.series}-{self.network}-depth{self.depth}-batch{self.batch}"

    cycle = group

    def model(self, device: str | torch.device) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return as_subject(MAKERS[self.network][0](self.depth), self.subject).to(device)

    def step(self, model: nn.Module, device: str | torch.device, autocast: Callable = nullcontext) -> Step:
        """Return a forward and backward pass on a fixed batch."""
        shape = (self.batch, *MAKERS[self.network][1])
        generator = torch.Generator().manual_seed(1)
        if self.network == "lm":
            x = torch.randint(VOCABULARY, shape, generator=generator).to(device)
        else:
            x = torch.randn(shape, generator=generator).to(device)

        def run() -> None:
            with autocast():
                y = model(x)
            y.square().mean().backward()

        return Step(run, (x,))


def references(*, depths: Sequence[int] = (8,), networks: Sequence[str] = tuple(MAKERS)) -> list[Reference]:
    """Return the cases of these networks and depths."""
    return [Reference(network, subject, depth) for network in networks for depth in depths for subject in THREE]


def activation_bytes(case: Reference) -> int:
    """Return the peak bytes of tensors in a training step, without parameters and gradients."""
    model = case.model("cpu")
    step = case.step(model, "cpu")
    step.run()  # initialises layers such as ActNorm
    return measure_step_memory(model, step.run).activation_bytes


def memory_row(network: str, depth: int) -> dict:
    """Return the parameters of a network of this depth, and the activation bytes of each subject."""
    cases = references(depths=[depth], networks=[network])
    parameters = sum(p.numel() for p in cases[0].model("cpu").parameters())
    sizes = {case.subject: activation_bytes(case) for case in cases}
    return {"network": network, "depth": depth, "batch": cases[0].batch, "parameters": parameters, **sizes}


def relative_times(network: str, depth: int, rounds: int = 7) -> dict[str, float]:
    """Return the CPU time of each subject relative to plain: the median of interleaved rounds."""
    steps = {}
    for subject in THREE:
        case = Reference(network, subject, depth)
        steps[subject] = case.step(case.model("cpu"), "cpu").run
        steps[subject]()
    seconds = cpu_seconds_in_turn(steps, rounds)
    return seconds.div(seconds["plain"], axis=0).median().to_dict()


@cli.command("bench.reference")
def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table of bytes, and one of time if asked for; return 0."""
    parser = cli.parser_from("bench.reference", __doc__, whole=True)
    parser.add_argument("--networks", nargs="+", choices=MAKERS, default=list(MAKERS), help="default: all")
    parser.add_argument("--depths", nargs="+", type=cli.count, default=[8, 32, 128], help="blocks (8 32 128)")
    add_csv_option(parser)
    parser.add_argument("--time", action="store_true", help="also measure time, relative to plain")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print("| network | depth | parameters | " + " | ".join(f"{subject}, bytes" for subject in THREE) + " |")
    print("| --- | --: | --: | --: | --: | --: |")
    rows = []
    for network in args.networks:
        for depth in args.depths:
            row = memory_row(network, depth)
            rows.append(row)
            sizes = " | ".join(f"{row[subject]:,}" for subject in THREE)
            print(f"| {network} | {depth} | {row['parameters']:,} | {sizes} |", flush=True)
    if args.csv is not None:
        pd.DataFrame(rows).to_csv(args.csv, index=False)
    if args.time:
        print("\n| network | depth | checkpoint, time / plain | reversible, time / plain |\n| --- | --: | --: | --: |")
        for network in args.networks:
            for depth in args.depths:
                ratios = relative_times(network, depth)
                shown = f"{ratios['checkpoint']:.2f} | {ratios['reversible']:.2f}"
                print(f"| {network} | {depth} | {shown} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
