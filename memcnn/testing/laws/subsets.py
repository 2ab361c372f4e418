"""Claims of the law of gradients: which tensors require a gradient does not change the other gradients."""

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from memcnn.testing.laws.guard import described, is_ours
from memcnn.testing.laws.limits import Limit
from memcnn.testing.laws.result import Result
from memcnn.testing.laws.rounding import condition_numbers, named
from memcnn.testing.laws.subject import Subject
from memcnn.testing.laws.twin import NamedTensors, relative_errors, run, worst

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
    """Freeze all parameters, and each half of them, and compare the other gradients with those of an ordinary step."""
    names = [name for name, p in subject.module.named_parameters() if p.requires_grad]
    if not names:
        return Result("gradients", claim, skipped=NO_PARAMETERS)
    wanted = _wanted(subject)
    if isinstance(wanted, str):
        return Result("gradients", claim, skipped=wanted)
    results = []
    halves = [set(names[1::2]), set(names[::2])] if len(names) > 1 else []
    for frozen in [set(names), *halves]:
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


def gradients_for_other_strides(subject: Subject, claim: str) -> Result:
    """Compare backward for expanded and transposed gradients of the outputs with backward for contiguous ones."""
    wanted = _wanted(subject)
    if isinstance(wanted, str):
        return Result("gradients", claim, skipped=wanted)
    results = []
    for values, layout, when in (
        (torch.ones_like, _expanded, "for an expanded gradient of the output, as that of a sum,"),
        (_drawn_like, _transposed, "for a transposed gradient of the output"),
    ):
        wanted, got = (_gradients_for(subject, values, change) for change in (Tensor.contiguous, layout))
        results.append(_compared(subject, claim, got, wanted, set(wanted), when))
    return next((result for result in results if result.failed), results[0])


def _gradients_for(
    subject: Subject, values: Callable[[Tensor], Tensor], layout: Callable[[Tensor], Tensor]
) -> NamedTensors:
    """Return the gradients of a step in which the outputs have gradients of these values in this layout."""

    def step(module: nn.Module, *inputs: Tensor) -> None:
        outputs = [y for y in subject.call(module, *inputs) if y.requires_grad]
        if outputs:
            torch.autograd.backward(outputs, [layout(values(y.detach())) for y in outputs])

    return subject.run(subject.trained(), step).gradients


def _drawn_like(y: Tensor) -> Tensor:
    numbers = torch.rand(y.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (2 * numbers - 0.5).to(y)


def _expanded(ones: Tensor) -> Tensor:
    return ones.new_ones(()).expand(ones.shape)


def _transposed(values: Tensor) -> Tensor:
    """Return the values with their dimensions in reverse order in memory."""
    order = tuple(reversed(range(values.dim())))
    return values.permute(order).contiguous().permute(order)


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
    """Return the result for the gradients in ``names``."""
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
