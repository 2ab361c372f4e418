"""Let the second evaluation of a reversible branch take small results from the first, such as BatchNorm statistics.

The engine evaluates a branch twice on the same input (rule 4 in memcnn/engine/recompute.py). An operator that reduces a
large tensor to a few numbers can keep them from the first evaluation, so that the second does not reduce again:

    result = reuse.given()      # in a second evaluation: the result of the same call in the first
    if result is None:
        result = ...            # compute it
        reuse.keep(result)      # in a first evaluation: keep it until the second

Calls are matched by their order. The operator decides when it runs, so compiled code is the same for both evaluations.
Only opaque operators (``torch.library.custom_op``) may do this: the compiler must not see the decision.
"""

import threading
from collections.abc import Iterator

from torch import Tensor


class Evaluation(threading.local):
    """The evaluation that is running in this thread. The engine sets its attributes.

    Attributes:
        kept: receives the results of a first evaluation; None outside of first evaluations.
        results: yields them in the second evaluation; None outside of second evaluations.
    """

    kept: list[Tensor] | None = None
    results: Iterator[Tensor] | None = None


evaluation = Evaluation()


def is_first() -> bool:
    """Return whether a first evaluation is running, so that ``keep`` has an effect."""
    return evaluation.kept is not None


def keep(result: Tensor) -> None:
    """Keep a result for the second evaluation, if a first one is running. Nobody may write to the tensor."""
    if evaluation.kept is not None:
        evaluation.kept.append(result)


def given() -> Tensor | None:
    """Return the next result that the first evaluation kept. None if there is none: then compute it."""
    return next(evaluation.results, None) if evaluation.results is not None else None
