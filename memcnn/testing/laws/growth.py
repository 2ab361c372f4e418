"""Estimate the growth of the inverse's error with depth, and whether a deep chain of such blocks can be rebuilt."""

import math

import torch

from memcnn.testing.adapters import inverse_of
from memcnn.testing.laws.result import BADLY_CONDITIONED
from memcnn.testing.laws.subject import Subject, without_dropout
from memcnn.testing.tolerances import distance

FAILS = 1e-2
"""A rebuilt activation this far off, relative to the largest entry, is no longer the activation."""
DEEPEST = 64


def growth(subject: Subject, deepest: int = DEEPEST) -> str:
    """Explain how the error grows as the block is repeated; "" where a chain of ``deepest`` blocks is still right.

    The block is run ``deepest`` times, with the same weights, and inverted as often. If that loses more than 1 % of the
    input, the same is done for 1, 2, 4, ... blocks until it does. A chain counts as its blocks.
    """
    if deepest < 1:
        return ""
    at_once = _error_after(subject, max(1, deepest // subject.depth))
    if at_once is not None and at_once < FAILS:
        return ""
    errors: dict[int, float] = {}
    depth = 1
    while depth * subject.depth <= deepest and (not errors or errors[depth // 2] < FAILS):
        if (error := _error_after(subject, depth)) is None:
            break
        errors[depth] = error
        depth *= 2
    reached, error = list(errors.items())[-1] if errors else (0, 0.0)
    dtype = str(subject.dtype).removeprefix("torch.")
    if reached == 1 and error >= FAILS:
        return (
            f"{BADLY_CONDITIONED}in {dtype} the inverse of one block alone is off by {error:.2g} times "
            "the input's largest entry"
        )
    if not math.isfinite(error):
        return f"{BADLY_CONDITIONED}{reached} such blocks give values that are not finite in {dtype}"
    if error < FAILS:
        return ""
    rate = (error / max(errors[1], torch.finfo(subject.dtype).eps)) ** (1 / (reached - 1))
    fails_at = max(2, round(1 + math.log(FAILS / max(errors[1], torch.finfo(subject.dtype).eps)) / math.log(rate)))
    return (
        f"{BADLY_CONDITIONED}the error grows {rate:.2g}-fold a block, so that {dtype} fails (1 % of the "
        f"input) at a depth of about {fails_at} such blocks with these weights"
    )


def _error_after(subject: Subject, depth: int) -> float | None:
    """Return the error after ``depth`` blocks and as many inverses; None where blocks do not fit onto each other."""
    blocks = [subject.fresh() for _ in range(depth)]  # one block that runs twice may keep values of the last run
    for block in blocks:
        without_dropout(block)
    values = subject.inputs
    try:
        for functions in (blocks, [inverse_of(block) for block in reversed(blocks)]):
            for function in functions:
                values = subject.evaluated(function, values)
                if [v.shape for v in values] != [x.shape for x in subject.inputs]:
                    return None
    except Exception:
        return None
    return distance(values, subject.inputs)
