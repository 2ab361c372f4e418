"""The one table of tolerances. An error is relative to the largest expected entry (``relative_error``)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from memcnn.engine.rounding import relative_error

__all__ = ["ROUNDINGS_PER_BLOCK", "describe", "distance", "relative_error", "tolerance"]

ROUNDINGS_PER_BLOCK = 1_000
"""The number of machine epsilons of the dtype (``torch.finfo(dtype).eps``) that a block may add.

A block evaluates about ten operations of a few hundred terms each, and one inversion. Correct blocks of the shipped
kinds stay below a tenth of this."""
ROUNDINGS_PER_OPERATION = 100
"""The number of machine epsilons that one operation may add: the condition number counts every operation."""


def tolerance(
    dtype: torch.dtype, *, depth: int = 1, condition: float = 0.0, autocast: torch.dtype | None = None
) -> float:
    """Return the largest relative error allowed after ``depth`` blocks computed in ``dtype``.

    Args:
        dtype: the dtype of the residual stream.
        depth: the number of blocks.
        condition: the condition number of the computation, if it was measured: the effect of a relative change of every
            operation's result (``memcnn.testing.laws.rounding``). The larger of the two limits counts.
        autocast: the dtype of the branches. A value between two of its numbers may be rounded to one of them in the
            forward pass and to the other in the recomputation. So each of a block's two branches may add one rounding,
            of a value up to twice as large as the streams.
    """
    eps, branches = torch.finfo(dtype).eps, 4 * torch.finfo(autocast).eps if autocast else 0.0
    return max((ROUNDINGS_PER_BLOCK * eps + branches) * depth, (ROUNDINGS_PER_OPERATION * eps + branches) * condition)


def describe(dtype: torch.dtype, *, depth: int = 1, condition: float = 0.0, autocast: torch.dtype | None = None) -> str:
    """Explain where a ``tolerance`` comes from."""
    eps, name = torch.finfo(dtype).eps, str(dtype).removeprefix("torch.")
    measured = tolerance(dtype, depth=depth, condition=condition, autocast=autocast) > tolerance(
        dtype, depth=depth, autocast=autocast
    )
    words = f"{ROUNDINGS_PER_OPERATION if measured else ROUNDINGS_PER_BLOCK} roundings of {name}, {eps:.1e}"
    words += f" and 4 of {str(autocast).removeprefix('torch.')}" if autocast else ""
    if measured:
        return f"{words}, x condition number {condition:.3g}"
    return words + (f", x {depth} blocks" if depth > 1 else "")


def is_emptied(x: Tensor) -> bool:
    """Return whether the storage of ``x`` was freed. Reading such a tensor would crash the process."""
    return x.layout is torch.strided and bool(x.numel()) and not x.untyped_storage().nbytes()


def distance(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the relative error of several tensors: the largest difference over the largest expected entry of all.

    It is infinite where tensors of integers or booleans differ, and where a storage was emptied.
    """
    if any(map(is_emptied, (*actual, *expected))):
        return float("inf")
    if not all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True) if not e.is_floating_point()):
        return float("inf")
    pairs = [(a, e) for a, e in zip(actual, expected, strict=True) if e.is_floating_point() and e.numel()]
    scale = max((e.detach().abs().max().item() for _, e in pairs), default=0.0)
    return max((relative_error(a, e, least_scale=scale) for a, e in pairs), default=0.0)
