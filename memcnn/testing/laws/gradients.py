"""The law of gradients: they equal those of plain backpropagation, and finite differences in float64.

Plain backpropagation shows whether rebuilding activations changes a gradient. Finite differences show whether the plain
gradient is the derivative of ``forward`` at all, which matters for blocks with a backward pass of their own.
"""

import math
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor, nn

from memcnn.testing.laws.differences import (
    DIFFERENCES,
    like_finite_differences,
    like_finite_differences_through_inverse,
    like_finite_differences_when_mirrored,
    like_finite_differences_when_moved,
)
from memcnn.testing.laws.guard import described, guarded
from memcnn.testing.laws.hints import but_right_without
from memcnn.testing.laws.limits import Limit
from memcnn.testing.laws.moved import WHEN_MIRRORED, hides_a_sign
from memcnn.testing.laws.passes import second_step_is_plain
from memcnn.testing.laws.precision import stay_in_float64
from memcnn.testing.laws.result import NEEDS_NO_INVERSE, Report, Result
from memcnn.testing.laws.rounding import condition_numbers, named
from memcnn.testing.laws.second import LIKE_DIFFERENCES, LIKE_PLAIN, like_differences, like_plain
from memcnn.testing.laws.settled import settled
from memcnn.testing.laws.stored import excused
from memcnn.testing.laws.subject import NotRunnable, Subject
from memcnn.testing.laws.subsets import (
    gradients_for_other_strides,
    gradients_with_frozen_parameters,
    gradients_without_inputs,
)
from memcnn.testing.laws.twin import NamedTensors, Outcome, is_dense, is_wrapped, relative_errors, worst
from memcnn.testing.tolerances import distance, tolerance

THROUGH_INVERSE = "gradients through inverse = finite differences in float64"
IN_FLOAT64 = "backward computes in float64 where forward does"
SUBSETS = {
    "parameters get gradients where no input requires one": gradients_without_inputs,
    "a frozen parameter changes no other gradient": gradients_with_frozen_parameters,
    "gradients of outputs may have any strides": gradients_for_other_strides,
    LIKE_PLAIN: like_plain,
}
COMPARED = "outputs", "gradients of inputs", "gradients of parameters"


def check_gradients(
    module: nn.Module,
    *inputs: Tensor,
    seed: int = 0,
    wrap: bool | None = None,
    finite_differences: bool = True,
    autocast: torch.dtype | None = None,
    through_inverse: bool = True,
) -> Report:
    """Check that a training step has the gradients of plain backpropagation, for the inputs and every parameter.

    Runs on copies, with the same random numbers at every evaluation, so that dropout is compared mask for mask. The
    limit grows with depth (`memcnn.testing.laws.limits.Limit`). A training step passes each block twice, so the depth
    is twice the number of blocks. To check training through the inverse, check `memcnn.testing.adapters.Inverted`.

    Args:
        module: a module with ``forward`` and ``inverse``.
        inputs: the arguments of ``forward``, of any shapes and strides.
        seed: seed of torch's generators at every evaluation.
        wrap: run it in an ``InvertibleModuleWrapper``; None: if nothing in it is wrapped yet. False for a module with
            an engine of its own, which is compared with finite differences alone.
        finite_differences: False for a module whose gradient is no derivative by design (spectral norm, a
            straight-through estimator).
        autocast: run forward under autocast to this dtype. Then plain backpropagation is the only reference.
        through_inverse: False for a module whose inverse is not meant to be differentiated, as a bisection under
            ``torch.no_grad()``. Backward needs no gradient through the inverse; training on the inverse's results does.
    """
    subject = settled(Subject(module, inputs, seed, wrap, autocast))
    subject.refuse_shared_parameters()
    results = _results(subject, finite_differences, through_inverse)
    if any(result.failed for result in results) and (wrap is not False or is_wrapped(module)):
        with suppress(Exception):
            others = _results(replace(subject, keep_input=True), finite_differences, through_inverse)
            right = {result.claim for result in others if result.verdict == "PASS"}
            results = [
                replace(r, explanation=f"{r.explanation}; {NEEDS_NO_INVERSE}") if r.failed and r.claim in right else r
                for r in results
            ]
    return Report(tuple(results))


def _results(subject: Subject, finite_differences: bool, through_inverse: bool) -> list[Result]:
    """Return the results of all claims of the law of gradients."""
    results = [*_like_plain(subject), *second_step_is_plain(subject), *_added(subject)]
    subsets = [guarded("gradients", claim, check, subject, claim) for claim, check in SUBSETS.items()]
    if subject.autocast:
        return [*results, *_applicable(subsets)]
    try:
        exact = settled(subject.in_double())
    except NotRunnable as error:
        return [*results, Result("gradients", DIFFERENCES, skipped=f"in float64 {error}"), *_applicable(subsets)]
    if subject.dtype != torch.float64:
        results += excused(_like_plain(exact, " in float64"), exact)
    if finite_differences:
        results += _like_differences(exact)
        if through_inverse:
            results.append(
                guarded("gradients", THROUGH_INVERSE, like_finite_differences_through_inverse, exact, THROUGH_INVERSE)
            )
    results.append(guarded("gradients", IN_FLOAT64, stay_in_float64, exact, IN_FLOAT64, finite_differences))
    return [*results, *_applicable(subsets)]


def _like_differences(subject: Subject) -> list[Result]:
    """Compare first and second derivatives with finite differences, the first also with moved parameters."""
    results = [like_finite_differences(subject)]
    if results[0].verdict == "PASS":
        if any(p.requires_grad for p in subject.module.parameters()):
            results.append(like_finite_differences_when_moved(subject))
            if hides_a_sign(subject.module) and results[-1].verdict == "PASS":
                claim = DIFFERENCES + WHEN_MIRRORED
                results.append(guarded("gradients", claim, like_finite_differences_when_mirrored, subject))
        second = guarded("gradients", LIKE_DIFFERENCES, like_differences, subject, LIKE_DIFFERENCES)
        results += _applicable([second])
    return results


def _applicable(results: Iterable[Result | None]) -> list[Result]:
    """Return the results of the checks that apply to the module. The others returned None."""
    return [result for result in results if result is not None]


def _like_plain(subject: Subject, where: str = "", *, explain: bool = True) -> list[Result]:
    """Compare a training step with that of the plain twin."""
    twin = subject.plain()
    if twin is None:
        return []
    claims = {kind: f"{kind} = plain backpropagation's{where}" for kind in COMPARED}
    which = "plain backpropagation"
    try:
        wanted = subject.run(twin)
        which = "the training step"
        got = subject.ordinary
    except Exception as exception:
        return [
            Result(
                "gradients",
                claims["gradients of inputs"],
                math.inf,
                0.0,
                explanation=f"{which} raised {described(exception)}",
            )
        ]
    if not wanted.is_finite:
        return [
            Result(
                "gradients",
                claims["gradients of inputs"],
                skipped="plain backpropagation gives values that are not finite here",
            )
        ]
    limit = Limit(
        subject.dtype, 2 * subject.depth, subject.autocast, condition_numbers(subject, _of_training, _of_plain_training)
    )
    gradient_errors = relative_errors(got.gradients, wanted.gradients)
    output_errors = relative_errors(_numbered(got), _numbered(wanted))
    results = []
    for kind, names, errors, actual, expected in (
        (COMPARED[0], output_errors, output_errors, _numbered(got), _numbered(wanted)),
        (COMPARED[1], wanted.input_gradients, gradient_errors, got.gradients, wanted.gradients),
        (COMPARED[2], wanted.parameter_gradients, gradient_errors, got.gradients, wanted.gradients),
    ):
        if names:
            name, error = worst({name: errors[name] for name in names})
            explanation = _explain(_readable(name, kind, subject), actual[name], expected[name])
            if kind == COMPARED[0] and error > tolerance(subject.dtype) and _is_right_before_backward(subject, wanted):
                explanation = f"{name} is right after forward, but backward overwrites it"
            results.append(limit.judge("gradients", claims[kind], error, explanation))
    if explain and any(result.failed for result in results):
        hint = but_right_without(subject, lambda other: not any(r.failed for r in _like_plain(other, explain=False)))
        results = [replace(r, explanation=r.explanation + hint) if r.failed else r for r in results]
    return results


def _is_right_before_backward(subject: Subject, wanted: Outcome) -> bool:
    """Return whether a forward pass alone gives the outputs that are wanted."""
    outputs = [y.detach() for y in subject.evaluated(subject.trained(), subject.inputs)]
    return distance(outputs, wanted.results) <= tolerance(subject.dtype, depth=2 * subject.depth)


def _of_training(subject: Subject) -> NamedTensors:
    return named(subject.run(subject.trained()))


def _of_plain_training(subject: Subject) -> NamedTensors:
    return named(subject.run(subject.twin()))


def _numbered(outcome: Outcome) -> NamedTensors:
    return {f"output {i}": y for i, y in enumerate(outcome.results)}


def _readable(name: str, kind: str, subject: Subject) -> str:
    if kind == "outputs":
        return name
    return f"the gradient of {subject.input_names[int(name.split()[1])] if kind == 'gradients of inputs' else name}"


def _added(subject: Subject) -> list[Result]:
    """Check that a step adds its gradients to those of an earlier one, as accumulation over batches needs."""

    def onto_ones(module: nn.Module, *inputs: Tensor) -> tuple[Tensor, ...]:
        for tensor in (*inputs, *module.parameters()):
            if tensor.requires_grad and tensor.is_leaf:
                tensor.grad = torch.ones_like(tensor)
        return subject.step(module, *inputs)

    try:
        wanted = subject.ordinary.gradients
        got = subject.run(subject.trained(), onto_ones).gradients
    except Exception:  # another claim reports a step that does not run
        return []
    leaves = {f"input {i}" for i, x in enumerate(subject.inputs) if is_dense(x)}
    ones_more = {
        name: gradient + 1
        for name, gradient in wanted.items()
        if gradient is not None and gradient.isfinite().all() and (name in leaves or not name.startswith("input "))
    }
    errors = {
        name: math.inf if (found := got[name]) is None else distance([found], [gradient])
        for name, gradient in ones_more.items()
    }
    name, error = worst(errors)
    shown = subject.input_names[int(name.split()[1])] if name.startswith("input ") else name
    limit = Limit(
        subject.dtype, subject.depth, subject.autocast, condition_numbers(subject, _of_training, _of_plain_training)
    )
    return [
        limit.judge(
            "gradients",
            "gradients are added to earlier ones",
            error,
            f"the gradient of {shown} is not added to the one that is there",
        )
    ]


def _explain(what: str, got: Tensor | None, wanted: Tensor | None) -> str:
    """Explain what is wrong with one gradient or output."""
    if got is None or wanted is None:
        return f"{what} is missing" if got is None else f"{what} should be None, and is not"
    if got.shape != wanted.shape or got.dtype != wanted.dtype:
        return f"{what}: got {tuple(got.shape)} of {got.dtype}, wanted {tuple(wanted.shape)} of {wanted.dtype}"
    got, wanted = got.double(), wanted.double()
    if not got.isfinite().all():
        return f"{what} is not finite"
    if not got.any():
        return f"{what} is zero"
    ratio = ((got * wanted).sum() / (wanted * wanted).sum()).item()
    rest = ((got - ratio * wanted).norm() / got.norm()).item()
    if rest < 0.05 and abs(ratio - 1) > max(4 * rest, 5e-4):  # a smaller one would be shown as 1
        return f"{what} is {ratio:.4g} times what it should be"
    off = ((got - wanted).norm() / wanted.norm()).item()
    return f"{what} is {off:.2g} off, relative to its norm, and in no constant ratio"
