"""The module as training leaves it: it has run, and an optimiser has moved its parameters.

Parameters as they start hide faults. A layer that starts at zero hides what surrounds it, a scale of 1 hides whether it
is undone, and a value that was computed from a parameter is stale only after the parameter has moved. A scale that
starts positive hides an absolute value that one direction takes and the other does not: so parameters also change sign.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

import torch
from torch import Tensor, nn

from memcnn.testing.adapters import inverse_of
from memcnn.testing.laws.subject import Subject

MOVE = 0.1
"""Size of the move of parameters, relative to the root mean square of their entries."""
WHEN_MOVED = " after an optimiser step"
"""The end of a claim that is checked once more with moved parameters."""
WHEN_MIRRORED = " with parameters of the other sign"
"""The end of a claim that is checked once more with parameters whose signs have changed."""


def moved(subject: Subject) -> Subject:
    """Return the subject with every trained parameter moved, in a module that has not run with the old ones."""
    start = subject.initialised()
    module = start.fresh()
    _optimise(module, subject.seed)
    return replace(start, module=module, runs=True)


def mirrored(subject: Subject) -> Subject:
    """Return the subject with every trained parameter moved and then negated, in a module that never ran before.

    Norms stay what they were, so that what was a contraction still is one. The determinant of a square matrix changes
    its sign as well: one row of an even number of rows keeps its sign.
    """
    after = moved(subject)
    seen: set[int] = set()
    with torch.no_grad():
        for part in after.module.modules():
            for parameter in part.parameters(recurse=False):
                if parameter.requires_grad and parameter.numel() and id(parameter) not in seen:
                    seen.add(id(parameter))
                    parameter.mul_(_other_signs(part, parameter))
    return after


def hides_a_sign(module: nn.Module) -> bool:
    """Return whether the entries of a trained parameter all have one sign, or it is a square matrix."""
    trained = [p.detach() for p in module.parameters() if p.requires_grad and p.numel()]
    return any(bool((p > 0).all() or (p < 0).all()) or _is_square(p) for p in trained)


def used_and_moved(subject: Subject) -> nn.Module:
    """Return a module that has run in both directions before an optimiser moved its parameters as `moved` does.

    The step is taken in training mode, and the modes are restored by ``train()``: both may discard stored values. The
    module must not be copied: it may recognise its parameters by version or address, and those of a copy differ.
    """
    start = subject.initialised()
    module = start.fresh(dropout=False)
    _use(start, module)
    with _in_training_mode(module):
        _optimise(module, subject.seed)
    return module


def discard_stored_values(module: nn.Module) -> None:
    """Let a module discard the values that it has computed from its parameters, as ``train()`` may do."""
    if not all(part.training for part in module.modules()):
        with _in_training_mode(module):
            pass


@contextmanager
def _in_training_mode(module: nn.Module) -> Iterator[None]:
    """Put the module in training mode, and restore all modes afterwards, both by ``train()``."""
    modes = [(part, part.training) for part in module.modules()]
    training = module.training
    module.train()
    yield
    module.train(training)
    for part, was in modes:
        part.training = was


def _is_square(parameter: Tensor) -> bool:
    """Return whether it is a square matrix, or the weight of a 1x1 convolution that is one."""
    return parameter.dim() > 1 and parameter.shape[0] ** 2 == parameter.numel() == parameter.shape[1] ** 2


def _other_signs(part: nn.Module, parameter: Tensor) -> Tensor:
    """Return the factor of each row. A part with buffers may keep the singular vectors of a weight, so all are -1."""
    signs = -torch.ones_like(parameter[:, :1]) if parameter.dim() > 1 else -torch.ones_like(parameter)
    if _is_square(parameter) and len(parameter) % 2 == 0 and not any(True for _ in part.buffers()):
        signs[-1] = 1
    return signs


def _optimise(module: nn.Module, seed: int) -> None:
    """Take an optimiser step that moves every trained parameter by ``_move``."""
    trained = [p for p in module.parameters() if p.requires_grad and p.numel()]
    generator = torch.Generator().manual_seed(seed)
    for parameter in trained:
        parameter.grad = -_move(parameter.detach(), generator)
    if trained:
        torch.optim.SGD(trained, lr=1.0).step()
    for parameter in trained:
        parameter.grad = None


def with_buffers_of(module: nn.Module, other: nn.Module) -> bool:
    """Copy the buffers of ``other`` into ``module``; False if they do not fit."""
    mine, theirs = list(module.buffers()), list(other.buffers())
    if [x.shape for x in mine] != [x.shape for x in theirs]:
        return False
    with torch.no_grad():
        for x, value in zip(mine, theirs, strict=True):
            x.copy_(value)
    return True


def beside(subject: Subject, share: float = 0.01) -> Subject:
    """Return the subject with inputs moved at random by ``share`` of their size, away from a kink such as ReLU's."""
    generator = torch.Generator().manual_seed(subject.seed + 1)
    inputs = []
    for x in subject.inputs:
        if x.is_floating_point():
            size = share * max(1e-3, x.detach().abs().max().item() if x.numel() else 0.0)
            noise = torch.randn(x.shape, generator=generator, dtype=torch.float64, device="cpu")
            x = subject.on_grid(x.detach() + size * noise.to(x))
        inputs.append(x)
    return replace(subject, inputs=tuple(inputs), runs=True)


def is_special(x: Tensor) -> bool:
    """Return whether more than a few entries of ``x`` are zero or equal to another one, as in a constant image."""
    if not x.is_floating_point() or x.numel() < 2:
        return False
    return x.unique().numel() < 0.9 * x.numel() or bool((x == 0).any())


def _use(subject: Subject, module: nn.Module) -> None:
    """Run all that a module may store values in; another claim reports what raises."""
    with torch.no_grad(), suppress(Exception):
        y = subject.evaluated(module, subject.inputs)
        subject.evaluated(inverse_of(module), y)
        for name, values in ("forward_log_det", subject.inputs), ("inverse_log_det", y):
            if callable(getattr(module, name, None)):
                getattr(module, name)(*values)
    with suppress(Exception):
        subject.evaluated(module, subject.inputs)


def _move(parameter: Tensor, generator: torch.Generator) -> Tensor:
    """Return random changes: ``MOVE`` times the root mean square of the entries, or for zeros MOVE / sqrt(fan-in)."""
    size = parameter.abs().square().mean().sqrt().item()
    if not size:
        fan_in = parameter[0].numel() if parameter.dim() > 1 else 1
        size = fan_in**-0.5
    noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64, device="cpu")
    return (MOVE * size * noise).to(parameter)
