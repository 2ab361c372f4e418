"""The sum and the difference that additive couplings compute, and the step that consists of one of them."""

from typing import NamedTuple

from torch import Tensor, nn


class AdditiveStep(NamedTuple):
    """One step of an additive coupling: ``branch``, evaluated on one half, is added to the other or subtracted.

    Attributes:
        branch: F or G.
        changed: the number of the half that changes: 0 for x1, 1 for x2.
    """

    branch: nn.Module
    changed: int


def plus(a: Tensor, h: Tensor) -> Tensor:
    """Return a + h, where h has the shape of a or can be broadcast to it."""
    return a + (h if isinstance(h, Tensor) and h.shape == a.shape else _fitting(h, a))


def minus(a: Tensor, h: Tensor) -> Tensor:
    """Return a - h, where h has the shape of a or can be broadcast to it."""
    return a - (h if isinstance(h, Tensor) and h.shape == a.shape else _fitting(h, a))


def _fitting(h: Tensor, a: Tensor) -> Tensor:
    """Return h if it can be broadcast to the shape of a, else raise a ValueError."""
    if (
        isinstance(h, Tensor)
        and h.dim() <= a.dim()
        and all(size in (1, wanted) for size, wanted in zip(reversed(h.shape), reversed(a.shape), strict=False))
    ):
        return h
    got = f"shape {tuple(h.shape)}" if isinstance(h, Tensor) else f"a {type(h).__name__}"
    raise ValueError(f"F and G of an additive coupling must keep the shape of a half, {tuple(a.shape)}: got {got}")
