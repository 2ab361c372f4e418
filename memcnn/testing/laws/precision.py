"""A claim of the law of gradients: no lower precision in the backward pass than in the forward pass."""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from memcnn.testing.laws.differences import like_finite_differences_when_moved
from memcnn.testing.laws.result import Result
from memcnn.testing.laws.subject import Subject

LARGEST_ERROR = 2e-9
"""Finite differences are a hundred times more accurate than this, and float32 is ten times less."""
LOWER = torch.float32, torch.bfloat16, torch.float16


class _Precisions(TorchDispatchMode):
    """Counts the results of lower precision than float64, and the largest of them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[torch.dtype, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for x in results if isinstance(results, (tuple, list)) else (results,):
            if isinstance(x, Tensor) and x.dtype in LOWER and x.numel() > 1:
                self.found[x.dtype] = self.found.get(x.dtype, 0) + 1
        return results


def stay_in_float64(subject: Subject, claim: str) -> Result:
    """Check that backward computes nothing in a lower precision that a plain forward pass does not compute in it.

    An engine that stores or rebuilds in float32 what is of float64 loses half of the digits, which finite differences
    do not show.
    """
    plain, step = _Precisions(), _Precisions()
    with torch.no_grad(), plain:
        subject.evaluated(subject.plain() or subject.fresh(), subject.inputs)
    try:
        with step:
            subject.run(subject.trained())
    except Exception as error:
        if getattr(error, "raised_by_block", False) or isinstance(error, RuntimeError):
            return Result("gradients", claim, skipped="the training step raises an exception")
        raise
    strange = {dtype: count for dtype, count in step.found.items() if dtype not in plain.found}
    words = ", ".join(f"{count} results of {str(dtype).removeprefix('torch.')}" for dtype, count in strange.items())
    explanation = f"a training step of the block in float64 computes {words}, a forward pass without gradients none"
    total = sum(strange.values())
    if not total and plain.found:
        slopes = like_finite_differences_when_moved(subject)
        if not slopes.skipped and slopes.error > LARGEST_ERROR:
            return Result(
                "gradients",
                claim,
                slopes.error,
                LARGEST_ERROR,
                "finite differences in float64, where tensors of a lower precision are computed",
                f"in float64 the gradients are {slopes.error:.1g} off, and tensors of a lower precision are computed",
            )
    return Result("gradients", claim, total, 0, "nothing may be", explanation if total else "")
