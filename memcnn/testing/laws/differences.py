"""Gradients against finite differences: whether a gradient is the derivative of the loss at all."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from memcnn.testing.laws.hints import but_right_without
from memcnn.testing.laws.limits import Limit
from memcnn.testing.laws.result import Result
from memcnn.testing.laws.rounding import condition_numbers, named
from memcnn.testing.laws.subject import Subject
from memcnn.testing.laws.twin import FLOOR, Outcome

DIFFERENCES = "gradients = finite differences in float64"
LIMIT = 1e-6
STEPS = 1e-5, 1e-6, 1e-7
"""Steps of central differences, relative to the largest entry; they are extrapolated from a step and its half."""
ROUGH = 1e-3
"""Finite differences that disagree with themselves by more than this decide nothing."""


@dataclass(frozen=True)
class Comparison:
    """One gradient beside finite differences along several directions.

    slopes: for each direction, what the gradient predicts, and what finite differences give.
    error, doubt: the largest difference of the two, and of two finite differences, relative to the gradient's norm.
    """

    name: str
    gradient: Tensor | None
    slopes: Sequence[tuple[float, float]]
    error: float
    doubt: float

    def explain(self) -> str:
        what = f"the gradient of {self.name}"
        if self.gradient is None or not self.gradient.any():
            return f"{what} is {'missing' if self.gradient is None else 'zero'}, but the loss depends on it"
        ratios = [predicted / slope if slope else math.inf for predicted, slope in self.slopes]
        if max(ratios) - min(ratios) < 1e-4 * abs(ratios[0]):
            return f"{what} is {ratios[0]:.4g} times what it should be"
        predicted, slope = max(self.slopes, key=lambda pair: abs(pair[0] - pair[1]))
        return (
            f"{what} is wrong: along one direction it says {predicted:.4g}, where finite differences give {slope:.4g}"
        )


def like_finite_differences(subject: Subject, *, explain: bool = True) -> Result:
    """Check that the gradients of a training step, in float64, are the derivatives of its loss.

    Every tensor that requires a gradient is moved along random signs and along its gradient.
    ``torch.autograd.gradcheck`` does not serve: all its steps have one size, which fails beside a kink of ReLU, and it
    does not say which tensor is wrong, or how.
    """
    subject = replace(subject.initialised(), inputs=tuple(x.detach().clone() for x in subject.inputs))
    try:
        outcome = subject.run(subject.trained())
    except Exception as error:
        return Result(
            "gradients",
            DIFFERENCES,
            math.inf,
            0.0,
            explanation=f"the training step raised {type(error).__name__}: {error}",
        )
    if any(y.dtype == torch.float32 for y in outcome.results):
        return Result("gradients", DIFFERENCES, skipped="an output stays float32 where all else is float64")
    found = _compared(subject, outcome)
    rough = max(comparison.doubt for comparison in found)
    if rough > ROUGH:
        return Result(
            "gradients",
            DIFFERENCES,
            skipped=f"the loss is too rough here: finite differences of two steps differ by {rough:.1g}",
        )
    worst = max(found, key=lambda comparison: comparison.error)
    limit = max(LIMIT, 2 * rough)
    source = f"central differences at a step and its half, which agree to {rough:.1e}"
    if worst.error <= limit:
        return Result("gradients", DIFFERENCES, worst.error, limit, source)
    # the gradient may be as far off as the activations that backward rebuilds
    rounding = Limit(
        torch.float64, 2 * subject.depth, conditions=condition_numbers(subject, lambda s: named(s.run(s.trained())))
    )
    result = rounding.judge("gradients", DIFFERENCES, worst.error)
    if not result.failed:
        return result
    explanation = worst.explain()
    if explain:
        explanation += but_right_without(
            subject, lambda other: not like_finite_differences(other, explain=False).failed
        )
    return Result(
        "gradients",
        DIFFERENCES,
        worst.error,
        max(limit, result.limit),
        source if limit > result.limit else result.limit_from,
        explanation,
    )


def _compared(subject: Subject, outcome: Outcome) -> list[Comparison]:
    module = subject.trained()
    buffers = [(b, b.clone()) for b in module.buffers()]

    @torch.no_grad()
    def loss(values: Sequence[Tensor]) -> float:
        for buffer, before in buffers:
            buffer.copy_(before)
        return subject.loss(subject.evaluated(module, values)).item()

    inputs = [x.detach().clone() for x in subject.inputs]
    compared = [
        (name, x, gradient)
        for name, x, gradient in zip(subject.input_names, inputs, outcome.input_gradients.values(), strict=True)
        if x.is_floating_point()
    ]
    compared += [
        (name, p.detach(), outcome.parameter_gradients[name])
        for (name, _), p in zip(subject.module.named_parameters(), module.parameters(), strict=True)
        if p.requires_grad
    ]
    least = FLOOR * max((g.norm().item() for _, _, g in compared if g is not None), default=0.0)
    generator = torch.Generator().manual_seed(subject.seed)
    found = []
    for name, tensor, gradient in compared:
        predicting = torch.zeros_like(tensor) if gradient is None else gradient
        signs = torch.randint(2, tensor.shape, generator=generator, device="cpu").to(tensor) * 2 - 1
        along = [predicting / predicting.abs().max()] if predicting.any() else []
        slopes, errors, doubts = [], [0.0], [0.0]
        for direction in [signs, *along]:
            slope, doubt = _slope(partial(loss, inputs), tensor, direction)
            predicted = (predicting * direction).sum().item()
            # along itself a gradient g has the slope |g|^2 / max|g|, far more than |g|
            size = (
                max(predicting.norm().item(), least, abs(slope) / max(1.0, direction.norm().item()), abs(predicted))
                or 1.0
            )
            slopes.append((predicted, slope))
            errors.append(abs(predicted - slope) / size)
            doubts.append(doubt / size)
        found.append(Comparison(name, gradient, slopes, max(errors), max(doubts)))
    return found


def _slope(loss: Callable[[], float], tensor: Tensor, direction: Tensor) -> tuple[float, float]:
    """Return the derivative of ``loss()`` as ``tensor`` moves along ``direction``, and how much two steps disagree.

    Where they disagree, as on either side of a ReLU's kink, shorter steps are tried. A shorter step is preferred only
    if it agrees better even after the rounding of the loss is added, in which two steps may agree by chance.
    """
    start = tensor.clone()

    def difference(h: float) -> tuple[float, float]:
        """Return the central difference, and how far it may be off where both losses are rounded once."""
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
