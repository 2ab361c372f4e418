"""Slopes of a loss along directions, by finite differences, and what a gradient predicts of them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LIMIT = 1e-6
"""Largest error of a gradient, relative to its norm."""
STEPS = 1e-5, 1e-6, 1e-7, 1e-8
"""Steps of central differences, relative to the largest entry; they are extrapolated from a step and its half.

The shortest serves long chains, where all but the shortest steps carry one of many thousands of values over a kink."""

Differentiated = tuple[str, Tensor, Tensor | None]
"""Name, value and gradient of a tensor that the loss depends on."""


@dataclass(frozen=True)
class Comparison:
    """One gradient beside finite differences along several directions.

    Attributes:
        name: the name of the tensor.
        gradient: its gradient.
        slopes: for each direction, the slope that the gradient predicts, and that of finite differences.
        error: the largest difference of these two, relative to the gradient's norm.
        doubt: the largest difference of finite differences of two steps, relative to the same.
        kink: the largest difference of the slopes ahead and behind, relative to the same.
    """

    name: str
    gradient: Tensor | None
    slopes: Sequence[tuple[float, float]]
    error: float
    doubt: float
    kink: float = 0.0

    def explain(self) -> str:
        """Explain what is wrong with the gradient."""
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


def along_random_steps(
    loss: Callable[[], float],
    compared: Sequence[Differentiated],
    generator: torch.Generator,
    least: float = 0.0,
) -> tuple[float, float]:
    """Return the error along random steps of all tensors, and the doubt about it, relative to the gradient's norm.

    Steps are from 1 to 2 long, up or down. If all were equally long, the errors of two swapped entries could cancel. A
    norm below ``least`` counts as ``least``.
    """

    def drawn(x: Tensor) -> Tensor:
        signs = torch.randint(2, x.shape, generator=generator, device="cpu") * 2 - 1
        return (signs * (1 + torch.rand(x.shape, generator=generator, dtype=torch.float64, device="cpu"))).to(x)

    steps = [drawn(x) for _, x, _ in compared]
    slope, doubt, _ = _slope(loss, [x for _, x, _ in compared], steps)
    predicted = sum((g * d).sum().item() for (_, _, g), d in zip(compared, steps, strict=True) if g is not None)
    size = max(math.hypot(*map(norm_of, compared)), least) or abs(slope) or 1.0
    return abs(predicted - slope) / size, doubt / size


def norm_of(tensor: Differentiated) -> float:
    """Return the norm of a tensor's gradient; 0 if there is none."""
    gradient = tensor[2]
    return 0.0 if gradient is None else gradient.norm().item()


def compared_alone(
    loss: Callable[[], float],
    name: str,
    tensor: Tensor,
    gradient: Tensor | None,
    least: float,
    generator: torch.Generator,
) -> Comparison:
    """Compare one gradient with finite differences along random signs, and along itself."""
    predicting = torch.zeros_like(tensor) if gradient is None else gradient
    signs = torch.randint(2, tensor.shape, generator=generator, device="cpu").to(tensor) * 2 - 1
    along = [predicting / predicting.abs().max()] if predicting.any() else []
    slopes, errors, doubts, kinks = [], [0.0], [0.0], [0.0]
    for direction in [signs, *along]:
        slope, doubt, kink = _slope(loss, [tensor], [direction])
        predicted = (predicting * direction).sum().item()
        # along itself a gradient g has the slope |g|^2 / max|g|, far more than |g|
        size = (
            max(predicting.norm().item(), least, abs(slope) / max(1.0, direction.norm().item()), abs(predicted)) or 1.0
        )
        slopes.append((predicted, slope))
        errors.append(abs(predicted - slope) / size)
        doubts.append(doubt / size)
        kinks.append(kink / size)
    return Comparison(name, gradient, slopes, max(errors), max(doubts), max(kinks))


def _slope(
    loss: Callable[[], float], tensors: Sequence[Tensor], directions: Sequence[Tensor]
) -> tuple[float, float, float]:
    """Return the derivative of ``loss()`` along ``directions``, the doubt about it, and the size of a kink.

    Where two steps disagree, as on either side of a ReLU's kink, shorter steps are tried. A shorter step is preferred
    only if it agrees better even after the rounding of the loss is added, in which two steps may agree by chance. The
    kink is the difference between the slopes ahead and behind. The doubt is how much two steps disagree, plus what
    rounding may do to the shorter one.
    """
    starts = [tensor.clone() for tensor in tensors]
    eps, here = torch.finfo(starts[0].dtype).eps, loss()

    def at(h: float) -> float:
        for tensor, start, direction in zip(tensors, starts, directions, strict=True):
            tensor.copy_(start + h * direction if h else start)
        return loss() if h else math.nan

    def difference(h: float) -> tuple[float, float, float]:
        """Return the central difference, how far rounding may put it off, and the difference of both sides."""
        ahead, behind = at(h), at(-h)
        at(0.0)
        return (ahead - behind) / (2 * h), eps * max(abs(ahead), abs(behind)) / h, abs(ahead + behind - 2 * here) / h

    best = math.nan, math.inf, 0.0
    largest = max((start.abs().max().item() for start in starts if start.numel()), default=0.0)
    for step in STEPS:
        h = step * max(1.0, largest)
        (coarse, _, _), (fine, rounding, kink) = difference(h), difference(h / 2)
        doubt = abs(fine - coarse) + rounding
        if doubt < best[1]:
            best = (4 * fine - coarse) / 3, doubt, kink
        if best[1] <= LIMIT * abs(best[0]) / 10:
            break
    return best
