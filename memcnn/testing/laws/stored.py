"""Errors in float64 that come from stored values, which were rounded to float32 before the module was converted."""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from memcnn.testing.adapters import inverse_of
from memcnn.testing.laws.result import Result
from memcnn.testing.laws.subject import Subject
from memcnn.testing.tolerances import tolerance

ROUNDING = 2.0**-24
"""The relative size of float32's rounding."""
SHARE = 0.01
"""Least change of the inverse's error when stored values change by one rounding, as a share of the error; and largest
deviation from proportion of that change, as a share of the change."""


def excused(results: Iterable[Result], subject: Subject) -> list[Result]:
    """Return the results in float64; those are skipped whose error is that of stored values.

    An orthogonal matrix is such a stored value if its transpose undoes it: rounded, it is orthogonal to 1e-7 alone.

    Args:
        results: the results.
        subject: in float64.
    """
    results = list(results)
    small = [result for result in results if result.failed and result.error <= tolerance(torch.float32)]
    if not small or not _is_of_stored_values(subject):
        return results
    words = "the error is that of parameters or buffers that are rounded to float32, such as an orthogonal matrix"
    return [replace(r, explanation="", skipped=words) if r in small else r for r in results]


def _is_of_stored_values(subject: Subject) -> bool:
    """Return whether the error of the inverse follows the stored values.

    They are changed by one rounding of float32, and by two. The error of a wrong constant, or of an iteration that
    stops early, does not follow. That of a cast to float32 follows, but not in proportion.
    """
    try:
        error = _error_of_inverse(subject, 0.0)
        once, twice = (_error_of_inverse(subject, n * ROUNDING) - error for n in (1, 2))
    except Exception:  # another claim reports it
        return False
    return bool(once.norm() > SHARE * error.norm() and (twice - 2 * once).norm() < SHARE * once.norm())


@torch.no_grad()
def _error_of_inverse(subject: Subject, change: float) -> Tensor:
    """Return inverse(forward(x)) - x, with stored values that are larger or smaller by this relative change."""
    module = subject.fresh(dropout=False)
    generator = torch.Generator().manual_seed(subject.seed)
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            signs = 2 * torch.randint(2, tensor.shape, generator=generator) - 1
            tensor.mul_(1 + change * signs.to(tensor))
    back = subject.evaluated(inverse_of(module), subject.evaluated(module, subject.inputs))
    pairs = zip(back, subject.inputs, strict=True)
    return torch.cat([(a - x).flatten() for a, x in pairs if x.is_floating_point()])
