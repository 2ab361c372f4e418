"""A module that has run at another size: what it stored there must not reach a run at this size.

Every other check gives a copy of the module inputs of one size. A mask, a grid of positions or a permutation that is
stored at the first size, and cut for the next one, is right in all of them.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress

import torch
from torch import Tensor, nn

from memcnn.testing.adapters import inverse_of
from memcnn.testing.laws.guard import described
from memcnn.testing.laws.limits import Limit
from memcnn.testing.laws.moved import with_buffers_of
from memcnn.testing.laws.result import Result
from memcnn.testing.laws.rounding import Computation, condition_numbers
from memcnn.testing.laws.subject import Subject, reordered
from memcnn.testing.laws.twin import is_finite
from memcnn.testing.tolerances import distance, tolerance

ANOTHER_SIZE = "a run at another size changes neither direction"
NO_OTHER_SIZE = "the module accepts no other size"


def another_size_leaves_no_trace(subject: Subject, computed: Computation) -> Result:
    """Compare both directions of a module that has run at another size with those of one that never ran.

    Args:
        subject: the module and its inputs.
        computed: runs both directions, for the condition number.
    """
    start, accepted = subject.initialised(), False
    largest, explanation = 0.0, ""
    for words, inputs in _other_sizes(start):
        module = start.fresh(dropout=False)
        try:
            start.evaluated(inverse_of(module), start.evaluated(module, inputs))
        except Exception:  # it refuses this size
            continue
        accepted = True
        error, direction = _trace(start, module)
        if not error <= largest and not _depends_on_its_past(start):
            largest = error
            explanation = f"after a run {words} {direction}: it uses a value that it stored at the other size"
    if not accepted:
        return Result("inverse", ANOTHER_SIZE, skipped=NO_OTHER_SIZE)
    limit = Limit(subject.dtype, subject.depth, subject.autocast, condition_numbers(subject, computed))
    return limit.judge("inverse", ANOTHER_SIZE, largest, explanation)


def _other_sizes(subject: Subject) -> Iterator[tuple[str, list[Tensor]]]:
    """Yield inputs that are longer by one along one dimension, or twice as long, and the words for their size.

    Inputs that are equally long along a dimension stay so.
    """
    inputs = subject.inputs
    for dim, size in sorted({(dim, size) for x in inputs for dim, size in enumerate(x.shape) if size}):
        for more in dict.fromkeys((1, size)):
            longer = [_longer(x, dim, more) if x.dim() > dim and x.shape[dim] == size else x for x in inputs]
            with suppress(Exception), torch.no_grad():
                subject.evaluated(subject.fresh(dropout=False), longer)
                yield f"with {size + more} entries along dimension {dim} instead of {size}", longer
                break


def _longer(x: Tensor, dim: int, more: int) -> Tensor:
    return torch.cat((x, x.narrow(dim, 0, more)), dim)


def _trace(subject: Subject, module: nn.Module) -> tuple[float, str]:
    """Return how much ``module``, which has run, differs from one that never ran, and the direction that does."""
    afresh = subject.fresh(dropout=False)
    if not with_buffers_of(afresh, module):
        return 0.0, ""
    y = subject.evaluated(afresh, subject.inputs)
    x = subject.evaluated(inverse_of(afresh), y)
    if not is_finite((*y, *x)):
        return 0.0, ""
    largest, words = 0.0, ""
    for name, function, values, wanted in ("forward", module, subject.inputs, y), ("inverse", inverse_of(module), y, x):
        try:
            got = subject.evaluated(function, values)
        except Exception as exception:
            return float("inf"), f"{name} raises {described(exception)}"
        error = distance(got, wanted) if _shapes(got) == _shapes(wanted) else float("inf")
        if not error <= largest:
            largest, words = error, f"{name} gives other values than in a module that never ran"
    return largest, words


def _shapes(values: Sequence[Tensor]) -> list[torch.Size]:
    return [value.shape for value in values]


def _depends_on_its_past(subject: Subject) -> bool:
    """Return whether a run on other values of the same size changes both directions as well.

    A layer that initialises itself from its first batch does so, and so does one that counts its calls.
    """
    module = subject.fresh(dropout=False)
    others = [0.5 * reordered(x) if x.is_floating_point() else x for x in subject.inputs]
    with suppress(Exception):
        subject.evaluated(inverse_of(module), subject.evaluated(module, others))
    return not _trace(subject, module)[0] <= tolerance(subject.dtype, depth=subject.depth)
