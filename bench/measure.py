"""Measurements of a case, each in its own pass: peak bytes, evaluations of F and G, seconds of a step."""

import functools
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict

import pandas as pd
import torch

from bench.cases import branches
from bench.modes import prepared
from memcnn.memory import CUDA_BLOCK_BYTES, measure_peak_split

ROUND_SECONDS = 0.1  # length of one repeat, which has at least one round
MOST_ROUNDS = 50
WARM_SECONDS = 0.2
QUEUED_SECONDS = 0.02  # length of one round on a GPU: several steps, because reading the clock waits for the GPU

CLOCKS = {
    "wall": time.perf_counter,
    "cpu": time.process_time,  # CPU time of this process: for one thread on a busy CPU
}
source = CLOCKS["wall"]


def clock() -> float:
    """Return the seconds of the chosen clock, after waiting for all work on the current GPU."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return source()


@functools.lru_cache(maxsize=16)  # the cases of one cycle
def warmed_up(case, device: torch.device) -> tuple[Callable[[], None], int, int]:
    """Return the step of a case, ready to be timed, the rounds of one repeat, and the steps of one round."""
    _, step = prepared(case, device)
    seconds = warm_up(step.run, least=1 if device.type == "cpu" and case.mode == "eager" else 3)
    return step.run, *repetitions(seconds, device)


def warm_up(run: Callable[[], object], *, least: int) -> float:
    """Call ``run`` at least ``least`` times, and for ``WARM_SECONDS``; return the seconds of the last call."""
    started, count = clock(), 0
    while count < least or clock() - started < WARM_SECONDS:
        begun = clock()
        run()
        count, seconds = count + 1, clock() - begun
    return seconds


def repetitions(seconds: float, device: torch.device) -> tuple[int, int]:
    """Return the rounds of one repeat, and the steps of one round.

    On a GPU the steps of a round are queued one after the other, as in training; only then is the launch of one step
    hidden behind the work of the step before.

    Args:
        seconds: the time of one step.
        device: where it runs.
    """
    steps = max(1, math.ceil(QUEUED_SECONDS / seconds)) if device.type == "cuda" else 1
    return min(MOST_ROUNDS, max(1, round(ROUND_SECONDS / (seconds * steps)))), steps


def cpu_seconds_in_turn(steps: Mapping[str, Callable[[], object]], rounds: int) -> pd.DataFrame:
    """Time functions in rounds. Each round starts with another function, so that drift affects all of them equally.

    Returns:
        CPU seconds of this process for each call, with a column for each function and a row for each round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds):
        names = list(steps)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            begun = time.process_time()
            steps[name]()
            seconds[name].append(time.process_time() - begun)
    return pd.DataFrame(seconds)


def memory(case, device: torch.device) -> dict:
    """Return the bytes of each kind of tensor at the peak of a step, and the peak bytes of the allocator.

    The series "law" and "gate" leave the allocator out: its meter is slow on a thousand blocks.
    """
    model, step = prepared(case, device)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # release the memory reserved for earlier cases
    return asdict(
        measure_peak_split(
            model,
            step.run,
            optimizer=step.optimizer,
            batch=step.batch,
            allocator=case.series not in ("law", "gate"),
            block_bytes=CUDA_BLOCK_BYTES if device.type == "cuda" else 1,
        )
    )


def evaluations(case, device: torch.device) -> dict:
    """Count the branches, and their evaluations in one step of the smallest form of the case."""
    model, step = prepared(case.smallest(), device)
    parts, calls = branches(model), 0

    def counted(forward: Callable) -> Callable:
        def call(*inputs):
            nonlocal calls
            calls += 1
            return forward(*inputs)

        return call

    for part in parts:
        part.forward = counted(part.forward)
    step.run()
    return {"evaluations": calls, "branches": len(parts)}
