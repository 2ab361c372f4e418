"""The largest error that rounding explains: first for any well-conditioned block, then measured for this block."""

import math
from collections.abc import Callable, Iterable
from copy import copy
from dataclasses import dataclass
from functools import partial
from itertools import tee

import torch

from memcnn.testing.laws.result import HOPELESS, Result
from memcnn.testing.tolerances import describe, tolerance

FAR_BEYOND = {1: 1e3, 3: 1e2, 6: 10.0, 12: 3.0, 30: 1.0}
"""By number of random changes: an error that exceeds its limit by this factor fails without further changes."""


@dataclass(frozen=True)
class Limit:
    """Judges errors of computations in ``dtype`` through ``depth`` blocks.

    The limit of an error is ``tolerance(dtype, depth=depth)``. If the error is larger, the condition number of the
    computation is measured, which may raise the limit. Where the limit is 1 or more, rounding alone may be as large
    as the values, and nothing can be said.

    Attributes:
        dtype: the dtype of the computation.
        depth: the number of blocks that it passes.
        autocast: the dtype of the branches under autocast.
        conditions: the condition number, measured with one random change, two, three, ... Values are taken only where
            they matter, and kept for further errors of the same computation.
    """

    dtype: torch.dtype
    depth: int = 1
    autocast: torch.dtype | None = None
    conditions: Iterable[float] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "conditions", tee(self.conditions, 1)[0])

    def judge(self, law: str, claim: str, error: float, explanation: str | Callable[[], str] = "") -> Result:
        """Return the result of a claim.

        Args:
            law: the law to which the claim belongs.
            claim: what should hold.
            error: relative to the largest expected entry.
            explanation: what is wrong, if the error is beyond its limit.
        """
        limit_of = partial(tolerance, self.dtype, depth=self.depth, autocast=self.autocast)
        source_of = partial(describe, self.dtype, depth=self.depth, autocast=self.autocast)
        limit, source = limit_of(), source_of()
        for changes, condition in enumerate(() if error <= limit else copy(self.conditions), 1):
            limit, source = limit_of(condition=condition), source_of(condition=condition)
            if limit >= 1:
                return Result(law, claim, error, limit, source, skipped=f"{HOPELESS}{_explain(condition)}")
            if error <= limit or error > FAR_BEYOND.get(changes, math.inf) * limit or changes == max(FAR_BEYOND):
                break
        if error <= limit:
            return Result(law, claim, error, limit, source)
        return Result(law, claim, error, limit, source, explanation() if callable(explanation) else explanation)


def _explain(condition: float) -> str:
    if math.isfinite(condition):
        return f"the condition number is {condition:.2g}"
    return "the condition number could not be estimated, since values overflow or are not finite once they are rounded"
