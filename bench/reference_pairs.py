"""The pairs of ``bench.reference_peers``: a reference network of this project, and the same network of other packages.

The two share their residual functions or, for flows, the form of their subnetworks. They differ in the engine.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench.reference import residual_function
from memcnn import AdditiveCoupling, ReversibleSequential
from memcnn.models.attention import Attention, FeedForward
from memcnn.models.glow import Glow
from memcnn.models.momentum import MomentumNet
from memcnn.models.reversible_unet import InvertibleUNet

GAMMA = 0.97


@dataclass(frozen=True)
class Contender:
    """A network of this project or of a peer, with a loss.

    Attributes:
        make: makes the network of a depth.
        loss: returns the scalar to differentiate.
        inverse: returns inverse(forward(x)) for the network and x; None to compare gradients instead.
    """

    make: Callable[[int], nn.Module]
    loss: Callable[[nn.Module, Tensor], Tensor] = lambda module, x: module(x).square().mean()
    inverse: Callable[[nn.Module, Tensor], Tensor] | None = None


def stored(make: Callable[[int], nn.Module]) -> Callable[[int], nn.Module]:
    """Return a function that makes the same network, with all activations stored."""

    def made(depth: int) -> nn.Module:
        module = make(depth)
        for part in module.modules():
            if hasattr(part, "disable"):
                part.disable = True
        return module

    return made


def momentum() -> tuple[dict[str, Contender], Tensor]:
    """Return momentum networks with the same residual functions, gamma 0.97, and an input."""
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
    """Return chains of the same attention and feed-forward branches, as in a Reformer, and an input."""
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
    """Return invertible U-Nets of two resolutions with the same couplings but their own resampling, and an input."""
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
    """Return the branch of a coupling in Glow: conv3x3, ReLU, conv1x1, ReLU, conv3x3."""
    return nn.Sequential(
        nn.Conv2d(channels_in, hidden, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(hidden, hidden, 1),
        nn.ReLU(),
        nn.Conv2d(hidden, channels_out, 3, padding=1),
    )


def glow() -> tuple[dict[str, Contender], Tensor]:
    """Return flows like one scale of Glow, and an input. A step has two coupling layers with 32 hidden channels."""
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
"""Functions that compute the input of a peer that lacks the network's first layer, by (pair, contender)."""
