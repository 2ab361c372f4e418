"""Second derivatives, as a gradient penalty needs them: right, or refused with an error."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from memcnn.testing.laws.differences import ON_A_GRID, ROUGH
from memcnn.testing.laws.guard import described, is_ours
from memcnn.testing.laws.limits import Limit
from memcnn.testing.laws.moved import beside
from memcnn.testing.laws.result import Result
from memcnn.testing.laws.rounding import condition_numbers
from memcnn.testing.laws.settled import settled
from memcnn.testing.laws.slopes import LIMIT, Differentiated, along_random_steps, compared_alone
from memcnn.testing.laws.subject import Subject
from memcnn.testing.laws.twin import NamedTensors, duplicate, is_finite, relative_errors, worst

LIKE_PLAIN = "second derivatives = plain backpropagation's"
LIKE_DIFFERENCES = "second derivatives = finite differences in float64, or an error"
WRONG = 1e-4
"""Limit for a module with a plain twin. The twin confirms the second derivatives, but may share the fault."""
REMEDY = (
    "a torch.autograd.Function whose backward has no derivative marks it with "
    "torch.autograd.function.once_differentiable, so that second derivatives are an error"
)
NO_GRAPH = (
    f"with create_graph=True the gradients have no graph, so that a gradient penalty is silently ignored: {REMEDY}"
)


def like_plain(subject: Subject, claim: str) -> Result | None:
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


def like_differences(subject: Subject, claim: str) -> Result | None:
    """Compare the gradients of a penalty on the inputs' gradients with finite differences of the penalty.

    A ``torch.autograd.Function`` may have a wrong second derivative, which the plain twin shares. PyTorch's own
    operators have right ones: a module with a twin of such operators alone gets None. A module that refuses second
    derivatives with an error is right too.

    Args:
        subject: in float64, with right first derivatives.
        claim: the claim of the result.
    """
    if (twin := subject.plain()) is not None and not _has_own_functions(subject, twin):
        return None
    if subject.is_exact:
        return Result("gradients", claim, skipped=ON_A_GRID)
    subject = settled(beside(subject.initialised()))
    try:
        gradients = _of_penalty(subject, subject.trained())
    except Exception as exception:
        if is_ours(exception):
            raise
        return Result("gradients", claim, skipped=f"the module refuses them: {described(exception)}")
    penalty = Penalty(subject)
    compared = penalty.compared_with(gradients)
    generator = torch.Generator().manual_seed(subject.seed)
    error, doubt = along_random_steps(penalty, compared, generator)
    if not doubt <= ROUGH:
        return Result("gradients", claim, skipped=f"the penalty is too rough here: two steps differ by {doubt:.1g}")
    least = LIMIT if subject.plain() is None else WRONG
    limit = max(least, 2 * doubt)
    if error <= limit:
        source = f"central differences at a step and its half, which agree to {doubt:.1e}"
        return Result("gradients", claim, error, limit, source)
    if not gradients:
        return Result("gradients", claim, error, limit, explanation=NO_GRAPH)
    conditions = condition_numbers(subject, lambda s: _of_penalty(s, s.trained()))
    judged = Limit(torch.float64, 4 * subject.depth, conditions=conditions).judge("gradients", claim, error)
    if judged.failed:
        alone = [compared_alone(penalty, *one, 0.0, generator) for one in compared]
        wrong = [comparison for comparison in alone if comparison.error > max(least, 2 * comparison.doubt)]
        if not wrong:  # rounding of the penalty put two differences off alike
            doubt = max(comparison.doubt for comparison in alone)
            return Result("gradients", claim, max(c.error for c in alone), max(least, 2 * doubt), "each tensor alone")
        largest = max(wrong, key=lambda comparison: comparison.error)
        return replace(judged, explanation=f"in a gradient penalty, {largest.explain()}: {REMEDY}")
    return judged


def _has_own_functions(subject: Subject, module: nn.Module) -> bool:
    """Return whether a node of the graph belongs to a ``torch.autograd.Function``."""
    found = False

    def program(module: nn.Module, *inputs: Tensor) -> None:
        nonlocal found
        outputs = subject.call(module, *inputs)  # kept: in PyTorch 2.11 a Python node does not keep its graph alive
        waiting = [y.grad_fn for y in outputs]
        seen: set[Any] = set()
        while waiting and not found:
            node = waiting.pop()
            if node is not None and node not in seen:
                seen.add(node)
                found = isinstance(node, BackwardCFunction)
                waiting += [following for following, _ in node.next_functions]

    subject.run(module, program)
    return found


class Penalty:
    """The sum of squares of the inputs' gradients, as a function of the tensors in ``inputs`` and of the parameters.

    Each evaluation runs a copy of the module, so that none sees what an earlier one stored, such as an old weight.
    """

    def __init__(self, subject: Subject):
        self.subject = subject
        self.module = subject.trained()
        self.inputs = tuple(x.detach().clone() for x in subject.inputs)

    def __call__(self) -> float:
        subject = replace(self.subject, inputs=self.inputs)
        return (
            subject.run(duplicate(self.module), lambda module, *inputs: _penalty(subject, module, inputs))
            .results[0]
            .item()
        )

    def compared_with(self, gradients: NamedTensors) -> list[Differentiated]:
        """Return name, value and gradient of each tensor that may be moved. Moving the value changes the penalty."""
        names = [name for name, _ in self.subject.module.named_parameters()]
        tensors = [(f"input {i}", x) for i, x in enumerate(self.inputs) if x.is_floating_point()]
        tensors += [
            (name, p.detach()) for name, p in zip(names, self.module.parameters(), strict=True) if p.requires_grad
        ]
        return [(name, x, gradients.get(name)) for name, x in tensors]


def _penalty(subject: Subject, module: nn.Module, inputs: Sequence[Tensor], **options: Any) -> Tensor:
    """Return the sum of squares of the gradients of ``inputs``. ``options`` are those of ``torch.autograd.grad``."""
    leaves = [x for x in inputs if x.requires_grad]
    loss = subject.loss([y.sin() for y in subject.call(module, *inputs) if y.is_floating_point()])
    first = torch.autograd.grad(loss, leaves, allow_unused=True, **options) if loss.requires_grad else []
    return sum((g.square().sum() for g in first if g is not None), torch.zeros((), dtype=subject.dtype))


def _of_penalty(subject: Subject, module: nn.Module) -> NamedTensors:
    """Return the gradients of the penalty; empty where it has no graph."""

    def program(module: nn.Module, *inputs: Tensor) -> list[Tensor]:
        penalty = _penalty(subject, module, inputs, create_graph=True)
        if not penalty.requires_grad:
            return []
        penalty.backward()  # unlike torch.autograd.grad, it meets the error of a once_differentiable
        return [penalty]

    outcome = subject.run(module, program)
    trained = {name for name, p in subject.module.named_parameters() if p.requires_grad}
    gradients = outcome.input_gradients | {name: outcome.parameter_gradients[name] for name in sorted(trained)}
    values = {
        **dict(zip(outcome.input_gradients, subject.inputs, strict=True)),
        **dict(subject.module.named_parameters()),
    }
    return {
        name: torch.zeros_like(values[name]) if gradient is None else gradient
        for name, gradient in gradients.items()
        if outcome.results and values[name].is_floating_point()
    }
