"""The timing of training steps: rounds in which all steps take turns."""

from collections.abc import Callable
from functools import partial

import pandas as pd
import torch

from bench import measure

LEAST_ROUNDS, MOST_ROUNDS = 3, 15
SECONDS = 15.0
"""The time after which a network's measurement begins no further round."""
ROUND_SECONDS = 0.2
"""The time that one round of one step should take on a GPU."""


def seconds(run: Callable[[], object]) -> float:
    """Return the seconds of a call, including the work that it queues on the GPU."""
    started = measure.clock()
    run()
    return measure.clock() - started


def timed(steps: dict, device: torch.device, limit: float = SECONDS) -> tuple[pd.DataFrame, dict]:
    """Time the functions in turn, so that drift affects all of them equally.

    Args:
        steps: name -> function; ``function(count)`` runs ``count`` training steps.
        device: where the functions run; on a GPU one round queues many steps.
        limit: seconds after which no further round begins.

    Returns:
        Seconds per step, with a column for each function and a row for each round; and for each function the number of
        steps in a round.
    """
    counts = {}
    for name, run in steps.items():
        run(1)  # compiles, captures and lets cuDNN choose
        if device.type == "cpu":
            counts[name] = 1
        else:
            counts[name] = max(1, round(ROUND_SECONDS / measure.warm_up(partial(run, 1), least=3)))
    rounds: list[dict] = []
    started = measure.clock()
    while len(rounds) < LEAST_ROUNDS or (len(rounds) < MOST_ROUNDS and measure.clock() - started < limit):
        rounds.append({name: seconds(partial(run, counts[name])) / counts[name] for name, run in steps.items()})
    return pd.DataFrame(rounds), counts
