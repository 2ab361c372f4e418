"""One side of ``bench.compare``: a process that measures the ``memcnn`` of one commit.

This file imports only modules that older commits have as well: the cases and meters of this tree, and ``memcnn``.
"""

import pandas as pd
import torch

from bench import measure
from bench.cases import Chain
from bench.networks import Network


def cases() -> list:
    """Return the cases to compare."""
    return [
        *(Chain("chain", subject, 8, 4) for subject in ("plain", "keep-every-2", "wrapped", "reversible")),
        *(Chain("tiny", subject, 32, 2, 4, 4) for subject in ("plain", "wrapped", "reversible")),
        Network("revnet38", "reversible", 8),
    ]


class Side:
    """One side of the comparison, in its own process. Its methods answer the questions of ``bench.worker``."""

    def __init__(self) -> None:
        self.cases = {str(case): case for case in cases()}

    def exact(self, case: str, device: str) -> dict:
        """Measure the memory of a step, and count the evaluations of F and G."""
        chosen, on = self.cases[case], torch.device(device)
        return measure.memory(chosen, on) | measure.evaluations(chosen, on)

    def seconds(self, case: str, device: str) -> dict:
        """Return the median time of a step."""
        return _seconds(self.cases[case], torch.device(device))


def _seconds(case, device: torch.device) -> dict:
    """Return the median time of a step."""
    step, rounds, steps = measure.warmed_up(case, device)
    seconds = []
    for _ in range(rounds):
        started = measure.clock()
        for _ in range(steps):
            step()
        seconds.append((measure.clock() - started) / steps)
    return {"seconds": pd.Series(seconds).median()}
