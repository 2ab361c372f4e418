"""The one table of tolerances. An error is relative to the largest entry of what was expected (``relative_error``)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from memcnn.engine.rounding import relative_error

__all__ = ["ROUNDINGS_PER_BLOCK", "describe", "distance", "relative_error", "tolerance"]

ROUNDINGS_PER_BLOCK = 1_000
"""How many unit roundings of the dtype a block may add. A block evaluates some ten operations of a few hundred terms
each, and one inversion; correct blocks of the shipped kinds stay below a tenth of this."""


def tolerance(dtype: torch.dtype, *, depth: int = 1, condition: float = 1.0,
              autocast: torch.dtype | None = None) -> float:
    """The largest relative error allowed after ``depth`` blocks computed in ``dtype``.

    condition: by how much the computation amplifies a relative change of its input.
    autocast: the dtype of the branches. A value between two of its numbers may be rounded to the one in the forward
        pass and to the other in the recomputation, so each of a block's two branches may add one rounding, of a value
        up to twice as large as the streams, which are its sum and its difference.
    """
    eps = ROUNDINGS_PER_BLOCK * torch.finfo(dtype).eps + (4 * torch.finfo(autocast).eps if autocast else 0.0)
    return eps * depth * condition


def describe(dtype: torch.dtype, *, depth: int = 1, condition: float = 1.0) -> str:
    """Where a ``tolerance`` comes from, in words."""
    eps, name = torch.finfo(dtype).eps, str(dtype).removeprefix("torch.")
    words = f"{ROUNDINGS_PER_BLOCK} roundings of {name}, {eps:.1e}"
    words += f", x {depth} blocks" if depth > 1 else ""
    return words + (f" x condition number {condition:.3g}" if condition > 1 else "")


def distance(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The relative error of several tensors: the largest difference anywhere over the largest expected entry of all.

    Tensors of other dtypes than floating point must be equal, else it is infinite.
    """
    if not all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True) if not e.is_floating_point()):
        return float("inf")
    pairs = [(a, e) for a, e in zip(actual, expected, strict=True) if e.is_floating_point() and e.numel()]
    scale = max((e.detach().abs().max().item() for _, e in pairs), default=0.0)
    return max((relative_error(a, e, least_scale=scale) for a, e in pairs), default=0.0)
