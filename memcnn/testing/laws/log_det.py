"""The law of the log-determinant: a flow reports log|det| of its Jacobian; those of its two directions sum to 0."""

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from memcnn.models.revop import InvertibleModuleWrapper, ReversibleSequential
from memcnn.testing.adapters import inverse_of
from memcnn.testing.laws.differences import as_of_the_block, like_finite_differences_when_moved
from memcnn.testing.laws.guard import guarded
from memcnn.testing.laws.jacobians import LARGEST_SAMPLE, gradients_of_each
from memcnn.testing.laws.limits import Limit
from memcnn.testing.laws.moved import WHEN_MIRRORED, WHEN_MOVED, hides_a_sign, mirrored, moved
from memcnn.testing.laws.result import Report, Result, is_small, of_float64_alone
from memcnn.testing.laws.rounding import condition_numbers
from memcnn.testing.laws.settled import settled
from memcnn.testing.laws.signs import is_undone
from memcnn.testing.laws.stored import excused
from memcnn.testing.laws.subject import Refused, Subject, sample_by_sample, without_dropout
from memcnn.testing.laws.twin import is_finite, relative_errors, worst
from memcnn.testing.tolerances import distance, tolerance

FAR_OFF = 1e-2
"""If the relative error of the inverse is larger than this, its log-determinant belongs to another point.

It is then not compared. The law of inversion reports the error."""
METHODS = "forward_log_det", "inverse_log_det"


def check_log_det(
    module: nn.Module,
    *inputs: Tensor,
    seed: int = 0,
    finite_differences: bool = True,
    through_inverse: bool = True,
) -> Report:
    """Check that ``forward_log_det`` and ``inverse_log_det`` report log|det| of the Jacobian, in float64.

    Each sample's value is compared with that of its own Jacobian, with batch normalisation in eval mode. Where samples
    mix, no sample has a Jacobian of its own: then the sum is compared with the Jacobian of the batch. In the inputs'
    dtype, values must equal those of ``forward`` and ``inverse``, and the log-determinants of the two directions must
    cancel. Dropout is off. The error of a log-determinant is absolute where the true one is below 1. Computing the
    determinant of the dense Jacobian loses digits, so the limit grows with the Jacobian's condition number.

    Args:
        module: a module whose ``forward_log_det(x)`` returns y and (N,) values. If it has ``inverse_log_det(y)``, this
            returns x and (N,) values.
        inputs: one tensor (N, ...) of at most 1024 entries a sample.
        seed: seed of torch's generators at every evaluation.
        finite_differences: whether to check the gradients of log-determinants, too; see `check_gradients`.
        through_inverse: whether to check the gradients of ``inverse_log_det``; see `check_gradients`.
    """
    subject = Subject(module, inputs, seed)
    if not has_log_det(module):
        raise Refused(
            f"the module must have forward_log_det(x), giving y and a log-determinant for each sample: "
            f"{type(module).__name__} has none"
        )
    x, *others = inputs
    if others or not x.numel() or x[0].numel() > LARGEST_SAMPLE:
        reason = f"wants one input of at most {LARGEST_SAMPLE} entries a sample"
        return Report((Result("log_det", "forward_log_det", skipped=reason),))
    methods = [name for name in METHODS if has_log_det(module, name)]
    exact = subject.in_double()
    results = [
        _larger_when_moved(
            _guarded(_of_jacobian(method), _like_jacobian, exact, method, sample_by_sample), exact, method
        )
        for method in methods
    ]
    if module.training:
        results += [
            _guarded(f"{method} sums to log|det| of the batch's Jacobian", _like_jacobian_of_batch, exact, method)
            for method in methods
        ]
    results.append(
        _guarded("forward_log_det agrees with forward and inverse", _consistent, subject.initialised(), methods)
    )
    differentiated = methods if through_inverse else METHODS[:1]
    for method in differentiated if finite_differences else ():
        results.append(_guarded(f"gradients of {method} = finite differences in float64", _gradients, exact, method))
    if any(p.requires_grad for p in module.parameters()) and not any(result and result.failed for result in results):
        after = moved(exact)
        results += [
            _guarded(_of_jacobian(method) + WHEN_MOVED, _like_jacobian, after, method, sample_by_sample)
            for method in methods
        ]
        if hides_a_sign(module):
            results += _with_mirrored_parameters(exact, methods)
    return Report(tuple(excused((result for result in results if result is not None), exact)))


def has_log_det(module: nn.Module, method: str = "forward_log_det") -> bool:
    """Return whether the module, or what is wrapped in it, has the method."""
    if isinstance(module, InvertibleModuleWrapper):
        return has_log_det(module._fn, method)
    if isinstance(module, ReversibleSequential):
        return all(has_log_det(part, method) for part in module)
    return callable(getattr(module, method, None))


def _of_jacobian(method: str) -> str:
    return f"{method} is log|det| of the Jacobian"


def _larger_when_moved(result: Result | None, subject: Subject, method: str) -> Result | None:
    """If a failure is too small for float32 to show, check again after an optimiser step.

    If it is large there, return the failure with that error in its explanation.

    A factor that is wrong hardly shows where the log-determinant that it multiplies starts near zero.
    """
    if result is None or not result.failed or not is_small(result.explanation):
        return result
    with suppress(Exception):
        moved_result = _like_jacobian(_of_jacobian(method), moved(subject), method, sample_by_sample)
        if moved_result.failed and not is_small(moved_result.explanation):
            words = f"after an optimiser step {moved_result.explanation}; with the parameters as they start it is"
            return replace(result, explanation=f"{words} {result.error:.1g} off")
    return result


def _with_mirrored_parameters(subject: Subject, methods: list[str]) -> list[Result | None]:
    """Check log-determinants with negated parameters. Check none if the inverse is then not right."""
    try:
        after = settled(mirrored(subject))
    except Exception:  # forward does not run there
        return []
    if not is_undone(after):
        return []
    found = []
    for method in methods:
        claim = _of_jacobian(method) + WHEN_MIRRORED
        result = _guarded(claim, _like_jacobian, after, method, sample_by_sample)
        if result is not None and result.failed:
            result = replace(result, explanation=f"with parameters of the other sign {result.explanation}")
        found.append(result)
    return found


class _Reported(nn.Module):
    """x -> (y, log-determinant) of one method; it has no inverse of its own."""

    def __init__(self, module: nn.Module, method: str):
        super().__init__()
        self.module, self.method = module, method

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return getattr(self.module, self.method)(x)

    def inverse(self, y: Tensor, log_det: Tensor) -> Tensor:
        raise NotImplementedError


def _gradients(claim: str, subject: Subject, method: str) -> Result:
    """Compare gradients with finite differences, for a loss made of values and log-determinants."""
    values = _start(subject, method, without_dropout)
    flow = _Reported(_prepared(subject, without_dropout, plain=True), method)
    when = "for a loss of values and log-determinants, "
    result = like_finite_differences_when_moved(Subject(flow, (values,), subject.seed, wrap=False), claim, when=when)
    return replace(as_of_the_block(result), law="log_det")


def _guarded(claim: str, check: Callable[..., Result | None], *arguments: object) -> Result | None:
    return guarded("log_det", claim, check, claim, *arguments)


def _like_jacobian(claim: str, subject: Subject, method: str, prepare: Callable[[nn.Module], object]) -> Result:
    """Compare with the Jacobian of each sample, or of the batch where samples mix."""
    values = _start(subject, method, prepare)
    reported = _reported(subject, method, values, prepare)
    mixed = _mixes_samples(subject, method, values, prepare)
    if reported.shape != values.shape[:1] and not mixed:
        return Result(
            "log_det",
            claim,
            math.inf,
            0.0,
            explanation=f"{method} returns log-determinants of shape {tuple(reported.shape)}, wanted one value a "
            f"sample: ({values.shape[0]},)",
        )
    if mixed:
        return _of_batch(claim, subject, method, values, prepare)
    jacobians = _jacobians_of_samples(subject, method, values, prepare)
    if method == METHODS[1] and not torch.linalg.cond(jacobians).isfinite().all():
        # a bisection under no_grad has no derivative: that of forward is the inverse of what it should be
        (x,) = subject.evaluated(inverse_of(_prepared(subject, prepare)), [values])
        jacobians = torch.linalg.inv(_jacobians_of_samples(subject, METHODS[0], x.detach(), prepare))
    return _compared(claim, subject, method, reported, jacobians)


def _like_jacobian_of_batch(claim: str, subject: Subject, method: str) -> Result | None:
    """Compare the sum with the Jacobian of the batch, in the module's own mode; None where samples do not mix."""
    values = _start(subject, method, without_dropout)
    if not _mixes_samples(subject, method, values, without_dropout):
        return None
    return _of_batch(claim, subject, method, values, without_dropout)


def _of_batch(claim: str, subject: Subject, method: str, values: Tensor, prepare: Callable) -> Result:
    """Compare the sum of the log-determinants with log|det| of the Jacobian of the batch."""
    if values.numel() > LARGEST_SAMPLE:
        return Result("log_det", claim, skipped=f"samples mix, and the batch has more than {LARGEST_SAMPLE} entries")
    reported = _reported(subject, method, values, prepare).sum()[None]
    module, x = _prepared(subject, prepare, plain=True), values.detach().clone().requires_grad_()
    with subject.seeded():
        y = getattr(module, method)(x)[0].flatten()
    rows = gradients_of_each(y, x, batched=subject.plain() is not None).flatten(1)
    return _compared(claim, subject, method, reported, rows[None])


def _compared(claim: str, subject: Subject, method: str, reported: Tensor, jacobians: Tensor) -> Result:
    """Return the result for reported log-determinants and the Jacobians, of shape (N, D, D)."""
    wanted, reported = torch.linalg.slogdet(jacobians).logabsdet.cpu(), reported.cpu().double()
    error = ((reported - wanted).abs().max() / max(1.0, wanted.abs().max().item())).item()
    # a generator: the condition number is computed only if the limit needs it
    conditions = (torch.linalg.cond(matrices).max().item() for matrices in [jacobians])
    limit = Limit(torch.float64, subject.depth, conditions=conditions)
    return limit.judge("log_det", claim, error, _explain(method, reported, wanted, error))


def _explain(method: str, reported: Tensor, wanted: Tensor, error: float) -> str:
    """Explain the error: a small one of float64 alone, a reversed sign, or a factor."""
    said = f"{method} says {_numbers(reported)}, the Jacobian {_numbers(wanted)}"
    if not wanted.any():
        return said
    if error <= tolerance(torch.float32):
        return f"{method} is {error:.1g} off in float64, {of_float64_alone(error)}"
    largest = wanted.abs().max()
    if (reported + wanted).abs().max() < 1e-6 * largest:
        return f"{said}: the sign is reversed"
    ratio = ((reported * wanted).sum() / wanted.square().sum()).item()
    return f"{said}: {ratio:.4g} times as much" if (reported - ratio * wanted).abs().max() < 1e-6 * largest else said


def _consistent(claim: str, subject: Subject, methods: list[str]) -> Result:
    """Compare values with those of forward and inverse, and the log-determinants of both directions."""
    entries = subject.inputs[0][0].numel()
    mixed = _mixes_samples(subject, "forward_log_det", subject.inputs[0], without_dropout)

    def compute(subject: Subject) -> dict[str, Tensor]:
        run = partial(_with_log_det, subject)
        y, log_det = run("forward_log_det", *subject.inputs)
        if "inverse_log_det" not in methods:
            return {"y": y}
        x, back = run("inverse_log_det", y)
        if distance([x], subject.inputs) > FAR_OFF:
            return {"y": y, "x": x}
        if mixed or log_det.shape != back.shape:  # the samples' shares mean nothing
            log_det, back = log_det.sum()[None], back.sum()[None]
        # absolute errors where all log-determinants are below 1 an entry
        return {"y": y, "x": x, "sum": (log_det + back) / max(entries, log_det.abs().max().item())}

    got, wanted = compute(subject), {}
    (wanted["y"],) = subject.evaluated(_prepared(subject, without_dropout), subject.inputs)
    if "x" in got:
        (wanted["x"],) = subject.evaluated(inverse_of(_prepared(subject, without_dropout)), [got["y"]])
        if distance([wanted["x"]], subject.inputs) > FAR_OFF:
            del wanted["x"]
    if "sum" in got:
        wanted["sum"] = torch.zeros_like(got["sum"])
    if not is_finite(wanted.values()):
        return Result("log_det", claim, skipped="values are not finite here")
    errors = relative_errors(got, wanted)
    if "sum" in got:
        errors["sum"] = got["sum"].abs().max().item()
    name, error = worst(errors)
    explanation = {
        "y": "forward_log_det gives other values than forward",
        "x": "inverse_log_det gives other values than inverse",
        "sum": "the log-determinants of the two directions do not cancel",
    }[name]
    limit = Limit(subject.dtype, 2 * subject.depth, conditions=condition_numbers(subject, compute))
    return limit.judge("log_det", claim, error, explanation)


@torch.no_grad()
def _with_log_det(subject: Subject, method: str, values: Tensor) -> tuple[Tensor, Tensor]:
    y, log_det = subject.evaluated(getattr(_prepared(subject, without_dropout), method), [values])
    return y, log_det


def _prepared(subject: Subject, prepare: Callable[[nn.Module], object], *, plain: bool = False) -> nn.Module:
    """Return a copy of the module that ``prepare`` has changed; with ``plain``, of its plain twin."""
    module = (plain and subject.plain()) or subject.fresh()
    prepare(module)
    return module


@torch.no_grad()
def _start(subject: Subject, method: str, prepare: Callable[[nn.Module], object]) -> Tensor:
    """Return the values to which ``method`` is applied: the input, or an output."""
    if method == "forward_log_det":
        return subject.inputs[0]
    (y,) = subject.evaluated(_prepared(subject, prepare), subject.inputs)
    return y


@torch.no_grad()
def _reported(subject: Subject, method: str, values: Tensor, prepare: Callable[[nn.Module], object]) -> Tensor:
    with subject.seeded():
        return getattr(_prepared(subject, prepare), method)(values)[1]


def _mixes_samples(subject: Subject, method: str, values: Tensor, prepare: Callable[[nn.Module], object]) -> bool:
    """Return whether the result for the first sample depends on another one."""
    module, x = _prepared(subject, prepare, plain=True), values.detach().clone().requires_grad_()
    with subject.seeded():
        y = getattr(module, method)(x)[0]
    (gradient,) = torch.autograd.grad(subject.loss([y[0]]), x)
    return bool(gradient[1:].any())


def _jacobians_of_samples(subject: Subject, method: str, values: Tensor, prepare: Callable) -> Tensor:
    """Return (N, D, D), by plain backpropagation of one output entry of all samples at a time."""
    module, x = _prepared(subject, prepare, plain=True), values.detach().clone().requires_grad_()
    with subject.seeded():
        y = getattr(module, method)(x)[0].flatten(1)
    if y.shape != x.flatten(1).shape:
        raise ValueError(f"an output of {y.shape[1]} entries a sample for an input of {x[0].numel()}")
    return gradients_of_each(y.sum(0), x, batched=subject.plain() is not None).flatten(2).movedim(0, 1)


def _numbers(values: Tensor) -> str:
    return ", ".join(f"{value:.6g}" for value in values[:3].tolist()) + (", ..." if len(values) > 3 else "")
