"""Descriptions of healthy modules and of planted faults, which the checks must judge, and branches for them."""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from memcnn.testing import Report, Result, check_all

DEPTHS = 2, 4
"""Numbers of blocks that the law of memory compares. Small ones suffice: a fault adds bytes with every block."""
DEEPEST = 2
"""Deepest chain whose errors are measured; small to save time, because no verdict depends on it."""
SHAPE = 3, 4, 3, 4
LARGE = 4, 4, 24, 24
"""A shape whose activations are much larger than a generator's state."""


@dataclass(frozen=True)
class Specimen:
    """A module to be checked on a tensor of ``shape``.

    make: returns the module; random parameters come from torch's global generator, seeded with ``seed``.
    wrap, chain: as for `check_all`.
    inputs: makes the inputs from normally distributed values of ``shape``; by default these values are the input.
    stores: True if the module stores activations, on purpose or because it has no inverse; skips the law of memory.
    """

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...] = SHAPE
    wrap: bool | None = None
    chain: Callable[[int], nn.Module] | None = None
    scale: float = 1.0
    finite_differences: bool = True
    stores: bool = False
    inputs: Callable[[Tensor], tuple[Tensor, ...]] = lambda x: (x,)

    def report(self, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Report:
        generator = torch.Generator().manual_seed(seed)
        x = self.scale * torch.randn(self.shape, generator=generator, dtype=torch.float64).to(dtype)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = self.make().to(dtype)
            chain = self.chain and (lambda depth: self.chain(depth).to(dtype))
            report = check_all(
                module,
                *self.inputs(x),
                seed=seed,
                wrap=self.wrap,
                depths=DEPTHS,
                chain=chain,
                finite_differences=self.finite_differences,
                deepest=DEEPEST,
            )
        return Report(tuple(r for r in report.results if not (self.stores and r.law == "memory")))


@dataclass(frozen=True)
class Fault:
    """A specimen with a planted fault, and the report that it must get.

    law, claim: the law and the beginning of the claim that must fail.
    says: a regular expression that the explanation must match.
    also: other laws that fail as a consequence.
    """

    specimen: Specimen
    what: str
    law: str
    claim: str
    says: str
    also: frozenset[str] = frozenset()


def fault(
    name: str, what: str, make: Callable[[], nn.Module], law: str, claim: str, says: str, *also: str, **options
) -> Fault:
    """Return a fault of the module that ``make`` makes; the options are those of `Specimen`."""
    return Fault(Specimen(name, make, **options), what, law, claim, says, frozenset(also))


def named_by(of: Fault, report: Report) -> Result | None:
    """Return the failure with the fault's law and claim whose explanation matches ``says``, or None."""
    return next(
        (
            result
            for result in report.failures
            if result.law == of.law and result.claim.startswith(of.claim) and re.search(of.says, result.explanation)
        ),
        None,
    )


def branch(channels: int = 2, out_channels: int | None = None, *between: nn.Module) -> nn.Sequential:
    """Return convolution, ``between``, tanh, convolution: (N, channels, H, W) to (N, out_channels, H, W)."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1, bias=not between),
        *between,
        nn.Tanh(),
        nn.Conv2d(channels, out_channels or channels, 1),
    )


def normalised() -> nn.Sequential:
    """Return a branch with batch normalisation, without a bias before it: its gradient would be only rounding."""
    return branch(2, None, nn.BatchNorm2d(2))


def dropping() -> nn.Sequential:
    """Return a branch with dropout."""
    return branch(2, None, nn.Dropout(0.5))


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.chunk(2, 1)


def whole(x1: Tensor, x2: Tensor) -> Tensor:
    return torch.cat((x1, x2), 1)


class Own(nn.Module):
    """An additive coupling as a user writes it, with only ``forward`` and ``inverse``."""

    def __init__(self, make: Callable[[], nn.Module] = branch):
        super().__init__()
        self.F, self.G = make(), make()

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = halves(x)
        y1 = x1 + self.F(x2)
        y2 = x2 + self.G(y1)
        return whole(y1, y2)

    def inverse(self, y: Tensor) -> Tensor:
        y1, y2 = halves(y)
        x2 = y2 - self.G(y1)
        x1 = y1 - self.F(x2)
        return whole(x1, x2)
