"""Modules whose buffers move towards a value that their parameters alone decide, as spectral norm's do in training."""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from memcnn.testing.laws.subject import Subject, reordered

MOST_PASSES = 2_000
MOST_ROUNDINGS = 100
"""Buffers that move by less, in roundings of their dtype, have settled."""
STEADY_PASSES = 50
"""Buffers that move as far in each pass as so many passes ago, and as far as twice as many ago, never settle."""


@torch.no_grad()
def settled(subject: Subject) -> Subject:
    """Return the subject after as many forward passes as such buffers need to settle; the same if it has none.

    Spectral norm takes one step of a power iteration in each pass of training. Until it has converged, two passes
    compute two functions, so that no inverse undoes a pass, and the gradient is not the derivative.
    """
    if _only_statistics(subject.module):
        return subject
    start = _moving(subject.module)
    if not start or not subject.module.training:
        return subject
    once, other = subject.fresh(), subject.fresh()
    subject.evaluated(once, subject.inputs)
    if not _differ(start, _moving(once)):
        return subject
    subject.evaluated(other, [0.5 * reordered(x) if x.is_floating_point() else x for x in subject.inputs])
    if _differ(_moving(once), _moving(other)):
        return subject  # statistics of the inputs
    steps: list[float] = []
    for _ in range(MOST_PASSES):
        before = _moving(once)
        subject.evaluated(once, subject.inputs)
        after = _moving(once)
        if not _differ(before, after):
            return replace(subject, module=once)
        steps.append(max((a - b).abs().max().item() for a, b in zip(before, after, strict=True) if a.numel()))
        if _steady(steps):
            return subject
    return subject


def _steady(steps: list[float]) -> bool:
    """Return whether buffers move on as a counter does; the steps of a power iteration that converges change faster."""
    compared = steps[-1 : -2 * STEADY_PASSES - 2 : -STEADY_PASSES]
    return len(compared) == 3 and max(compared) <= 1.01 * min(compared)


def _only_statistics(module: nn.Module) -> bool:
    """Return whether all buffers are statistics of what passes through normalisation layers."""
    return all(isinstance(part, _NormBase) or not part._buffers for part in module.modules())


def _moving(module: nn.Module) -> list[Tensor]:
    return [buffer.clone() for buffer in module.buffers() if buffer.is_floating_point()]


def _differ(first: list[Tensor], second: list[Tensor]) -> bool:
    """Return whether a buffer differs by more than ``MOST_ROUNDINGS``."""
    return any(
        (a - b).abs().max().item() > MOST_ROUNDINGS * torch.finfo(a.dtype).eps * a.abs().max().item()
        for a, b in zip(first, second, strict=True)
        if a.numel()
    )
