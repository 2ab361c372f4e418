"""Claims about several passes: a second step, two steps with overlapping passes, and retained graphs."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from memcnn.testing.laws.guard import described
from memcnn.testing.laws.limits import Limit
from memcnn.testing.laws.result import Result
from memcnn.testing.laws.rounding import condition_numbers
from memcnn.testing.laws.subject import Subject, reordered
from memcnn.testing.laws.twin import NamedTensors, is_finite, leaf_like, relative_errors, worst

FIRST, SECOND = "first step: ", "second step: "
NOT_FINITE = "gradients are not finite here"


def two_steps_do_not_mix(subject: Subject, claim: str) -> Result:
    """Compare two forward passes followed by their backward passes, in either order, with one step after the other."""
    wanted = gradients_of_two_steps(subject, subject.trained())
    if not is_finite(wanted.values()):
        return Result("state", claim, skipped=NOT_FINITE)
    errors: dict[str, float] = {}
    for order in (0, 1), (1, 0):
        got = gradients_of_two_steps(subject, subject.trained(), order)
        errors |= {f"{name} {order}": error for name, error in relative_errors(got, wanted).items()}
    limit = _limit(
        subject,
        lambda s: gradients_of_two_steps(s, s.trained(), (0, 1)),
        lambda s: gradients_of_two_steps(s, s.twin(), (0, 1)),
    )
    return limit.judge(
        "state",
        claim,
        worst(errors)[1],
        "a second forward pass before the backward pass of the first changes the gradients: the two passes share "
        "what forward leaves behind, such as values kept on the module or hooks on its parameters",
    )


def second_step_is_plain(subject: Subject) -> list[Result]:
    """Compare the gradients of a second step, on other values, with plain backpropagation's, if there is a twin.

    It belongs to the law of gradients: a module may be right once, and then use what it kept of its first step.
    """
    claim = "gradients of a second step = plain backpropagation's"
    if (twin := subject.plain()) is None:
        return []

    def second(subject: Subject, module: nn.Module) -> NamedTensors:
        gradients = gradients_of_two_steps(subject, module)
        return {name: gradient for name, gradient in gradients.items() if name.startswith(SECOND)}

    which = "plain backpropagation"
    try:
        wanted = second(subject, twin)
        which = "a second training step"
        got = second(subject, subject.trained())
    except Exception as exception:
        return [Result("gradients", claim, math.inf, 0.0, explanation=f"{which} raised {described(exception)}")]
    if not is_finite(wanted.values()):
        return [Result("gradients", claim, skipped=NOT_FINITE)]
    name, error = worst(relative_errors(got, wanted))
    limit = _limit(subject, lambda s: second(s, s.trained()), lambda s: second(s, s.twin()))
    return [
        limit.judge(
            "gradients",
            claim,
            error,
            f"in a second step the gradient of {name.removeprefix(SECOND)} is another one than plain backpropagation's",
        )
    ]


def gradients_of_two_steps(subject: Subject, module: nn.Module, order: Sequence[int] = ()) -> NamedTensors:
    """Run two steps on different batches, and return the gradients of both.

    Args:
        subject: gives the first batch; the second is its samples in reverse order, with other random numbers.
        module: a copy of the subject's.
        order: order of the backward passes, which follow both forward passes. With () each backward pass follows its
            own forward pass.
    """
    losses: list[Tensor] = []
    leaves: list[dict[str, Tensor]] = []
    gradients: dict[str, Tensor] = {}
    names = [name for name, _ in subject.module.named_parameters()]
    parameters = {name: p for name, p in zip(names, module.parameters(), strict=True) if p.requires_grad}

    def differentiate(i: int) -> None:
        for parameter in parameters.values():
            parameter.grad = None
        if losses[i].requires_grad:
            losses[i].backward()
        gradients.update(
            {
                f"{(FIRST, SECOND)[i]}{name}": torch.zeros_like(x) if x.grad is None else x.grad.to_dense()
                for name, x in (leaves[i] | parameters).items()
            }
        )

    for i, batch in enumerate((subject.inputs, [reordered(x) for x in subject.inputs])):
        made = [leaf_like(x.detach().requires_grad_(x.is_floating_point())) for x in batch]
        leaves.append({f"input {j}": leaf for j, (leaf, _) in enumerate(made) if leaf.requires_grad})
        with subject.seeded(run=i):
            losses.append(subject.loss(subject.call(module, *(x for _, x in made))))
        if not order:
            differentiate(i)
    for i in order:
        differentiate(i)
    return gradients


def graphs_can_be_retained(subject: Subject, claim: str) -> Result:
    """Compare the gradients of two backward passes over one graph with each other."""
    try:
        plain = subject.plain()
        if plain is not None:
            _gradients_of_two_passes(subject, plain)
    except Exception as exception:
        return Result("state", claim, skipped=f"plain backpropagation raised {described(exception)}")
    first, second = _gradients_of_two_passes(subject, subject.trained())
    if not is_finite(first.values()):
        return Result("state", claim, skipped=NOT_FINITE)
    limit = _limit(
        subject,
        lambda s: _gradients_of_two_passes(s, s.trained())[1],
        lambda s: _gradients_of_two_passes(s, s.twin())[1],
    )
    name, error = worst(relative_errors(second, first))
    return limit.judge(
        "state", claim, error, f"in a second backward pass over a retained graph the gradient of {name} is another one"
    )


def _gradients_of_two_passes(subject: Subject, module: nn.Module) -> tuple[NamedTensors, NamedTensors]:
    """Return the gradients of each of two backward passes over one graph."""
    found = []

    def program(module: nn.Module, *inputs: Tensor) -> tuple[Tensor, ...]:
        tensors = [(f"input {i}", x) for i, x in enumerate(inputs) if x.requires_grad]
        names = (name for name, _ in subject.module.named_parameters())
        tensors += [(name, p) for name, p in zip(names, module.parameters(), strict=True) if p.requires_grad]
        outputs = subject.call(module, *inputs)
        loss = subject.loss(outputs)
        for _ in range(2 if loss.requires_grad else 0):
            gradients = torch.autograd.grad(loss, [x for _, x in tensors], retain_graph=True, allow_unused=True)
            dense = [None if gradient is None else gradient.to_dense() for gradient in gradients]
            found.append({name: gradient for (name, _), gradient in zip(tensors, dense, strict=True)})
        return outputs

    subject.run(module, program)
    return (found[0], found[1]) if found else ({}, {})


def _limit(
    subject: Subject, compute: Callable[[Subject], NamedTensors], plain: Callable[[Subject], NamedTensors]
) -> Limit:
    return Limit(subject.dtype, 2 * subject.depth, subject.autocast, condition_numbers(subject, compute, plain))
