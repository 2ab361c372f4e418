"""The relative error of a tensor."""

from torch import Tensor


def relative_error(actual: Tensor, expected: Tensor, *, least_scale: float = 0.0) -> float:
    """Return max |actual - expected| / max(max |expected|, ``least_scale``). NaN if one of them has a NaN."""
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
