"""The law of inversion: inverse(forward(x)) = x and forward(inverse(y)) = y, up to rounding.

The limit is what rounding explains: ``tolerance`` of the dtype and of the number of blocks, times the condition number
of the direction back. A block that amplifies rounding (badly conditioned) is therefore right, and is told from one that
inverts something else by the same comparison in float64, where rounding is nine digits smaller.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from memcnn.testing.laws.conditioning import condition_number, growth, hopeless
from memcnn.testing.laws.result import Report, Result
from memcnn.testing.laws.subject import NotRunnable, Subject, reordered, without_dropout
from memcnn.testing.tolerances import describe, distance, tolerance

SHARE = 0.25
"""Of another sample's output in the values from which the inverse starts: they lie between outputs, and so within the
range of a layer whose range is an interval."""


@torch.no_grad()
def check_inverse(module: nn.Module, *inputs: Tensor, seed: int = 0) -> Report:
    """Whether ``module.inverse`` undoes ``module`` and the other way round, in the inputs' dtype and in float64.

    Runs on copies, in the module's mode, with dropout off (a mask drawn anew is another function). The explanation of a
    pass tells when the block is badly conditioned; that of a failure, what the inverse does instead.

    Args:
        module: with ``forward`` and ``inverse``, from tensors to a tensor or a tuple of tensors.
        inputs: what ``forward`` takes.
        seed: of torch's generators at every evaluation.
    """
    subject = Subject(module, inputs, seed)
    results = [_inverse_undoes_forward(subject), _forward_undoes_inverse(subject)]
    if subject.dtype != torch.float64:
        try:
            exact = _inverse_undoes_forward(subject.in_double(), " in float64")
            told_there = results[0].skipped and exact.verdict == "PASS"
            results.append(_with(exact, growth(subject)) if told_there else exact)
        except NotRunnable as error:
            results.append(Result("inverse", f"{FORTH} in float64", skipped=f"in float64 {error}"))
    return Report(tuple(results))


FORTH = "inverse(forward(x)) = x"
BACK = "forward(inverse(y)) = y"
NOT_DETERMINISTIC = "forward is not deterministic: the same input and seed give another output"


def _inverse_undoes_forward(subject: Subject, where: str = "") -> Result:
    module = subject.fresh()
    note = "dropout was off for this check" if without_dropout(module) else ""
    x = subject.inputs
    y = subject.evaluated(module, x)
    if not _finite(y):
        return Result("inverse", FORTH + where, skipped="forward gives values that are not finite here")
    result, back = _compared(subject, FORTH + where, module.inverse, y, x)
    if result.failed and back is not None:
        if where and result.error <= tolerance(torch.float32):
            return _with(result, f"in float64 the inverse is {result.error:.1g} off, as in float32: something in it, a "
                                 "constant or a cast, is of float32")
        return _with(result, _what_it_does_instead(subject, module, x, y, back)
                     + _but_right_elsewhere(subject, x, result.error))
    if not result.failed and not result.skipped and not where:
        return _with(result, growth(subject) or note)
    return result


def _forward_undoes_inverse(subject: Subject) -> Result:
    module = subject.fresh()
    without_dropout(module)
    try:
        y = [subject.representable((1 - SHARE) * value + SHARE * reordered(value))
             if value.is_floating_point() else value for value in subject.evaluated(module, subject.inputs)]
        x = subject.evaluated(module.inverse, y)
    except Exception as error:
        return Result("inverse", BACK, math.inf, 0.0, explanation=f"raised {_said(error)}")
    if not _finite(x):
        return Result("inverse", BACK, skipped="values between outputs have no inverse here")
    result, forth = _compared(subject, BACK, module, x, y)
    if forth is not None and not _finite(forth):  # as where a scale that the inverse divides by has overflowed
        return Result("inverse", BACK, skipped="values between outputs have no inverse here")
    if result.failed and not _deterministic(subject):
        return _with(result, NOT_DETERMINISTIC)
    if result.failed and [t.shape for t in x] == [t.shape for t in subject.inputs] and not distance(x, subject.inputs):
        return _with(result, "inverse returns the last input of forward, whatever it is asked to invert")
    return result


def _compared(subject: Subject, claim: str, function: Callable, values: Sequence[Tensor], wanted: Sequence[Tensor]
              ) -> tuple[Result, Sequence[Tensor] | None]:
    """Whether function(values) = wanted, and function(values)."""
    name = "inverse" if claim.startswith(FORTH) else "forward"
    try:
        got = subject.evaluated(function, values)
    except Exception as error:
        return Result("inverse", claim, math.inf, 0.0, explanation=f"{name} raised {_said(error)}"), None
    if [(t.shape, t.dtype, t.device) for t in got] != [(t.shape, t.dtype, t.device) for t in wanted]:
        explanation = f"{name} gives {_kinds(got)}, not {_kinds(wanted)}"
        return Result("inverse", claim, math.inf, 0.0, explanation=explanation), None
    condition = condition_number(subject, function, values)
    limit = tolerance(subject.dtype, depth=subject.depth, condition=condition)
    source = describe(subject.dtype, depth=subject.depth, condition=condition)
    return Result("inverse", claim, distance(got, wanted), limit, source, skipped=hopeless(limit, condition)), got


def _what_it_does_instead(subject: Subject, module: nn.Module, x: Sequence[Tensor], y: Sequence[Tensor],
                          back: Sequence[Tensor]) -> str:
    """What ``back``, which inverse made of y, is in place of x."""
    close = 1e3 * tolerance(subject.dtype, depth=subject.depth)
    if not _finite(back):
        return "inverse gives values that are not finite"
    if not _deterministic(subject):
        return NOT_DETERMINISTIC
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


def _deterministic(subject: Subject) -> bool:
    """Whether forward, asked twice with the same random numbers and buffers, gives the same."""
    module = subject.fresh()
    without_dropout(module)
    first = subject.evaluated(module, subject.inputs)
    for buffer, before in zip(module.buffers(), subject.module.buffers(), strict=True):
        buffer.copy_(before)
    return distance(subject.evaluated(module, subject.inputs), first) <= tolerance(subject.dtype, depth=subject.depth)


def _where(x: Tensor, back: Tensor) -> str:
    """In which part of x, if that is a part along one dimension, else in how many of its entries."""
    wrong = (back - x).abs() > 1e-2 * (back - x).abs().max()
    for dim, size in enumerate(x.shape):
        at = wrong.movedim(dim, 0).flatten(1).any(1).nonzero().flatten().tolist()
        if size == 2 * len(at) and at in (list(range(len(at))), list(range(len(at), size))):
            return f", only in the {'first' if at[0] == 0 else 'second'} half along dimension {dim}"
        if 2 * len(at) < size:
            return f", only at {', '.join(map(str, at))} along dimension {dim}"
    return f", in {wrong.double().mean():.0%} of its entries"


def _but_right_elsewhere(subject: Subject, x: Sequence[Tensor], error: float) -> str:
    def right(module: nn.Module, inputs: Sequence[Tensor]) -> bool:
        without_dropout(module)
        try:
            back = subject.evaluated(module.inverse, subject.evaluated(module, inputs))
            limit = tolerance(subject.dtype, depth=subject.depth, condition=10)
            return distance(back, inputs) <= min(limit, error / 10)
        except Exception:
            return False
    other = "eval" if subject.module.training else "training"
    if right(subject.fresh().train(not subject.module.training), x):
        return f"; in {other} mode it is right"
    if right(subject.fresh(), [0.01 * value if value.is_floating_point() else value for value in x]):
        return "; for inputs a hundredth as large it is right"
    return ""


def _finite(values: Sequence[Tensor]) -> bool:
    return all(bool(value.isfinite().all()) for value in values)


def _kinds(values: Sequence[Tensor]) -> str:
    return ", ".join(f"{tuple(value.shape)} of {value.dtype} on {value.device}" for value in values)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _with(result: Result, explanation: str) -> Result:
    return replace(result, explanation=explanation)
