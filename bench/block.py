"""Your own block in the benchmark: ``python -m bench --block package.module:factory --shape 8,64,32,32``.

The factory is called once for each block of a chain. Four chains of the blocks are compared: wrapped one by one, under
plain autograd, with a checkpoint for each block, and as a ``ReversibleSequential``. The cases belong to the series
"depth", so tables, figures and the page are those of the project's own chains.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from bench.cases import Case, Checkpointed, Step, step_on
from memcnn import InvertibleModuleWrapper, ReversibleSequential
from memcnn.cli import Misuse
from memcnn.testing.laws.twin import plain_twin
from memcnn.testing.targets import load

DEPTHS = (1, 4, 8, 16)
WANTED = "package.module:factory or path/to/file.py:factory"


SUBJECTS: dict[str, Callable[[Sequence[nn.Module]], nn.Module]] = {
    "plain": lambda blocks: nn.Sequential(*map(plain_twin, blocks)),
    "checkpoint": lambda blocks: Checkpointed(*map(plain_twin, blocks)),
    "wrapped": lambda blocks: nn.Sequential(*blocks),
    "reversible": lambda blocks: ReversibleSequential(*blocks),
}
"""Functions that build a chain from a user's wrapped blocks."""


@dataclass(frozen=True)
class Block(Case):
    """A chain of ``depth`` blocks of a user.

    Attributes:
        series: name of the case's series.
        subject: a key of ``SUBJECTS``.
        depth: number of blocks.
        target: the factory, as the command line names it.
        shape: the input's shape, the batch first.
        mode: a key of ``bench.modes.MODES``.
    """

    series: str
    subject: str
    depth: int
    target: str
    shape: tuple[int, ...]
    mode: str = "eager"

    @property
    def group(self) -> str:
        """The depth and shape that the subjects of one comparison share."""
        return f"block-depth{self.depth}-{'x'.join(map(str, self.shape))}"

    cycle = group

    def info(self) -> dict:
        """Return the fields that identify the case in a file of results."""
        return {**super().info(), "batch": self.shape[0], "shape": " x ".join(map(str, self.shape))}

    def smallest(self) -> "Block":
        """Return the case itself: the batch of a user's block may be fixed."""
        return self

    def model(self, device: str | torch.device) -> nn.Module:
        """Return the chain, with weights from a fixed seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            blocks = [make_block(self.target) for _ in range(self.depth)]
        return SUBJECTS[self.subject](blocks).to(device).train()

    def step(self, model: nn.Module, device: str | torch.device, autocast: Callable = nullcontext) -> Step:
        """Return a forward and backward pass with a fixed input and output gradient; the input gets a gradient, too."""
        generator = torch.Generator().manual_seed(1)
        x, output_gradient = (torch.randn(self.shape, generator=generator).to(device) for _ in range(2))
        return step_on(x, output_gradient, model, autocast)


def cases(target: str, shape: tuple[int, ...], depths: Sequence[int]) -> list[Block]:
    """Return the cases of a block: every subject that the block supports, at every depth."""
    subjects = dict(SUBJECTS)
    try:
        ReversibleSequential(make_block(target))
    except TypeError:  # it contains wrapped modules, but has no inverse of its own
        del subjects["reversible"]
    return [Block("depth", subject, depth, target, shape) for depth in sorted(set(depths)) for subject in subjects]


def check(target: str, shape: tuple[int, ...], device: torch.device) -> None:
    """Run one step of one block, before anything is measured.

    Raises:
        Misuse: the block cannot be made, or cannot be chained on an input of this shape.
    """
    case = Block("depth", "wrapped", 1, target, shape)
    make_block(target)  # first, so that no error of the factory is blamed on the shape
    try:
        model = case.model(device)
        step = case.step(model, device)
        with torch.no_grad():
            y = model(step.batch[0])
    except Misuse:
        raise
    except Exception as error:  # a user's module may raise anything
        raise Misuse(
            f"{target} on an input of shape {shape}: {_first_line(error)}; wanted a block that takes one such tensor: "
            "see --shape"
        ) from error
    if not isinstance(y, Tensor) or y.shape != torch.Size(shape):
        got = f"a tensor of shape {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        raise Misuse(
            f"{target} turns an input of shape {shape} into {got}; wanted an output of the input's shape, so that "
            "blocks can be chained"
        )
    try:
        step.run()
    except Exception as error:
        raise Misuse(
            f"{target}: the backward pass of the wrapped block raised {_first_line(error)}; see what "
            f"python -m memcnn.verify {target} --shape {','.join(map(str, shape))} reports"
        ) from error


def make_block(target: str) -> nn.Module:
    """Return a new block, wrapped in ``InvertibleModuleWrapper`` unless it contains one.

    Raises:
        Misuse: the target does not make an invertible module.
    """
    try:
        block = factory(target)()
    except Misuse:
        raise
    except Exception as error:
        raise Misuse(f"{target}() raised {_first_line(error)}; wanted a function without arguments") from error
    if not isinstance(block, nn.Module):
        raise Misuse(f"{target}() returned a {type(block).__name__}; wanted an nn.Module with forward and inverse")
    if any(isinstance(part, InvertibleModuleWrapper) for part in block.modules()):
        return block
    if not callable(getattr(block, "inverse", None)):
        raise Misuse(
            f"{target}() returned a {type(block).__name__} without inverse; wanted a module with forward and inverse, "
            "such as memcnn.AdditiveCoupling(F)"
        )
    return InvertibleModuleWrapper(block)


@lru_cache
def factory(target: str) -> Callable[[], nn.Module]:
    """Import and return the function or class that ``package.module:name`` or ``path.py:name`` names.

    Raises:
        Misuse: there is no such function.
    """
    try:
        found = load(target)
    except Misuse as error:
        raise Misuse(f"--block: {str(error).removeprefix('target: ')}") from error
    if isinstance(found, nn.Module):
        raise Misuse(f"--block {target}: got a {type(found).__name__}, wanted a function or class that makes a block")
    return found


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
