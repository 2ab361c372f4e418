"""The law of inversion: inverse(forward(x)) = x and forward(inverse(y)) = y, up to rounding.

A badly conditioned block amplifies rounding, which is no fault: its limit is larger. The same comparison in float64,
where rounding is nine digits smaller, shows whether the inverse itself is wrong.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from memcnn.testing.adapters import inverse_of
from memcnn.testing.laws.constant import RANDOM_CHANNELS, without_constants
from memcnn.testing.laws.growth import DEEPEST, growth
from memcnn.testing.laws.guard import described, guarded
from memcnn.testing.laws.limits import Limit
from memcnn.testing.laws.moved import (
    WHEN_MIRRORED,
    WHEN_MOVED,
    hides_a_sign,
    mirrored,
    moved,
    used_and_moved,
    with_buffers_of,
)
from memcnn.testing.laws.result import NOT_DETERMINISTIC, Report, Result, of_float64_alone
from memcnn.testing.laws.rounding import condition_numbers
from memcnn.testing.laws.settled import settled
from memcnn.testing.laws.signs import why_not_undone
from memcnn.testing.laws.sizes import ANOTHER_SIZE, another_size_leaves_no_trace
from memcnn.testing.laws.stored import excused
from memcnn.testing.laws.subject import NotRunnable, Subject, reordered, without_dropout
from memcnn.testing.laws.twin import NamedTensors, is_finite, worst
from memcnn.testing.tolerances import distance, tolerance

SHARE = 0.25
"""For forward(inverse(y)) = y, each y is a mix of two samples' outputs; this is the share of the second.

A mix lies in the range of forward if that range is an interval, as for a sigmoid."""
FORTH = "inverse(forward(x)) = x"
BACK = "forward(inverse(y)) = y"
DIFFERS = f"{NOT_DETERMINISTIC}: the same input and seed give another output"
IN_FLOAT64 = " in float64"
CONTIGUOUS = "for contiguous values it is right"
STRIDES = "the strides of a tensor do not matter"
NEW_PARAMETERS = "after an optimiser step both directions use the new parameters"
NO_INVERSE = "values between outputs have no inverse here"


@torch.no_grad()
def check_inverse(
    module: nn.Module, *inputs: Tensor, seed: int = 0, deepest: int = DEEPEST, autocast: torch.dtype | None = None
) -> Report:
    """Check that ``inverse_of(module)`` undoes ``module`` and the other way round, in the inputs' dtype and in float64.

    Runs on copies, in the module's mode, with dropout off (a new mask would be another function). Errors are relative
    to the largest entry of what should come back; their limit is that of `memcnn.testing.laws.limits.Limit`. The
    explanation of a pass says if the block is badly conditioned; that of a failure, what the inverse does instead.

    Args:
        module: a module with ``forward`` and ``inverse``, from tensors to a tensor or a tuple of tensors.
        inputs: the arguments of ``forward``, of any shapes and strides.
        seed: seed of torch's generators at every evaluation.
        deepest: if the law holds, estimate whether a chain of up to this many such blocks could still be rebuilt, and
            report it. 0 skips the estimate.
        autocast: run both directions under autocast to this dtype.
    """
    subject = settled(Subject(module, inputs, seed, autocast=autocast))
    forth = _checked(FORTH, _inverse_undoes_forward, subject)
    if not forth.failed and not forth.skipped and (remark := growth(subject, deepest)):
        forth = _explain(forth, remark)
    results = [forth, _checked(BACK, _forward_undoes_inverse, subject)]
    if subject.dtype != torch.float64 and not autocast:
        try:
            double = settled(subject.in_double())
            exact = _checked(FORTH + IN_FLOAT64, _inverse_undoes_forward, double, IN_FLOAT64)
            if forth.skipped and exact.verdict == "PASS":
                exact = _explain(exact, growth(subject, deepest))
            results += excused([exact], double)
        except NotRunnable as error:
            results.append(Result("inverse", FORTH + IN_FLOAT64, skipped=f"in float64 {error}"))
    strides = _checked(STRIDES, _check_strides, subject)
    results = [_explain_by_strides(result, strides) for result in results] + [strides]
    results.append(_checked(ANOTHER_SIZE, another_size_leaves_no_trace, subject, _both_directions))
    if forth.verdict == "PASS" and any(p.requires_grad for p in module.parameters()):
        after = settled(moved(subject))
        results.append(_checked(FORTH + WHEN_MOVED, _inverse_undoes_moved_forward, after))
        results.append(_checked(NEW_PARAMETERS, _new_parameters_are_used, subject, after))
        if hides_a_sign(module) and results[-2].verdict == "PASS":
            results.append(_checked(FORTH + WHEN_MIRRORED, _inverse_undoes_mirrored_forward, subject))
    return Report(tuple(results))


def _explain_by_strides(result: Result, strides: Result) -> Result:
    """Put the explanation of a failed claim about strides in front of that of ``result``.

    Do so only if ``result`` fails for non-contiguous values alone.
    """
    if result.failed and strides.failed and CONTIGUOUS in result.explanation:
        return _explain(result, f"{strides.explanation}: {result.explanation}")
    return result


def _checked(claim: str, check: Callable[..., Result], *arguments: object) -> Result:
    return guarded("inverse", claim, check, *arguments)


def _inverse_undoes_moved_forward(after: Subject) -> Result:
    """Check the inverse after an optimiser step. Initial parameters may be a special case, such as zeros."""
    result = _inverse_undoes_forward(after, WHEN_MOVED)
    if result.failed:
        return _explain(
            result, f"after an optimiser step {result.explanation}; it is right with the parameters as they start"
        )
    return result


def _inverse_undoes_mirrored_forward(subject: Subject) -> Result:
    """Check the inverse with negated parameters. Skip the claim if forward then has no inverse."""
    try:
        after = settled(mirrored(subject))
        subject.evaluated(after.fresh(), subject.inputs)
    except Exception as error:
        skipped = f"forward raised {described(error)} with parameters of the other sign"
        return Result("inverse", FORTH + WHEN_MIRRORED, skipped=skipped)
    result = _inverse_undoes_forward(after, WHEN_MIRRORED)
    if result.failed and (reason := why_not_undone(after)):
        return replace(result, skipped=reason)
    if result.failed:
        words = f"with parameters of the other sign {result.explanation}"
        return _explain(result, f"{words}; it is right with the signs that they start with")
    return result


def _new_parameters_are_used(subject: Subject, after: Subject) -> Result:
    """Compare both directions, after a step, with those of a module that has the same parameters and never ran."""
    with torch.enable_grad():
        module = used_and_moved(subject)
    afresh = after.fresh(dropout=False)
    if not with_buffers_of(afresh, module) or not _deterministic(subject):
        return Result("inverse", NEW_PARAMETERS, skipped="the module's state cannot be put into one that never ran")
    y = subject.evaluated(afresh, subject.inputs)
    pairs = {"forward": (subject.evaluated(module, subject.inputs), y)}
    pairs["inverse"] = (subject.evaluated(inverse_of(module), y), subject.evaluated(inverse_of(afresh), y))
    if not all(is_finite(values) for pair in pairs.values() for values in pair):
        return Result("inverse", NEW_PARAMETERS, skipped="values are not finite here")
    errors = {name: distance(*pair) for name, pair in pairs.items() if _kinds(pair[0]) == _kinds(pair[1])}
    name, error = worst(errors)
    return Limit(after.dtype, after.depth, after.autocast, condition_numbers(after, _both_directions)).judge(
        "inverse",
        NEW_PARAMETERS,
        error,
        f"after an optimiser step {name} gives other values than in a module that has the same parameters and never "
        "ran before: it uses a value that it computed from the old parameters",
    )


def _check_strides(subject: Subject) -> Result:
    """Check that forward and inverse give the same results for contiguous values and for other strides."""
    conditions = condition_numbers(subject, _both_directions, proportional=not subject.is_exact)
    limit = Limit(subject.dtype, subject.depth, subject.autocast, conditions)
    module = subject.fresh(dropout=False)
    values_of: dict[str, Sequence[Tensor]] = {"forward": [x.contiguous() for x in subject.inputs]}
    y = subject.evaluated(module, values_of["forward"])
    values_of["inverse"] = y
    if not is_finite(y) or not _deterministic(subject):
        return Result("inverse", STRIDES, skipped="forward gives no values that could be compared")
    try:
        x = subject.evaluated(inverse_of(module), y)
    except Exception:  # another claim reports it
        return Result("inverse", STRIDES, skipped="inverse raises an exception")
    largest, explanation = 0.0, ""
    strided = next((x for x in subject.inputs if not x.is_contiguous()), None)
    given = {} if strided is None else {f"values of shape {tuple(strided.shape)}, strides {strided.stride()}": None}
    for name, lay_out in (given | OTHER_STRIDES).items():  # None: the user's own inputs
        for direction, wanted in ("forward", y), ("inverse", x):
            if lay_out is None and direction == "inverse":
                continue
            values = [lay_out(value) for value in values_of[direction]] if lay_out else subject.inputs
            module = subject.fresh(dropout=False)
            if direction == "inverse":
                subject.evaluated(module, subject.inputs)
            function = module if direction == "forward" else inverse_of(module)
            try:
                got = subject.evaluated(function, values)
            except Exception as exception:
                if direction == "forward":
                    continue  # it refuses such inputs
                return Result(
                    "inverse",
                    STRIDES,
                    math.inf,
                    0.0,
                    explanation=f"inverse raised {described(exception)} for {name}",
                )
            error = distance(got, wanted) if _kinds(got) == _kinds(wanted) else math.inf
            if not error <= largest:
                largest, explanation = error, f"{direction} gives other results for {name}"
    result = limit.judge("inverse", STRIDES, largest, explanation)
    varied = without_constants(subject) if result.failed else None
    if varied is not None and not _check_strides(varied).failed:
        return Result("inverse", STRIDES, skipped=f"{explanation}, but right with {RANDOM_CHANNELS}")
    return result


def _both_directions(subject: Subject) -> NamedTensors:
    """Return the results of forward, and of the inverse applied to them."""
    module = subject.fresh(dropout=False)
    y = subject.evaluated(module, subject.inputs)
    return {f"{i}": value for i, value in enumerate((*y, *subject.evaluated(inverse_of(module), y)))}


def _channels_last(x: Tensor) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.contiguous(memory_format=formats.get(x.dim(), torch.contiguous_format))


def _with_gaps(x: Tensor) -> Tensor:
    return torch.stack((x, x), -1)[..., 0] if x.dim() else x


OTHER_STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last values": _channels_last,
    "non-contiguous values": _with_gaps,
}


def _inverse_undoes_forward(subject: Subject, where: str = "") -> Result:
    """Compare inverse(forward(x)) with x."""
    claim, x = FORTH + where, subject.inputs
    module = subject.fresh()
    note = "dropout was off for this check" if without_dropout(module) else ""
    y = subject.evaluated(module, x)
    if not is_finite(y):
        return Result("inverse", claim, skipped="forward gives values that are not finite here")
    try:
        back = subject.evaluated(inverse_of(module), y)
    except Exception as error:
        return Result("inverse", claim, math.inf, 0.0, explanation=f"inverse raised {described(error)}")
    result = _compared(subject, claim, back, x, inverse_first=False)
    if not result.failed:
        return _explain(result, note) if not where and not result.skipped else result
    if result.explanation:
        return result
    if where == IN_FLOAT64 and result.error <= tolerance(torch.float32) and _deterministic(subject):
        return _explain(result, f"in float64 the inverse is {result.error:.1g} off, {of_float64_alone(result.error)}")
    return _explain(
        result, _what_it_does_instead(subject, module, x, y, back) + _but_right_elsewhere(subject, x, result.error)
    )


def _forward_undoes_inverse(subject: Subject) -> Result:
    """Compare forward(inverse(y)) with y, a mix of two samples' outputs."""
    module = subject.fresh(dropout=False)
    try:
        y = [
            subject.on_grid((1 - SHARE) * value + SHARE * reordered(value)) if value.is_floating_point() else value
            for value in subject.evaluated(module, subject.inputs)
        ]
        x = subject.evaluated(inverse_of(module), y)
    except Exception as error:
        return Result("inverse", BACK, math.inf, 0.0, explanation=f"raised {described(error)}")
    if not is_finite(x):
        return Result("inverse", BACK, skipped=NO_INVERSE)
    try:
        forth = subject.evaluated(module, x)
    except Exception as error:
        return Result("inverse", BACK, math.inf, 0.0, explanation=f"forward raised {described(error)}")
    if not is_finite(forth):  # as where a scale that the inverse divides by has overflowed
        return Result("inverse", BACK, skipped=NO_INVERSE)
    result = _compared(subject, BACK, forth, y, inverse_first=True)
    if not result.failed or result.explanation:
        return result
    if not _deterministic(subject):
        return _explain(result, DIFFERS)
    if [t.shape for t in x] == [t.shape for t in subject.inputs] and not distance(x, subject.inputs):
        return _explain(result, "inverse returns the last input of forward, whatever it is asked to invert")
    return result


def _compared(
    subject: Subject, claim: str, got: Sequence[Tensor], wanted: Sequence[Tensor], *, inverse_first: bool
) -> Result:
    """Compare what came back from one direction and then the other with what they started from."""
    if _kinds(got) != _kinds(wanted):
        name = "forward" if inverse_first else "inverse"
        return Result("inverse", claim, math.inf, 0.0, explanation=f"{name} gives {_words(got)}, not {_words(wanted)}")
    compute = partial(_there_and_back, start=wanted, inverse_first=inverse_first)
    limit = Limit(subject.dtype, subject.depth, subject.autocast, condition_numbers(subject, compute))
    return limit.judge("inverse", claim, distance(got, wanted))


def _there_and_back(subject: Subject, *, start: Sequence[Tensor], inverse_first: bool) -> NamedTensors:
    """Return what comes back from both directions, one after the other."""
    module = subject.fresh(dropout=False)
    start = [x.to(subject.dtype) if x.is_floating_point() else x for x in start]
    there, back = (inverse_of(module), module) if inverse_first else (module, inverse_of(module))
    middle = subject.evaluated(there, start)
    # multiply by 1, so that condition_numbers also perturbs the values in between
    end = subject.evaluated(back, [1 * y if y.is_floating_point() else y for y in middle])
    return {"end": torch.cat([x.flatten() for x in end if x.is_floating_point()])}


def _what_it_does_instead(
    subject: Subject, module: nn.Module, x: Sequence[Tensor], y: Sequence[Tensor], back: Sequence[Tensor]
) -> str:
    """Describe ``back``, the wrong result of the inverse of y, such as "its argument unchanged".

    A description is used only if ``back`` is at least ten times closer to it than to x.
    """
    off = distance(back, x)
    close = min(1e3 * tolerance(subject.dtype, depth=subject.depth), 0.1 * off)
    if not is_finite(back):
        return "inverse gives values that are not finite"
    if not _deterministic(subject):
        return DIFFERS
    if all(map(_is_constant, y)) and not all(map(_is_constant, x)):
        return f"forward returns the same value, {y[0].flatten()[0].item():.6g}, in all entries"
    same_shape = [t.shape for t in x] == [t.shape for t in y]
    if same_shape and distance(back, y) <= close:
        return "inverse returns its argument unchanged"
    if same_shape and distance(back, subject.evaluated(module, y)) <= close:
        return "inverse does what forward does"
    for dim in range(1, x[0].dim()):
        if x[0].shape[dim] % 2 == 0 and len(x) == 1:
            first, second = back[0].chunk(2, dim)
            if distance([torch.cat([second, first], dim)], x) <= close:
                return f"inverse returns the halves along dimension {dim} swapped"
    return f"inverse gives something else than x{_where(x[0], back[0]) if len(x) == 1 else ''}"


def _is_constant(x: Tensor) -> bool:
    return x.numel() > 1 and bool((x == x.flatten()[0]).all())


def _deterministic(subject: Subject) -> bool:
    """Return whether forward, run twice with the same random numbers and buffers, gives the same."""
    module = subject.fresh(dropout=False)
    first = subject.evaluated(module, subject.inputs)
    for buffer, before in zip(module.buffers(), subject.module.buffers(), strict=True):
        buffer.copy_(before)
    return distance(subject.evaluated(module, subject.inputs), first) <= tolerance(subject.dtype, depth=subject.depth)


def _where(x: Tensor, back: Tensor) -> str:
    """Explain which part of x is wrong, if it is a part along one dimension, else how many of its entries."""
    wrong = (back - x).abs() > 1e-2 * (back - x).abs().max()
    for dim, size in enumerate(x.shape):
        at = wrong.movedim(dim, 0).flatten(1).any(1).nonzero().flatten().tolist()
        if size == 2 * len(at) and at in (list(range(len(at))), list(range(len(at), size))):
            return f", only in the {'first' if at[0] == 0 else 'second'} half along dimension {dim}"
        if 2 * len(at) < size:
            return f", only at {', '.join(map(str, at))} along dimension {dim}"
    return f", in {wrong.double().mean():.0%} of its entries"


def _but_right_elsewhere(subject: Subject, x: Sequence[Tensor], error: float) -> str:
    """Return a clause that says where the inverse is right: the other mode, contiguous or smaller inputs; or ""."""

    def right(module: nn.Module, inputs: Sequence[Tensor]) -> bool:
        without_dropout(module)
        try:
            back = subject.evaluated(inverse_of(module), subject.evaluated(module, inputs))
            limit = 10 * tolerance(subject.dtype, depth=subject.depth)
            return distance(back, inputs) <= min(limit, error / 10)
        except Exception:
            return False

    other = "eval" if subject.module.training else "training"
    if right(subject.fresh().train(not subject.module.training), x):
        return f"; in {other} mode it is right"
    dense = [value.contiguous() for value in x]
    if any(not value.is_contiguous() for value in x) and right(subject.fresh(), dense):
        return f"; {CONTIGUOUS}"
    if right(subject.fresh(), [0.01 * value if value.is_floating_point() else value for value in x]):
        return "; for inputs a hundredth as large it is right"
    return ""


def _kinds(values: Sequence[Tensor]) -> list[tuple]:
    return [(value.shape, value.dtype, value.device) for value in values]


def _words(values: Sequence[Tensor]) -> str:
    return ", ".join(f"{tuple(value.shape)} of {value.dtype} on {value.device}" for value in values)


def _explain(result: Result, explanation: str) -> Result:
    return replace(result, explanation=explanation)
