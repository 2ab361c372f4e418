"""How much a block amplifies rounding: the condition number of one direction, and the growth with depth."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from memcnn.testing.laws.result import BADLY_CONDITIONED, HOPELESS
from memcnn.testing.laws.subject import Subject, without_dropout
from memcnn.testing.tolerances import distance

FAILS = 1e-2
"""A rebuilt activation this far off, relative to the largest, is no longer the activation."""
PROBES = 3
EXPONENTS = 0.5, 0.75, 0.9
"""Of the dtype's rounding: small changes to begin with, and where the effect of one is not finite."""
DEEPEST = 64


def condition_number(subject: Subject, function: Callable, values: Sequence[Tensor]) -> float:
    """Relative change of ``function(values)`` for a small relative change of ``values``, the largest of a few; >= 1.

    Both changes are relative to the largest entry. The small change is the square root of the dtype's rounding, so that
    neither rounding nor curvature decides; a smaller one where that gives values that are not finite, and if the
    smallest does, whichever way the values change, the condition number is infinite. Where ``function(values)`` is not
    finite itself, or raises for all others, nothing is known to be amplified.
    """
    generator = torch.Generator().manual_seed(subject.seed)
    base = subject.evaluated(function, values)
    if not all(value.isfinite().all() for value in base):
        return 1.0
    found = [_amplified(subject, function, values, base, generator) for _ in range(PROBES)]
    finite = [amplification for amplification in found if math.isfinite(amplification)]
    return max(1.0, *finite) if finite else math.inf


def _amplified(subject: Subject, function: Callable, values: Sequence[Tensor], base: Sequence[Tensor],
               generator: torch.Generator) -> float:
    """The effect of a change in one direction over its cause; 0 where all raise, infinite where none is finite."""
    largest = 0.0
    directions = [torch.randn(value.shape, generator=generator, device="cpu").to(value) for value in values]
    for exponent in EXPONENTS:
        changed = [value + torch.finfo(value.dtype).eps ** exponent * value.abs().max() * direction
                   if value.is_floating_point() and value.numel() else value
                   for value, direction in zip(values, directions, strict=True)]
        if not (cause := distance(changed, values)):
            return 0.0
        try:
            effect = distance(subject.evaluated(function, changed), base)
        except Exception:  # beside a value at the end of its range
            continue
        if math.isfinite(effect):
            return effect / cause
        largest = math.inf
    return largest


def inverse_condition_number(subject: Subject) -> float:
    """Of the inverse, by which a wrapped block rebuilds what its gradients are made of."""
    module = subject.fresh()
    try:
        with torch.no_grad():
            return condition_number(subject, module.inverse, subject.evaluated(module, subject.inputs))
    except Exception:  # an inverse that does not run is for the law of inversion to tell
        return 1.0


def hopeless(limit: float, condition: float) -> str:
    """Why nothing can be told where rounding alone may be as large as the values; "" where something can."""
    if limit < 1:
        return ""
    return f"{HOPELESS}the condition number is {condition:.2g}"


def growth(subject: Subject) -> str:
    """What becomes of the error when the block is repeated, in words; "" where that is nothing to worry about.

    The block is run d times, with the same weights, and inverted d times, for d = 64, and if that loses more than 1 %
    of the input for d = 1, 2, 4, ... until it does. A chain counts as its blocks.
    """
    at_once = _error_of(subject, max(1, DEEPEST // subject.depth))
    if at_once is not None and at_once < FAILS:
        return ""
    errors: dict[int, float] = {}
    depth = 1
    while depth * subject.depth <= DEEPEST and (not errors or errors[depth // 2] < FAILS):
        if (error := _error_of(subject, depth)) is None:
            break
        errors[depth] = error
        depth *= 2
    deepest, error = list(errors.items())[-1] if errors else (0, 0.0)
    dtype = str(subject.dtype).removeprefix("torch.")
    if deepest == 1 and error >= FAILS:
        return (f"{BADLY_CONDITIONED}in {dtype} the inverse of one block alone is off by {error:.2g} times "
                "the input's largest entry")
    if not math.isfinite(error):
        return f"{BADLY_CONDITIONED}{deepest} such blocks give values that are not finite in {dtype}"
    if error < FAILS:
        return ""
    rate = (error / max(errors[1], torch.finfo(subject.dtype).eps)) ** (1 / (deepest - 1))
    fails_at = max(2, round(1 + math.log(FAILS / max(errors[1], torch.finfo(subject.dtype).eps)) / math.log(rate)))
    return (f"{BADLY_CONDITIONED}the error grows {rate:.2g}-fold a block, so that {dtype} fails (1 % of the "
            f"input) at a depth of about {fails_at} such blocks with these weights")


def _error_of(subject: Subject, depth: int) -> float | None:
    """After ``depth`` blocks and as many inverses; None where a block does not take what the one before it gives."""
    module = subject.fresh()
    without_dropout(module)
    values = subject.inputs
    try:
        for function in (module, module.inverse):
            for _ in range(depth):
                values = subject.evaluated(function, values)
                if [v.shape for v in values] != [x.shape for x in subject.inputs]:
                    return None
    except Exception:
        return None
    return distance(values, subject.inputs)
