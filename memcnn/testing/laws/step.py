"""A training step of a subject, and what can be switched off to make one right."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from memcnn.testing.laws.subject import Subject, sample_by_sample, without_dropout

FLOOR = 1e-3
"""A gradient that cancels to zero is compared at this fraction of the largest one."""


@dataclass(frozen=True)
class Gradients:
    outputs: list[Tensor]
    by_name: dict[str, Tensor | None]


def gradients_of(subject: Subject, module: nn.Module, *, start: float | None = None) -> Gradients:
    """The outputs and gradients of one training step, by the names of inputs and parameters in ``subject.module``.

    start: every entry of the gradients that are there before; None for no gradients.
    """
    leaves, parameters = subject.leaves(), module.parameters()
    trained = {name: p for name, p in zip(parameter_names(subject), parameters, strict=True) if p.requires_grad}
    for tensor in (*leaves, *module.parameters()):
        if tensor.requires_grad:
            tensor.grad = None if start is None else torch.full_like(tensor, start)
    with subject.seeded():
        outputs = module(*leaves)
        outputs = list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
        subject.loss(outputs).backward()
    named = {name: x.grad for name, x in zip(subject.input_names, leaves, strict=True) if x.requires_grad}
    named |= {name: p.grad for name, p in trained.items()}
    return Gradients([y.detach() for y in outputs], named)


def parameter_names(subject: Subject) -> list[str]:
    return [f"parameter {name}" for name, _ in subject.module.named_parameters()]


def but_right_without(subject: Subject, right: Callable[[Subject], bool]) -> str:
    """Words for what must be switched off for the fault to go away; "" if nothing of that does it."""
    for switch_off, words in (
            (without_dropout, "with dropout off it is right, so forward and backward draw other masks"),
            (sample_by_sample, "with batch normalisation in eval mode it is right")):
        module = subject.fresh()
        switch_off(module)
        modes = zip(module.modules(), subject.module.modules(), strict=True)
        if any(a.training != b.training for a, b in modes) and right(replace(subject, module=module)):
            return f"; {words}"
    return ""
