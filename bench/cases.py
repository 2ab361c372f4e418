"""The cases of the benchmark: chains of coupling blocks, as subjects and at several sizes.

A subject is a chain with one treatment of activations: plain autograd stores them, checkpoints and reversible chains
recompute them. A block is an additive coupling. Its branches F and G are convolution, BatchNorm, ReLU, convolution,
BatchNorm on half of the channels. All subjects hold the same blocks with the same weights. ``bench.networks`` has the
training steps of whole networks, ``bench.modes`` precision, memory format, compiler and CUDA graphs.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from math import isqrt

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from memcnn import AdditiveCoupling, InvertibleModuleWrapper, ReversibleSequential

Blocks = Sequence[AdditiveCoupling]


class Checkpointed(nn.Sequential):
    """A chain that stores the input of each block, and runs the block again in the backward pass."""

    replay = True

    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=self.replay)
        return x


class CheckpointedSegments(nn.Sequential):
    """A chain with a checkpoint for each segment of sqrt(n) blocks.

    Chen et al., "Training Deep Nets with Sublinear Memory Cost", https://arxiv.org/abs/1604.06174.
    """

    replay = True

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint_sequential(self, isqrt(len(self)), x, use_reentrant=False, preserve_rng_state=self.replay)


def plain(blocks: Blocks, replay: bool) -> nn.Module:
    """Return the chain under ordinary autograd."""
    return nn.Sequential(*blocks)


def checkpointed(blocks: Blocks, replay: bool, kind: type[nn.Sequential] = Checkpointed) -> nn.Module:
    """Return the chain as a ``kind``, by default with a checkpoint for each block."""
    model = kind(*blocks)
    model.replay = replay
    return model


def checkpointed_segments(blocks: Blocks, replay: bool) -> nn.Module:
    """Return the chain with a checkpoint for each segment of sqrt(n) blocks."""
    return checkpointed(blocks, replay, CheckpointedSegments)


def wrapped(blocks: Blocks, replay: bool) -> nn.Module:
    """Return the chain as an ``nn.Sequential`` of wrapped blocks."""
    return nn.Sequential(*(InvertibleModuleWrapper(block, preserve_rng_state=replay) for block in blocks))


def reversible(blocks: Blocks, replay: bool, keep_every: int | None = None) -> nn.Module:
    """Return the chain as a ``ReversibleSequential`` that stores every ``keep_every``-th block."""
    return ReversibleSequential(*wrapped(blocks, replay), keep_every=keep_every)


SUBJECTS: dict[str, Callable[[Blocks, bool], nn.Module]] = {
    "plain": plain,
    "checkpoint": checkpointed,
    "checkpoint-sqrt": checkpointed_segments,
    "keep-every-2": lambda blocks, replay: reversible(blocks, replay, 2),  # between plain and reversible
    "keep-every-4": lambda blocks, replay: reversible(blocks, replay, 4),
    "wrapped": wrapped,
    "reversible": reversible,
}
"""Functions that build a module from blocks. The second argument asks them to replay random numbers."""

THREE = ("plain", "checkpoint", "reversible")


@dataclass(frozen=True)
class Step:
    """A training step.

    Attributes:
        run: runs the step.
        batch: the tensors that it reads, and their gradients.
        optimizer: the optimiser that updates the model, if any.
    """

    run: Callable[[], None]
    batch: Sequence[Tensor]
    optimizer: torch.optim.Optimizer | None = None


class Case:
    """A case: one subject at one size. The base of the dataclasses of cases.

    Attributes:
        group: name of the case's comparison.
        subject: name of the subject; it differs between the cases of one comparison.
    """

    group: str
    subject: str

    def __str__(self) -> str:
        return f"{self.group}-{self.subject}"

    def info(self) -> dict:
        """Return the fields that identify the case in a file of results."""
        return {"case": str(self), "comparison": self.group, **asdict(self)}

    def smallest(self) -> "Case":
        """Return the case in eager mode at batch 2, for counting evaluations."""
        return replace(self, batch=2, mode="eager")


@dataclass(frozen=True)
class Chain(Case):
    """A chain of ``depth`` blocks on a batch of shape (batch, channels, side, side).

    Attributes:
        series: name of the case's series.
        subject: a key of ``SUBJECTS``.
        depth: number of blocks.
        batch: number of samples.
        channels: number of channels; a branch has half of them.
        side: height and width.
        mode: a key of ``bench.modes.MODES``.
    """

    series: str
    subject: str
    depth: int
    batch: int
    channels: int = 64
    side: int = 32
    mode: str = "eager"

    @property
    def group(self) -> str:
        """The size and mode that the subjects of one comparison share."""
        return f"{self.series}-depth{self.depth}-{self.batch}x{self.channels}x{self.side}-{self.mode}"

    cycle = group
    """The cases of one cycle are timed in turn."""

    def model(self, device: str | torch.device) -> nn.Module:
        """Return the chain, with weights from a fixed seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            branches = [Branch(self.channels // 2) for _ in range(2 * self.depth)]
        blocks = [AdditiveCoupling(F, G) for F, G in zip(branches[::2], branches[1::2], strict=True)]
        replay = self.mode != "graph"  # a captured step cannot restore the generator
        return SUBJECTS[self.subject](blocks, replay).to(device)

    def step(self, model: nn.Module, device: str | torch.device, autocast: Callable = nullcontext) -> Step:
        """Return a forward and backward pass with a fixed input and output gradient; the input gets a gradient, too."""
        memory_format = torch.channels_last if self.mode == "channels_last" else torch.contiguous_format
        generator = torch.Generator().manual_seed(1)
        x, output_gradient = (
            torch.randn(self.batch, self.channels, self.side, self.side, generator=generator).to(
                device, memory_format=memory_format
            )
            for _ in range(2)
        )
        return step_on(x, output_gradient, model, autocast)


def step_on(x: Tensor, output_gradient: Tensor, model: nn.Module, autocast: Callable) -> Step:
    """Return a forward and backward pass of ``model`` on x, which gets a gradient, too."""
    x.requires_grad_()
    x.grad = torch.zeros_like(x)

    def run() -> None:
        with autocast():
            y = model(x)
        y.backward(output_gradient)

    return Step(run, (x, x.grad, output_gradient))


class Branch(nn.Sequential):
    """F or G. It keeps the shape (N, channels, H, W)."""

    def __init__(self, channels: int):
        super().__init__(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)  # Module.compile skips methods of torch.nn itself


def branches(model: nn.Module) -> list[nn.Module]:
    """Return F and G of every coupling, and the branches of plain residual units."""
    return [part for name, part in model.named_modules() if name.rpartition(".")[2] in ("Fm", "Gm", "branch")]


def chains(*, quick: bool, cuda: bool) -> list[Chain]:
    """Return the cases of the series depth, batch, width and tiny.

    On a GPU batches are 16 times as large, so that kernels take longer than their launch, except in the series tiny.
    """
    scale = 16 if cuda else 1
    depths = (1, 4, 8, 16) if quick else (1, 4, 8, 16, 32, 64)
    batches = (1, 16) if quick else (1, 4, 16, 64)
    widths = (16, 128) if quick else (8, 32, 128, 256)
    return [
        *(Chain("depth", subject, depth, 4 * scale) for depth in depths for subject in SUBJECTS),
        *(Chain("batch", subject, 8, batch * scale, side=16) for batch in batches for subject in THREE),
        *(Chain("width", subject, 4, 4 * scale, width, side=16) for width in widths for subject in THREE),
        *(Chain("tiny", subject, 32, 2, 4, 4) for subject in SUBJECTS),
    ]


def law(*, quick: bool) -> list[Chain]:
    """Return the cases of up to 1000 blocks on small tensors. The suite measures only their memory."""
    subjects = ("plain", "checkpoint", "checkpoint-sqrt", "reversible")
    depths = (50, 100) if quick else (64, 250, 1000)
    return [Chain("law", subject, depth, 2, 8, 8) for depth in depths for subject in subjects]
