"""Compare gradients with finite differences: a gradient must be the derivative of the loss."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from memcnn.testing.adapters import Inverted, inverse_of
from memcnn.testing.laws.guard import described, is_ours
from memcnn.testing.laws.hints import but_right_without
from memcnn.testing.laws.limits import Limit
from memcnn.testing.laws.moved import (
    WHEN_MIRRORED,
    WHEN_MOVED,
    beside,
    discard_stored_values,
    is_special,
    mirrored,
    moved,
)
from memcnn.testing.laws.result import NOT_DETERMINISTIC, Result
from memcnn.testing.laws.rounding import condition_numbers, named
from memcnn.testing.laws.settled import settled
from memcnn.testing.laws.signs import is_undone
from memcnn.testing.laws.slopes import LIMIT, Comparison, Differentiated, along_random_steps, compared_alone, norm_of
from memcnn.testing.laws.subject import Subject, without_dropout
from memcnn.testing.laws.twin import FLOOR, Outcome, is_finite

DIFFERENCES = "gradients = finite differences in float64"
AT_ONCE = LIMIT * FLOOR
"""Limit of the error along one direction in all tensors together. Each tensor by itself is then right to ``LIMIT``."""
MOST_WRONG = 16
"""After so many tensors whose gradients differ from finite differences, the other ones are not compared."""
ROUGH = 1e-3
"""Where finite differences of two step sizes differ by more than this, they decide nothing."""
ON_A_GRID = "values of an exact coupling are rounded to a grid, which has no derivative"
ROUNDS = 2
"""Number of times that tensors are moved away from kinks before a difference counts."""
UNSTEADY = 1e-6
"""A loss that differs by more, relative to its size, between two evaluations of the same values has no derivative."""
KINK = 1e-2
"""Slopes ahead and behind that differ by more are those of a kink: a curve's differ by about the step."""


def like_finite_differences(subject: Subject, *, explain: bool = True, rounds: int = ROUNDS) -> Result:
    """Check that the gradients of a training step, in float64, are the derivatives of its loss.

    Every tensor that requires a gradient is moved along random signs and along its gradient.
    ``torch.autograd.gradcheck`` does not serve: all its steps have one size, which fails beside a kink of ReLU, and it
    does not say which tensor is wrong, or how.

    Args:
        subject: in float64.
        explain: look for what must be switched off for the fault to go away.
        rounds: how often tensors may be moved away from kinks.
    """
    if subject.is_exact:
        return Result("gradients", DIFFERENCES, skipped=ON_A_GRID)
    subject = settled(replace(subject.initialised(), inputs=tuple(x.detach().clone() for x in subject.inputs)))
    try:
        outcome = subject.run(subject.trained())
    except Exception as error:
        if is_ours(error):
            raise
        return Result(
            "gradients", DIFFERENCES, math.inf, 0.0, explanation=f"the training step raised {described(error)}"
        )
    if any(y.dtype == torch.float32 for y in outcome.results):
        return Result("gradients", DIFFERENCES, skipped="an output stays float32 where all else is float64")
    if unsteady := _unsteady(subject, outcome, DIFFERENCES):
        return unsteady
    if at_once := _all_at_once(subject, outcome):
        return at_once
    found = _compared(subject, outcome)
    rough = max(comparison.doubt for comparison in found)
    if (
        rounds
        and _at_a_kink(subject, found)
        and not like_finite_differences_when_moved(subject, rounds=rounds - 1).failed
    ):
        return Result(
            "gradients",
            DIFFERENCES,
            skipped="there are kinks at these very values, such as that of ReLU at 0, where a slope is not defined; "
            "beside them the gradients are right",
        )
    if rough > ROUGH:
        return Result(
            "gradients",
            DIFFERENCES,
            skipped=f"the loss is too rough here: finite differences of two steps differ by {rough:.1g}",
        )
    return _judged(subject, max(found, key=lambda comparison: comparison.error), rough, explain=explain)


def _judged(subject: Subject, worst: Comparison, rough: float, *, explain: bool) -> Result:
    """Return the result for the comparison with the largest error; ``rough`` is the doubt about finite differences."""
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


def like_finite_differences_when_moved(
    subject: Subject,
    claim: str = DIFFERENCES + WHEN_MOVED,
    *,
    rounds: int = ROUNDS,
    when: str = "after an optimiser step ",
    move: Callable[[Subject], Subject] = moved,
) -> Result:
    """Check the same near the inputs and with moved parameters, along one direction for all tensors at once.

    If this finds a difference, run ``like_finite_differences``, which compares the tensors one by one.

    Args:
        subject: in float64.
        claim: the claim of the result.
        rounds: how often tensors may be moved further away from kinks.
        when: the beginning of an explanation.
        move: returns the subject with moved parameters.
    """
    if subject.is_exact:
        return Result("gradients", claim, skipped=ON_A_GRID)
    after = settled(beside(move(subject)))
    try:
        outcome = after.run(after.trained())
    except Exception as exception:
        if is_ours(exception):
            raise
        explanation = f"{when}a training step raised {described(exception)}"
        return Result("gradients", claim, math.inf, 0.0, explanation=explanation)
    if not outcome.is_finite or any(y.dtype == torch.float32 for y in outcome.results):
        return Result("gradients", claim, skipped="there are no finite results in float64 here")
    if unsteady := _unsteady(after, outcome, claim):  # another claim reports it
        return Result("gradients", claim, skipped=unsteady.explanation)
    loss, compared = _differentiated(after, outcome)
    error, doubt = along_random_steps(loss, compared, torch.Generator().manual_seed(after.seed))
    limit, source = max(LIMIT, 2 * doubt), f"central differences at a step and its half, which agree to {doubt:.1e}"
    if doubt <= ROUGH and error <= limit:
        return Result("gradients", claim, error, limit, source)
    result = replace(like_finite_differences(after, rounds=rounds), claim=claim)
    if result.failed:
        return replace(result, explanation=f"{when}{result.explanation}")
    return result


def like_finite_differences_when_mirrored(subject: Subject) -> Result:
    """Check the same with parameters of the other sign, where the inverse is right."""
    claim = DIFFERENCES + WHEN_MIRRORED
    if not is_undone(settled(beside(mirrored(subject)))):
        return Result("gradients", claim, skipped="the inverse is not right with parameters of the other sign")
    when = "with parameters of the other sign "
    return like_finite_differences_when_moved(subject, claim, when=when, move=mirrored)


def like_finite_differences_through_inverse(subject: Subject, claim: str) -> Result:
    """Check the gradients of the inverse, without an engine around the block."""
    module = subject.plain() or subject.fresh()
    without_dropout(module)
    with torch.no_grad():
        y = subject.evaluated(module, subject.inputs)
        try:
            x = subject.evaluated(inverse_of(module), y)
        except Exception as error:
            return Result("gradients", claim, skipped=f"inverse raised {described(error)}")
    if [v.dtype for v in (*x, *y) if v.is_floating_point() and v.dtype != torch.float64] or not is_finite((*x, *y)):
        return Result("gradients", claim, skipped="inverse gives no finite values of float64 here")
    inverted = Subject(Inverted(module), y, subject.seed, wrap=False)
    return as_of_the_block(like_finite_differences_when_moved(inverted, claim, when="through inverse, "))


def as_of_the_block(result: Result) -> Result:
    """Return the result with the parameters' own names, where the block was put into an adapter as ``module``."""
    return replace(result, explanation=result.explanation.replace("the gradient of module.", "the gradient of "))


def _unsteady(subject: Subject, outcome: Outcome, claim: str) -> Result | None:
    """Return a failure of ``claim`` where two evaluations of the same values give two losses; else None."""
    loss, _ = _differentiated(subject, outcome)
    first, second = loss(), loss()
    difference = abs(first - second) / max(1.0, abs(first))
    if not difference > UNSTEADY:
        return None
    words = f"{NOT_DETERMINISTIC}: the same values, seed and buffers give losses of {first:.6g} and {second:.6g}"
    return Result("gradients", claim, difference, UNSTEADY, explanation=words)


def _at_a_kink(subject: Subject, found: Sequence[Comparison]) -> bool:
    """Return whether a kink of the loss at these very values may explain the differences.

    At a kink the gradient is that of one side and the finite difference lies between both, so that the error is no
    larger than the kink. One ReLU of thousands may make both small.
    """
    differ = [comparison for comparison in found if comparison.error > LIMIT]
    special = any(map(is_special, subject.inputs))
    return bool(differ) and (special or any(c.kink > KINK or c.kink >= c.error for c in differ))


def _differentiated(subject: Subject, outcome: Outcome) -> tuple[Callable[[], float], list[Differentiated]]:
    """Return the loss, and name, value and gradient of each tensor that it depends on."""
    module = subject.trained()
    buffers = [(b, b.clone()) for b in module.buffers()]

    @torch.no_grad()
    def loss(values: Sequence[Tensor]) -> float:
        discard_stored_values(module)
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
    return partial(loss, inputs), compared


def _all_at_once(subject: Subject, outcome: Outcome) -> Result | None:
    """Return a pass where finite differences confirm all gradients along two random directions; None where not.

    This takes a fraction of the time of comparing the tensors one by one.
    """
    loss, compared = _differentiated(subject, outcome)
    generator = torch.Generator().manual_seed(subject.seed)
    errors, doubts = [], []
    for _ in range(2):
        error, doubt = along_random_steps(loss, compared, generator)
        if not (error <= AT_ONCE and doubt <= LIMIT):  # extrapolated, the slope is far better than the doubt about it
            return None
        errors.append(error)
        doubts.append(doubt)
    source = f"central differences of all tensors at once at a step and its half, which agree to {max(doubts):.1e}"
    return Result("gradients", DIFFERENCES, max(errors), AT_ONCE, source)


def _compared(subject: Subject, outcome: Outcome) -> list[Comparison]:
    """Compare tensors with finite differences: in groups, which are halved until they agree, and then one by one.

    The limit of a group is scaled to its smallest gradient, so that in a group that agrees every tensor is right to
    ``LIMIT``. Such groups are left out; if all agree, one tensor is compared, so that the list is never empty.
    """
    loss, compared = _differentiated(subject, outcome)
    least = FLOOR * max(map(norm_of, compared), default=0.0)
    generator = torch.Generator().manual_seed(subject.seed)
    found: list[Comparison] = []
    waiting = [compared]
    while waiting and sum(c.error > max(LIMIT, 2 * c.doubt) for c in found) < MOST_WRONG:
        group = waiting.pop()
        if len(group) == 1:
            found.append(compared_alone(loss, *group[0], least, generator))
        elif len(group) == len(compared) or not _agree(loss, group, least, generator):
            half = len(group) // 2
            waiting += [group[half:], group[:half]]
    return found or [compared_alone(loss, *compared[0], least, generator)]


def _agree(
    loss: Callable[[], float], group: Sequence[Differentiated], least: float, generator: torch.Generator
) -> bool:
    """Return whether finite differences confirm a group of tensors along two random directions."""
    norms = [norm_of(one) for one in group]
    limit = LIMIT * max(min(norms), least) / (max(math.hypot(*norms), least) or 1.0)
    pairs = (along_random_steps(loss, group, generator, least) for _ in range(2))
    return all(error <= limit and doubt <= LIMIT for error, doubt in pairs)
