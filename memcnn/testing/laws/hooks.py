"""A claim of the law of state: a forward hook is called as often as a plain forward pass evaluates its module."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from memcnn.testing.laws.result import Result, nothing_differs
from memcnn.testing.laws.subject import Subject


def forward_hooks_are_called_once(subject: Subject, claim: str) -> Result:
    """Compare the numbers of calls of forward hooks in a step with those of a plain step or forward pass."""
    calls = _calls(subject, subject.trained(), subject.run)
    plain = subject.plain()
    if plain is not None:  # a step, since torch's checkpoint calls them in backward again
        wanted = _calls(subject, plain, subject.run)
    else:
        with torch.no_grad():
            wanted = _calls(subject, subject.fresh(), lambda module: subject.evaluated(module, subject.inputs))
    faults = [
        f"the forward hook of {name or type(subject.module).__name__} was called {calls[name]} times a step, not "
        f"{wanted[name]}"
        for name in wanted
        if calls[name] != wanted[name]
    ]
    faults += _hooks_left_out(subject)
    return nothing_differs(claim, faults)


def _hooks_left_out(subject: Subject) -> list[str]:
    """Name the parts whose hooks a plain forward pass leaves out, as one does that calls ``part.forward(x)``."""
    module = subject.fresh()
    evaluated: Counter[str] = Counter()
    called: Counter[str] = Counter()
    for name, part in module.named_modules():

        def counted(*args: Any, name: str = name, forward: Callable = part.forward, **kwargs: Any) -> Any:
            evaluated.update([name])
            return forward(*args, **kwargs)

        part.forward = counted
        part.register_forward_hook(lambda *_, name=name: called.update([name]))
    with torch.no_grad():
        subject.evaluated(module, subject.inputs)
    return [
        f"the forward hook of {name or type(subject.module).__name__} is called {called[name]} times in a forward "
        f"pass that evaluates it {times} times"
        for name, times in evaluated.items()
        if called[name] < times
    ]


def _calls(subject: Subject, module: nn.Module, run: Callable[[nn.Module], object]) -> Counter:
    """Count the calls of each part of ``subject.module`` in ``run``, by its name there."""
    calls: Counter = Counter()
    offset = len(list(module.modules())) - len(list(subject.module.modules()))  # a wrapper around it
    for (name, _), part in zip(subject.module.named_modules(), list(module.modules())[offset:], strict=True):
        part.register_forward_hook(lambda *_, name=name: calls.update([name]))
    run(module)
    return calls
