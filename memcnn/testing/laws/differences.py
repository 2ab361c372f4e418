"""Gradients against finite differences: whether a gradient is the derivative of the loss at all."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from memcnn.testing.laws.conditioning import hopeless, inverse_condition_number
from memcnn.testing.laws.result import Result
from memcnn.testing.laws.step import FLOOR, but_right_without, gradients_of, parameter_names
from memcnn.testing.laws.subject import Subject
from memcnn.testing.tolerances import describe, tolerance

DIFFERENCES = "gradients = finite differences in float64"
LIMIT = 1e-6
STEPS = 1e-5, 1e-6, 1e-7
"""Of central differences, relative to the largest entry; they are extrapolated from a step and its half."""
ROUGH = 1e-3
"""Finite differences that disagree with themselves by more than this decide nothing."""


def like_finite_differences(subject: Subject, *, explain: bool = True) -> Result:
    """Whether the gradients of a training step, in float64, are the derivatives of its loss.

    Every tensor is moved along random signs and along its gradient.
    """
    subject = subject.initialised()
    module = subject.trained()
    buffers = [(b, b.clone()) for b in module.buffers()]

    @torch.no_grad()
    def loss(values: Sequence[Tensor]) -> float:
        for buffer, before in buffers:
            buffer.copy_(before)
        return subject.loss(subject.evaluated(module, values)).item()

    try:
        step = gradients_of(subject, subject.trained())
    except Exception as error:
        return Result("gradients", DIFFERENCES, math.inf, 0.0,
                      explanation=f"the training step raised {type(error).__name__}: {error}")
    if any(y.dtype == torch.float32 for y in step.outputs):
        return Result("gradients", DIFFERENCES, skipped="an output stays float32 where all else is float64")
    found = step.by_name
    inputs = [x.detach().clone() for x in subject.inputs]
    tensors = dict(zip(subject.input_names, inputs, strict=True))
    tensors |= dict(zip(parameter_names(subject), (p.detach() for p in module.parameters()), strict=True))
    tensors = {name: tensors[name] for name in found}
    scale = FLOOR * max((g.norm().item() for g in found.values() if g is not None), default=0.0)
    worst, told, rough = 0.0, (), 0.0
    generator = torch.Generator().manual_seed(subject.seed)
    for name, tensor in tensors.items():
        gradient = torch.zeros_like(tensor) if found[name] is None else found[name]
        signs = torch.randint(2, tensor.shape, generator=generator, device="cpu").to(tensor) * 2 - 1
        along = [gradient / gradient.abs().max()] if gradient.any() else []
        slopes = []
        for direction in [signs, *along]:
            slope, doubt = _slope(partial(loss, inputs), tensor, direction)
            size = max(gradient.norm().item(), scale, abs(slope) / max(1.0, direction.norm().item()))
            predicted = (gradient * direction).sum().item()
            # along itself a gradient g has the slope |g|^2 / max|g|, far more than |g|
            size = max(size, abs(predicted)) or 1.0
            slopes.append((predicted, slope))
            error, doubt = abs(predicted - slope) / size, doubt / size
            rough = max(rough, doubt)
            if error - 2 * doubt > worst:
                worst, told = error, (name, found[name], slopes)
    if rough > ROUGH:
        return Result("gradients", DIFFERENCES, skipped="the loss is too rough here: finite differences of two steps "
                                                        f"differ by {rough:.1g}")
    limit = max(LIMIT, 2 * rough)
    source = f"central differences at a step and its half, which agree to {rough:.1e}"
    if worst > limit:  # but what backward rebuilds is rounded as well
        scale = {"depth": 2 * subject.depth, "condition": inverse_condition_number(subject)}
        if (rounded := tolerance(torch.float64, **scale)) > limit:
            limit, source = rounded, describe(torch.float64, **scale)
        if skipped := hopeless(limit, scale["condition"]):
            return Result("gradients", DIFFERENCES, skipped=skipped)
    explanation = ""
    if worst > limit:
        explanation = _told(*told)
        if explain:
            explanation += but_right_without(
                subject, lambda other: not like_finite_differences(other, explain=False).failed)
    return Result("gradients", DIFFERENCES, worst, limit, source, explanation)


def _slope(loss: Callable[[], float], tensor: Tensor, direction: Tensor) -> tuple[float, float]:
    """The derivative of ``loss()`` as ``tensor`` moves along ``direction``, and by how much two steps disagree.

    Where they disagree, as where a ReLU has its kink between them, shorter steps are tried, and preferred where they
    agree better than by the rounding of the loss, in which they may agree by chance.
    """
    start = tensor.clone()

    def difference(h: float) -> tuple[float, float]:
        """The central difference, and how far it may be off where both losses are rounded once."""
        tensor.copy_(start + h * direction)
        ahead = loss()
        tensor.copy_(start - h * direction)
        behind = loss()
        tensor.copy_(start)
        return (ahead - behind) / (2 * h), torch.finfo(start.dtype).eps * max(abs(ahead), abs(behind)) / h

    best, least = (math.nan, math.inf), math.inf
    for step in STEPS:
        h = step * max(1.0, start.abs().max().item())
        (coarse, _), (fine, rounding) = difference(h), difference(h / 2)
        doubt = abs(fine - coarse)
        if doubt + rounding < least:
            best, least = ((4 * fine - coarse) / 3, doubt), doubt + rounding
        if best[1] <= LIMIT * abs(best[0]) / 10:
            break
    return best


def _told(name: str, gradient: Tensor | None, slopes: Sequence[tuple[float, float]]) -> str:
    """What is wrong with one gradient, of which ``slopes`` holds what it says beside what finite differences give."""
    what = f"the gradient of {name.removeprefix('parameter ')}"
    if gradient is None or not gradient.any():
        return f"{what} is {'missing' if gradient is None else 'zero'}, but the loss depends on it"
    ratios = [predicted / slope if slope else math.inf for predicted, slope in slopes]
    if max(ratios) - min(ratios) < 1e-4 * abs(ratios[0]):
        return f"{what} is {ratios[0]:.4g} times what it should be"
    predicted, slope = max(slopes, key=lambda pair: abs(pair[0] - pair[1]))
    return f"{what} is wrong: along one direction it says {predicted:.4g}, where finite differences give {slope:.4g}"
