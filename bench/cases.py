"""What is compared: one chain of coupling blocks, run by plain autograd, checkpointed per block, and reversible.

A block is an additive coupling of 64 channels, 32 in either stream, whose branches F and G are convolution, BatchNorm,
ReLU, convolution, BatchNorm. All subjects hold the same blocks with the same weights.
"""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from memcnn import AdditiveCoupling, ReversibleSequential


class Checkpointed(nn.Sequential):
    """Stores the input of each block, and runs the block again in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x = checkpoint(block, x, use_reentrant=False)
        return x


SUBJECTS = {
    "plain": nn.Sequential,
    "checkpoint": Checkpointed,
    "keep-every-2": partial(ReversibleSequential, keep_every=2),  # the dial between plain and reversible
    "keep-every-4": partial(ReversibleSequential, keep_every=4),
    "reversible": ReversibleSequential,
}


@dataclass(frozen=True)
class Case:
    """A chain of `depth` blocks on a batch of (batch, channels, side, side) in float32; `repeat` tells reruns apart."""

    depth: int
    subject: str
    repeat: int = 0
    batch: int = 32
    channels: int = 64
    side: int = 32

    def __str__(self) -> str:
        return f"depth{self.depth}-{self.subject}-{self.repeat}"

    def model(self, device: str | torch.device) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            branches = [branch(self.channels // 2) for _ in range(2 * self.depth)]
        blocks = [AdditiveCoupling(F, G) for F, G in zip(branches[::2], branches[1::2], strict=True)]
        return SUBJECTS[self.subject](*blocks).to(device)

    def step(self, model: nn.Module, device: str | torch.device) -> Callable[[], None]:
        """One forward and backward pass from a fixed input, which gets a gradient too, and a fixed output gradient."""
        generator = torch.Generator().manual_seed(1)
        x, output_gradient = (
            torch.randn(self.batch, self.channels, self.side, self.side, generator=generator).to(device)
            for _ in range(2)
        )
        x.requires_grad_()
        x.grad = torch.zeros_like(x)

        def run() -> None:
            model(x).backward(output_gradient)

        return run


def branch(channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
    )


def cases(*, quick: bool, repeats: int) -> list[Case]:
    """Every depth with every subject, `repeats` times; subjects alternate, so that a drift of the machine meets all."""
    depths, batch = ((4, 8, 16), 8) if quick else ((4, 8, 16, 32, 64), 32)
    return [
        Case(depth, subject, repeat, batch=batch)
        for depth, repeat, subject in itertools.product(depths, range(repeats), SUBJECTS)
    ]


def clock() -> float:
    """Seconds, once all work on the GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
