"""The largest error that rounding explains: that of well-conditioned blocks, or else of these very blocks."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from memcnn.testing.laws.result import HOPELESS, Result
from memcnn.testing.tolerances import describe, tolerance

DIRECTIONS = 1, 6, 30
"""Numbers of random changes from which the condition number is measured, until the error is explained."""
FAR_BEYOND = 1e3
"""An error that is more than this many times its limit is not explained by further changes."""


@dataclass(frozen=True)
class Limit:
    """Judges errors of computations in ``dtype`` through ``depth`` blocks.

    The limit of an error is ``tolerance(dtype, depth=depth)``. If the error is larger, the condition number of the
    computation is measured, which may raise the limit. Where that is 1 or more, rounding alone may be as large as the
    values, and nothing can be said.

    Attributes:
        condition: measures the condition number from a number of random changes. It is called only where it matters.
    """

    dtype: torch.dtype
    depth: int = 1
    autocast: torch.dtype | None = None
    condition: Callable[[int], float] = lambda directions: 1.0

    def judge(self, law: str, claim: str, error: float, explanation: str | Callable[[], str] = "") -> Result:
        """Return the result of a claim.

        Args:
            law: the law to which the claim belongs.
            claim: what should hold.
            error: relative to the largest expected entry.
            explanation: what is wrong, if the error is beyond its limit.
        """
        precision = {"dtype": self.dtype, "autocast": self.autocast}
        limit, source = tolerance(**precision, depth=self.depth), describe(**precision, depth=self.depth)
        for directions in () if error <= limit else DIRECTIONS:
            condition = self.condition(directions)
            limit = tolerance(**precision, depth=self.depth, condition=condition)
            source = describe(**precision, depth=self.depth, condition=condition)
            if limit >= 1:
                return Result(law, claim, error, limit, source,
                              skipped=f"{HOPELESS}the condition number is {condition:.2g}")
            if error <= limit or error > FAR_BEYOND * limit:
                break
        if not error <= limit and callable(explanation):
            explanation = explanation()
        return Result(law, claim, error, limit, source, "" if error <= limit else explanation)
