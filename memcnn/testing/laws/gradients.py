"""The law of gradients: those of plain backpropagation, and those of finite differences in float64.

Plain backpropagation tells whether rebuilding activations changes a gradient; finite differences tell whether the plain
gradient is the derivative of ``forward`` at all, which matters for blocks with a backward pass of their own.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from memcnn.testing.laws.conditioning import hopeless, inverse_condition_number
from memcnn.testing.laws.differences import DIFFERENCES, like_finite_differences
from memcnn.testing.laws.result import Report, Result
from memcnn.testing.laws.step import FLOOR, Gradients, but_right_without, gradients_of
from memcnn.testing.laws.subject import NotRunnable, Subject
from memcnn.testing.tolerances import describe, distance, tolerance

KINDS = "outputs", "gradients of inputs", "gradients of parameters"


def check_gradients(module: nn.Module, *inputs: Tensor, seed: int = 0, wrap: bool | None = None,
                    finite_differences: bool = True) -> Report:
    """Whether a training step has the gradients of plain backpropagation, for the inputs and every parameter.

    Runs on copies, with the same random numbers at every evaluation, so that dropout is compared mask for mask.

    Args:
        module: with ``forward`` and ``inverse``.
        inputs: what ``forward`` takes.
        seed: of torch's generators at every evaluation.
        wrap: run it in an ``InvertibleModuleWrapper``; None: if nothing in it is wrapped yet. False for a module with
            an engine of its own, which is compared with finite differences alone.
        finite_differences: False for a module whose gradient is no derivative by design (spectral norm, a
            straight-through estimator).
    """
    subject = Subject(module, inputs, seed, wrap)
    results = [*_like_plain(subject), *_added(subject)]
    try:
        exact = subject.in_double()
    except NotRunnable as error:
        return Report((*results, Result("gradients", DIFFERENCES, skipped=f"in float64 {error}")))
    if subject.dtype != torch.float64:
        results += _like_plain(exact, " in float64")
    if finite_differences:
        results.append(like_finite_differences(exact))
    return Report(tuple(results))


def _like_plain(subject: Subject, where: str = "", *, explain: bool = True) -> list[Result]:
    twin = subject.plain()
    if twin is None:
        return []
    claims = {kind: f"{kind} = plain backpropagation's{where}" for kind in KINDS}
    outputs_of, of_inputs, of_parameters = KINDS
    which = "plain backpropagation"
    try:
        wanted = gradients_of(subject, twin)
        which = "the training step"
        got = gradients_of(subject, subject.trained())
    except Exception as error:
        return [Result("gradients", claims[of_inputs], math.inf, 0.0,
                       explanation=f"{which} raised {type(error).__name__}: {error}")]
    condition = inverse_condition_number(subject)
    scale = {"depth": 2 * subject.depth, "condition": condition}
    limit, source = tolerance(subject.dtype, **scale), describe(subject.dtype, **scale)
    outputs = {f"output {i}": y for i, y in enumerate(wanted.outputs)}
    pairs = {outputs_of: (dict(zip(outputs, got.outputs, strict=True)), outputs),
             of_inputs: (_of_inputs(got), _of_inputs(wanted)),
             of_parameters: (_of_parameters(got), _of_parameters(wanted))}
    largest = max((g.abs().max().item() for g in wanted.by_name.values() if g is not None and g.numel()), default=0.0)
    results = []
    for kind, (actual, expected) in pairs.items():
        if expected:
            least = FLOOR * largest if kind != outputs_of else 0.0
            name, error = _worst(actual, expected, least)
            explanation = "" if error <= limit else _told(name, actual[name], expected[name])
            results.append(Result("gradients", claims[kind], error, limit, source, explanation,
                                  hopeless(limit, condition)))
    if explain and any(result.failed for result in results):
        hint = but_right_without(subject, lambda other: not any(r.failed for r in _like_plain(other, explain=False)))
        results = [replace(r, explanation=r.explanation + hint) if r.failed else r for r in results]
    return results


def _added(subject: Subject) -> list[Result]:
    """Whether a step adds its gradients to those of an earlier one, as accumulation over batches needs it."""
    try:
        wanted = gradients_of(subject, subject.trained()).by_name
        got = gradients_of(subject, subject.trained(), start=1.0).by_name
    except Exception:  # another claim tells of a step that does not run
        return []
    names = [name for name, gradient in wanted.items() if gradient is not None and gradient.isfinite().all()]
    errors = {name: distance([got[name]], [wanted[name] + 1]) for name in names}
    name, error = max(errors.items(), key=lambda item: item[1], default=("", 0.0))
    limit = tolerance(subject.dtype, depth=subject.depth)
    explanation = f"the gradient of {name.removeprefix('parameter ')} is not added to the one that is there"
    return [Result("gradients", "gradients are added to earlier ones", error, limit,
                   describe(subject.dtype, depth=subject.depth), explanation if error > limit else "")]


def _of_inputs(gradients: Gradients) -> dict[str, Tensor | None]:
    return {name: g for name, g in gradients.by_name.items() if not name.startswith("parameter ")}


def _of_parameters(gradients: Gradients) -> dict[str, Tensor | None]:
    return {name: g for name, g in gradients.by_name.items() if name.startswith("parameter ")}


def _worst(actual: dict[str, Tensor | None], expected: dict[str, Tensor | None], least: float) -> tuple[str, float]:
    errors = {name: _error(actual[name], wanted, least) for name, wanted in expected.items()}
    return max(errors.items(), key=lambda item: math.inf if math.isnan(item[1]) else item[1])


def _error(got: Tensor | None, wanted: Tensor | None, least: float) -> float:
    if got is None or wanted is None:
        return 0.0 if got is wanted else math.inf
    if got.shape != wanted.shape or got.dtype != wanted.dtype:
        return math.inf
    difference = (got - wanted).abs().max().item() if got.numel() else 0.0
    return difference and difference / max(wanted.abs().max().item(), least, torch.finfo(got.dtype).tiny)


def _told(name: str, got: Tensor | None, wanted: Tensor | None) -> str:
    """What is wrong with one gradient, in words."""
    what = name if name.startswith("output") else f"the gradient of {name.removeprefix('parameter ')}"
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
    if rest < 0.05 and abs(ratio - 1) > 4 * rest:
        return f"{what} is {ratio:.4g} times what it should be"
    off = ((got - wanted).norm() / wanted.norm()).item()
    return f"{what} is {off:.2g} off, relative to its norm, and in no constant ratio"
