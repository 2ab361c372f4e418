"""Claims of the law of gradients: which tensors require one changes no other, and second derivatives are right."""

import math
import warnings

import torch
from torch import Tensor, nn

from memcnn.testing.laws.guard import described, is_ours
from memcnn.testing.laws.limits import Limit
from memcnn.testing.laws.result import Result
from memcnn.testing.laws.rounding import condition_numbers, named
from memcnn.testing.laws.subject import Subject
from memcnn.testing.laws.twin import NamedTensors, is_finite, relative_errors, run, worst

REENTRANT = "None of the inputs have requires_grad=True"
NO_PARAMETERS = "no parameter requires a gradient"


def gradients_without_inputs(subject: Subject, claim: str) -> Result:
    """Compare the parameters' gradients with those of a step in which the inputs require gradients."""
    if not any(p.requires_grad for p in subject.module.parameters()):
        return Result("gradients", claim, skipped=NO_PARAMETERS)
    wanted = _wanted(subject)
    if isinstance(wanted, str):
        return Result("gradients", claim, skipped=wanted)
    # GroupNorm's backward pass on the CPU (torch 2.13) crashes where a channels_last input requires no gradient.
    inputs = [x.detach().contiguous() if x.device.type == "cpu" else x.detach() for x in subject.inputs]
    if any(x.stride() != given.stride() for x, given in zip(inputs, subject.inputs, strict=True)):
        # dropout draws its masks in the order of memory, so an ordinary step must see the same strides
        leaves = [
            x.clone().requires_grad_(given.requires_grad) for x, given in zip(inputs, subject.inputs, strict=True)
        ]
        ordinary = run(subject.trained(), subject.step, leaves, subject.seed, named_like=subject.module)
        wanted = ordinary.parameter_gradients
    module = subject.trained()
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", message=REENTRANT)
        got = run(module, subject.step, inputs, subject.seed, named_like=subject.module).parameter_gradients
    if any(REENTRANT in str(warning.message) for warning in caught):
        return Result("gradients", claim, skipped=f"torch.utils.checkpoint with use_reentrant=True warns: {REENTRANT}")
    names = {name for name, p in subject.module.named_parameters() if p.requires_grad}
    return _compared(subject, claim, got, wanted, names, "without a gradient of the input")


def gradients_with_frozen_parameters(subject: Subject, claim: str) -> Result:
    """Freeze all parameters, and every second one, and compare the other gradients with those of an ordinary step."""
    names = [name for name, p in subject.module.named_parameters() if p.requires_grad]
    if not names:
        return Result("gradients", claim, skipped=NO_PARAMETERS)
    wanted = _wanted(subject)
    if isinstance(wanted, str):
        return Result("gradients", claim, skipped=wanted)
    results = []
    for frozen in [set(names), set(names[1::2])][: len(names)]:
        module = subject.trained()
        own = zip((name for name, _ in subject.module.named_parameters()), module.parameters(), strict=True)
        for name, parameter in own:
            if name in frozen:
                parameter.requires_grad_(False)
        which = "all parameters" if len(frozen) == len(names) else f"{', '.join(sorted(frozen)[:3])}"
        try:
            got = subject.run(module).gradients
        except Exception as error:
            if is_ours(error):
                raise
            explanation = f"with {which} frozen, the training step raised {described(error)}"
            return Result("gradients", claim, math.inf, 0.0, explanation=explanation)
        if given := [name for name in sorted(frozen) if got[name] is not None]:
            return Result("gradients", claim, math.inf, 0.0, explanation=f"{given[0]} is frozen, but gets a gradient")
        rest = {name for name in wanted if name not in frozen}
        results.append(_compared(subject, claim, got, wanted, rest, f"with {which} frozen"))
    return next((result for result in results if result.failed), results[0])


def second_derivatives(subject: Subject, claim: str) -> Result | None:
    """Compare the gradients of a penalty on the inputs' gradients with plain backpropagation's, if there is a twin."""
    twin = subject.plain()
    if twin is None or subject.autocast:
        return None
    try:
        wanted = _of_penalty(subject, twin)
    except Exception as exception:
        return Result("gradients", claim, skipped=f"plain backpropagation raised {described(exception)}")
    if not wanted or not is_finite(wanted.values()):
        return Result("gradients", claim, skipped="plain backpropagation gives no finite second derivatives here")
    got = _of_penalty(subject, subject.trained())
    limit = Limit(
        subject.dtype,
        4 * subject.depth,
        conditions=condition_numbers(
            subject, lambda s: _of_penalty(s, s.trained()), lambda s: _of_penalty(s, s.twin())
        ),
    )
    name, error = worst(relative_errors(got, wanted))
    return limit.judge(
        "gradients",
        claim,
        error,
        f"the gradient penalty's gradient of {name} is another one than plain backpropagation's",
    )


def _of_penalty(subject: Subject, module: nn.Module) -> NamedTensors:
    """Return the gradients of the sum of squares of the inputs' gradients; empty where these are constant."""
    found: dict[str, Tensor | None] = {}

    def program(module: nn.Module, *inputs: Tensor) -> None:
        leaves = [x for x in inputs if x.requires_grad]
        loss = subject.loss([y.sin() for y in subject.call(module, *inputs) if y.is_floating_point()])
        if not loss.requires_grad:
            return
        first = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
        penalty = sum(g.square().sum() for g in first if g is not None)
        if not isinstance(penalty, Tensor) or not penalty.requires_grad:
            return
        tensors = [(f"input {i}", x) for i, x in enumerate(inputs) if x.requires_grad]
        tensors += [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        second = torch.autograd.grad(penalty, [x for _, x in tensors], allow_unused=True)
        for i, (g, (_, x)) in enumerate(zip(second, tensors, strict=True)):
            found[str(i)] = torch.zeros_like(x) if g is None else g

    subject.run(module, program)
    names = [f"input {i}" for i, x in enumerate(subject.inputs) if x.is_floating_point()]
    names += [name for name, p in subject.module.named_parameters() if p.requires_grad]
    return {names[int(i)]: gradient for i, gradient in found.items()}


def _wanted(subject: Subject) -> NamedTensors | str:
    """Return the gradients of an ordinary step, or why there are none."""
    try:
        outcome = subject.ordinary
    except Exception as error:  # another claim reports it
        return f"the training step raised {described(error)}"
    return outcome.gradients if outcome.is_finite else "values are not finite here"


def _compared(
    subject: Subject, claim: str, got: NamedTensors, wanted: NamedTensors, names: set[str], when: str
) -> Result:
    errors = {name: error for name, error in relative_errors(got, wanted).items() if name in names}
    name, error = worst(errors)
    limit = Limit(
        subject.dtype,
        2 * subject.depth,
        subject.autocast,
        condition_numbers(subject, lambda s: named(s.run(s.trained()))),
    )
    missing = got.get(name) is None
    return limit.judge(
        "gradients", claim, error, f"{when} the gradient of {name} is {'missing' if missing else 'another one'}"
    )
