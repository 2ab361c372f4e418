"""The one table of tolerances. An error is relative to the largest entry of what was expected (``relative_error``)."""

import torch
from torch import Tensor

ROUNDINGS_PER_BLOCK = 1_000
"""How many unit roundings of the dtype a block may add. A block evaluates some ten operations of a few hundred terms
each, and one inversion; correct blocks of the shipped kinds stay below a tenth of this."""


def tolerance(dtype: torch.dtype, *, depth: int = 1) -> float:
    """The largest relative error allowed after ``depth`` blocks computed in ``dtype``."""
    return ROUNDINGS_PER_BLOCK * torch.finfo(dtype).eps * depth


def relative_error(actual: Tensor, expected: Tensor, *, least_scale: float = 0.0) -> float:
    """max |actual - expected| / max |expected|, the divisor at least ``least_scale``; NaN if either has one."""
    if actual.shape != expected.shape:
        raise ValueError(f"cannot compare shapes {tuple(actual.shape)} and {tuple(expected.shape)}")
    if expected.numel() == 0:
        return 0.0
    actual, expected = actual.detach().double(), expected.detach().double()
    difference = (actual - expected).abs().max().item()
    if difference == 0:
        return 0.0
    scale = max(expected.abs().max().item(), least_scale)
    return difference / scale if scale else float("inf")
