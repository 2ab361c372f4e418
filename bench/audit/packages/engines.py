"""RevTorch and RevLib: additive couplings with their own engine, so that the checks do not wrap them."""

import copy

import revlib
import revtorch
import torch
from torch import Tensor, nn

from bench.audit.packages.layers import Layer, convolutional

PACKAGE = "revtorch"


class RevTorch(nn.Module):
    """A sequence of RevTorch's blocks. Its inverse returns the value that ``backward_pass`` rebuilds."""

    def __init__(self, blocks: list[revtorch.ReversibleBlock]):
        super().__init__()
        self.sequence = revtorch.ReversibleSequence(nn.ModuleList(blocks))

    def forward(self, x: Tensor) -> Tensor:
        return self.sequence(x)

    def inverse(self, y: Tensor) -> Tensor:
        y = y.detach()
        for block in reversed(copy.deepcopy(self.sequence.reversible_blocks)):
            with torch.enable_grad():
                y, _ = block.backward_pass(y, torch.zeros_like(y), False)
        return y.detach()


class RevLib(nn.Module):
    """A sequence of RevLib's modules. Its inverse calls the inverse of each ``ReversibleWrapper``."""

    def __init__(self, branches: list[nn.Module], **options):
        super().__init__()
        self.sequence = revlib.ReversibleSequential(*branches, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.sequence(x)

    def inverse(self, y: Tensor) -> Tensor:
        first, second = y.chunk(2, 1)
        for module in reversed(list(self.sequence)):
            first, second = module.wrapped_module.inverse(first, second), first
        return torch.cat([first, second], 1)


def batch_normalised(channels: int) -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1, bias=False))


def dropped(channels: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.Dropout(0.5))


IMAGE = (3, 4, 6, 6)
BRANCHES = {
    "convolutions": lambda: convolutional(2, 2),
    "BatchNorm": lambda: batch_normalised(2),
    "dropout": lambda: dropped(2),
}
LAYERS = [
    *(
        Layer(
            f"RevTorch ReversibleSequence, {name}",
            lambda branch=branch, seed=name == "dropout": RevTorch(
                [revtorch.ReversibleBlock(branch(), branch(), fix_random_seed=seed)]
            ),
            IMAGE,
        )
        for name, branch in BRANCHES.items()
    ),
    *(
        Layer(f"RevLib ReversibleSequential, {name}", lambda branch=branch: RevLib([branch(), branch()]), IMAGE)
        for name, branch in BRANCHES.items()
    ),
    *(
        Layer(
            f"RevLib ReversibleSequential({mode.name}), convolutions",
            lambda mode=mode: RevLib([convolutional(2, 2), convolutional(2, 2)], memory_mode=mode),
            IMAGE,
        )
        for mode in (revlib.MemoryModes.checkpoint, revlib.MemoryModes.autograd_graph)
    ),
]
OWN_ENGINE = True
