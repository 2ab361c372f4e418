"""The law of gradients: those of plain backpropagation, and those of finite differences in float64.

Plain backpropagation tells whether rebuilding activations changes a gradient; finite differences tell whether the plain
gradient is the derivative of ``forward`` at all, which matters for blocks with a backward pass of their own.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from memcnn.testing.laws.conditioning import condition_number
from memcnn.testing.laws.result import Report, Result
from memcnn.testing.laws.subject import NotRunnable, Subject
from memcnn.testing.tolerances import describe, tolerance

FLOOR = 1e-3
"""A gradient that cancels to zero is compared at this fraction of the largest one."""
STEPS = 1e-5, 1e-6, 1e-7
"""Of central differences, relative to the largest entry; they are extrapolated from a step and its half."""
DIFFERENCES_LIMIT = 1e-6
KINDS = "outputs", "gradients of inputs", "gradients of parameters"
DIFFERENCES = "gradients = finite differences in float64"
ROUGH = 1e-3
"""Finite differences that disagree with themselves by more than this decide nothing."""


@dataclass(frozen=True)
class Gradients:
    outputs: list[Tensor]
    by_name: dict[str, Tensor | None]


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
    results = _like_plain(subject)
    try:
        exact = subject.in_double()
    except NotRunnable as error:
        return Report((*results, Result("gradients", DIFFERENCES, skipped=f"in float64 {error}")))
    if subject.dtype != torch.float64:
        results += _like_plain(exact, " in float64")
    if finite_differences:
        results.append(_like_finite_differences(exact))
    return Report(tuple(results))


def _like_plain(subject: Subject, where: str = "") -> list[Result]:
    twin = subject.plain()
    if twin is None:
        return []
    claims = {kind: f"{kind} = plain backpropagation's{where}" for kind in KINDS}
    outputs_of, of_inputs, of_parameters = KINDS
    wanted = gradients_of(subject, twin)
    try:
        got = gradients_of(subject, subject.trained())
    except Exception as error:
        return [Result("gradients", claims[of_inputs], math.inf, 0.0,
                       explanation=f"the training step raised {type(error).__name__}: {error}")]
    condition = _condition(subject)
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
            results.append(Result("gradients", claims[kind], error, limit, source, explanation))
    return results


def gradients_of(subject: Subject, module: nn.Module) -> Gradients:
    """The outputs and gradients of one training step, by the names of inputs and parameters in ``subject.module``."""
    leaves = subject.leaves()
    for parameter in module.parameters():
        parameter.grad = None
    with subject.seeded():
        outputs = module(*leaves)
        outputs = list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
        subject.loss(outputs).backward()
    named = {name: x.grad for name, x in zip(subject.input_names, leaves, strict=True) if x.requires_grad}
    named |= {name: p.grad for name, p in zip(_parameter_names(subject), module.parameters(), strict=True)
              if p.requires_grad}
    return Gradients([y.detach() for y in outputs], named)


def _parameter_names(subject: Subject) -> list[str]:
    return [f"parameter {name}" for name, _ in subject.module.named_parameters()]


def _of_inputs(gradients: Gradients) -> dict[str, Tensor | None]:
    return {name: g for name, g in gradients.by_name.items() if not name.startswith("parameter ")}


def _of_parameters(gradients: Gradients) -> dict[str, Tensor | None]:
    return {name: g for name, g in gradients.by_name.items() if name.startswith("parameter ")}


def _condition(subject: Subject) -> float:
    """Of the inverse, by which a wrapped block rebuilds what its gradients are made of."""
    module = subject.fresh()
    try:
        with torch.no_grad():
            return condition_number(subject, module.inverse, subject.evaluated(module, subject.inputs))
    except Exception:  # an inverse that does not run is for the law of inversion to tell
        return 1.0


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


def _like_finite_differences(subject: Subject) -> Result:
    module = subject.trained()
    buffers = [(b, b.clone()) for b in module.buffers()]

    @torch.no_grad()
    def loss(values: Sequence[Tensor]) -> float:
        for buffer, before in buffers:
            buffer.copy_(before)
        return subject.loss(subject.evaluated(module, values)).item()

    try:
        found = gradients_of(subject, module).by_name
    except Exception as error:
        return Result("gradients", DIFFERENCES, math.inf, 0.0,
                      explanation=f"the training step raised {type(error).__name__}: {error}")
    inputs = [x.detach().clone() for x in subject.inputs]
    tensors = dict(zip(subject.input_names, inputs, strict=True))
    tensors |= dict(zip(_parameter_names(subject), (p.detach() for p in module.parameters()), strict=True))
    tensors = {name: tensors[name] for name in found}
    scale = FLOOR * max((g.norm().item() for g in found.values() if g is not None), default=0.0)
    worst, told, rough = 0.0, "", 0.0
    generator = torch.Generator().manual_seed(subject.seed)
    for name, tensor in tensors.items():
        gradient = torch.zeros_like(tensor) if found[name] is None else found[name]
        signs = torch.randint(2, tensor.shape, generator=generator).to(tensor) * 2 - 1
        along = [gradient / gradient.abs().max()] if gradient.any() else []
        for direction in [signs, *along]:
            slope, doubt = _slope(lambda: loss(inputs), tensor, direction)  # noqa: B023
            size = max(gradient.norm().item(), scale, abs(slope) / max(1.0, direction.norm().item()))
            predicted = (gradient * direction).sum().item()
            # along itself a gradient g has the slope |g|^2 / max|g|, far more than |g|
            size = max(size, abs(predicted)) or 1.0
            error, doubt = abs(predicted - slope) / size, doubt / size
            rough = max(rough, doubt)
            if error - 2 * doubt > worst:
                worst = error
                told = _told_of_slope(name, found[name], predicted, slope)
    if rough > ROUGH:
        return Result("gradients", DIFFERENCES, skipped="the loss is too rough here: finite differences of two steps "
                                                        f"differ by {rough:.1g}")
    limit = max(DIFFERENCES_LIMIT, 2 * rough)
    source = f"central differences at a step and its half, which agree to {rough:.1e}"
    return Result("gradients", DIFFERENCES, worst, limit, source, told if worst > limit else "")


def _slope(loss: Callable[[], float], tensor: Tensor, direction: Tensor) -> tuple[float, float]:
    """The derivative of ``loss()`` as ``tensor`` moves along ``direction``, and by how much two steps disagree.

    Where they disagree, as where a ReLU has its kink between them, shorter steps are tried.
    """
    start = tensor.clone()

    def difference(h: float) -> float:
        tensor.copy_(start + h * direction)
        ahead = loss()
        tensor.copy_(start - h * direction)
        behind = loss()
        tensor.copy_(start)
        return (ahead - behind) / (2 * h)

    best = math.nan, math.inf
    for step in STEPS:
        h = step * max(1.0, start.abs().max().item())
        coarse, fine = difference(h), difference(h / 2)
        best = min(best, ((4 * fine - coarse) / 3, abs(fine - coarse)), key=lambda found: found[1])
        if best[1] <= DIFFERENCES_LIMIT * abs(best[0]) / 10:
            break
    return best


def _told_of_slope(name: str, gradient: Tensor | None, predicted: float, slope: float) -> str:
    what = f"the gradient of {name.removeprefix('parameter ')}"
    if gradient is None or not gradient.any():
        return f"{what} is {'missing' if gradient is None else 'zero'}, but the loss depends on it"
    if slope and abs(predicted / slope - 1) < 10:
        return f"{what} says {predicted:.4g} where finite differences give {slope:.4g}: {predicted / slope:.4g} times"
    return f"{what} says {predicted:.4g} where finite differences give {slope:.4g}"
