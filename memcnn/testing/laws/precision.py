"""A claim of the law of gradients: no lower precision in the backward pass than in the forward pass."""

from collections.abc import Mapping

import torch
from torch import Tensor

from memcnn.testing.laws.differences import like_finite_differences_when_moved
from memcnn.testing.laws.result import Result
from memcnn.testing.laws.subject import Precisions, Subject
from memcnn.testing.laws.twin import relative_errors, worst

LARGEST_ERROR = 2e-9
"""Finite differences are a hundred times more accurate than this, and float32 is ten times less."""


STEP, LARGEST_BEND = 1e-7, 1e-10
"""A step of the inputs, and the largest second difference of smooth outputs over it, relative to the outputs."""


def stay_in_float64(subject: Subject, claim: str, finite_differences: bool = True) -> Result:
    """Check that a training step in float64 uses no lower precision that a plain forward pass does not use.

    An engine that stores or rebuilds float64 values in float32 loses half of the digits, which finite differences do
    not show. Where a forward pass computes values of a lower precision as well, finite differences decide, if they may
    be used and if the outputs are smooth.
    """
    try:
        found = subject.lower_precisions
    except Exception as error:
        if getattr(error, "raised_by_block", False) or isinstance(error, RuntimeError):
            return Result("gradients", claim, skipped="the training step raises an exception")
        raise
    in_forward = _in_plain_forward(subject) if found else {}
    strange = {dtype: count for dtype, count in found.items() if dtype not in in_forward}
    words = ", ".join(f"{count} results of {str(dtype).removeprefix('torch.')}" for dtype, count in strange.items())
    explanation = f"a training step of the block in float64 computes {words}, a forward pass without gradients none"
    total = sum(strange.values())
    if not total and in_forward and finite_differences and _is_smooth(subject):
        slopes = like_finite_differences_when_moved(subject)
        if slopes.verdict == "PASS" and slopes.error > LARGEST_ERROR and _is_steady(subject):
            return Result(
                "gradients",
                claim,
                slopes.error,
                LARGEST_ERROR,
                "finite differences in float64, where tensors of a lower precision are computed",
                f"in float64 the gradients are {slopes.error:.1g} off, and tensors of a lower precision are computed",
            )
    return Result("gradients", claim, total, 0, "nothing may be", explanation if total else "")


def _is_smooth(subject: Subject) -> bool:
    """Return whether the outputs of a plain forward pass do not jump, as they do where it rounds to float32."""
    module = subject.plain() or subject.fresh()
    generator = torch.Generator().manual_seed(subject.seed)
    directions = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device) for x in subject.inputs]

    def outputs(step: float) -> list[Tensor]:
        moved = [x + step * d if x.is_floating_point() else x for x, d in zip(subject.inputs, directions, strict=True)]
        return [y for y in subject.evaluated(module, moved) if y.is_floating_point()]

    with torch.no_grad():
        before, middle, after = (outputs(step) for step in (-STEP, 0.0, STEP))
        bends = [a - 2 * b + c for a, b, c in zip(before, middle, after, strict=True)]
    return all(bend.norm() <= LARGEST_BEND * y.norm() for bend, y in zip(bends, middle, strict=True))


def _is_steady(subject: Subject) -> bool:
    """Return whether two training steps of one module have the same results and gradients, to the last bit.

    A difference quotient magnifies noise, which is no sign of a lower precision. Two copies of a module would not show
    noise from a generator of its own, which is copied as well.
    """
    module = subject.trained()
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    steps = []
    for _ in range(2):
        for buffer, before in buffers:
            buffer.copy_(before)
        module.zero_grad()
        outcome = subject.run(module)
        steps.append(outcome.gradients | {f"output {i}": y for i, y in enumerate(outcome.results)})
    return worst(relative_errors(steps[1], steps[0]))[1] == 0.0


def _in_plain_forward(subject: Subject) -> Mapping[torch.dtype, int]:
    with torch.no_grad(), Precisions() as precisions:
        subject.evaluated(subject.plain() or subject.fresh(), subject.inputs)
    return precisions.found
