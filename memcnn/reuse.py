"""Let the second evaluation of a reversible branch take small results from the first, such as BatchNorm statistics.

The engine evaluates a branch twice on the same input (rule 4 in memcnn/engine/recompute.py). An operator that reduces a
large tensor to a few numbers can keep them from the first evaluation, so that the second does not reduce again:

    result = reuse.take()   # in a second evaluation: the result of the same call in the first
    if result is None:
        result = ...        # compute it
        reuse.keep(result)  # in a first evaluation: keep a copy until the second

The n-th call in the second evaluation takes the n-th result, so both evaluations must make the same calls. Results that
are left over raise an error. The operator makes this decision at run time, so both evaluations can use the same
compiled code. Only opaque operators (``torch.library.custom_op``) may do this: the compiler must not see the decision.
Tag them ``torch.Tag.cudagraph_unsafe``: a CUDA graph that the compiler captures of one branch would repeat one decision
forever. Nothing is kept in a branch that reads running statistics or has hooks, because the two evaluations may then
run different code.
"""

import threading
from collections.abc import Iterator

from torch import Tensor


class Evaluation(threading.local):
    """The evaluation that is running in this thread. The engine sets its attributes.

    Attributes:
        kept: receives the results of a first evaluation; None outside of first evaluations.
        remaining: yields them in the second evaluation; None outside of second evaluations.
    """

    kept: list[Tensor] | None = None
    remaining: Iterator[Tensor] | None = None


evaluation = Evaluation()


def is_first() -> bool:
    """Return whether a first evaluation is running, so that ``keep`` has an effect."""
    return evaluation.kept is not None


def keep(result: Tensor, copy: Tensor | None = None) -> None:
    """Keep a copy of a result for the second evaluation, if a first one is running.

    Args:
        result: what the operator returns. Its caller may write to it.
        copy: a copy that exists already, and that nobody else has.
    """
    if evaluation.kept is not None:
        evaluation.kept.append(result.clone() if copy is None else copy)


def take() -> Tensor | None:
    """Return the next result that the first evaluation kept. None if there is none: then compute it."""
    return next(evaluation.remaining, None) if evaluation.remaining is not None else None
