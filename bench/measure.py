"""What one case is asked: its peak bytes, its evaluations of F and G, the seconds of its step. Each in its own pass."""

import functools
import time
from collections.abc import Callable
from dataclasses import asdict, replace

import torch

from bench.cases import branches
from bench.modes import prepared
from memcnn.testing.allocator import CUDA_BLOCK_BYTES
from memcnn.testing.memory import measure_peak_split

ROUND_SECONDS = 0.1  # of one repeat, in as many steps as fit, but at least one
MOST_ROUNDS = 50
WARM_SECONDS = 0.2


CLOCKS = {
    "wall": time.perf_counter,
    "cpu": time.process_time,  # of this process alone: for a CPU shared with others, and one thread
}
source = CLOCKS["wall"]


def clock() -> float:
    """Seconds of the source, once all work on the GPU is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return source()


@functools.lru_cache(maxsize=16)  # the cases of one cycle
def warmed_up(case, device: torch.device) -> tuple[Callable[[], None], int]:
    """The step of a case, ready to be timed, and the rounds of one repeat."""
    _, step = prepared(case, device)
    least = 1 if device.type == "cpu" and case.mode == "eager" else 3
    started, count = clock(), 0
    while count < least or clock() - started < WARM_SECONDS:
        begun = clock()
        step.run()
        count, seconds = count + 1, clock() - begun
    return step.run, min(MOST_ROUNDS, max(1, round(ROUND_SECONDS / seconds)))


def memory(case, device: torch.device) -> dict:
    """Bytes at the worst instant of a step, and what they are: the tensors', and all that the allocator gave.

    Not the allocator's for series that are about tensors alone, as its meter is slow on a thousand blocks.
    """
    model, step = prepared(case, device)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what earlier cases had reserved
    return asdict(measure_peak_split(
        model, step.run, optimizer=step.optimizer, batch=step.batch,
        allocator=case.series not in ("law", "gate"),
        block_bytes=CUDA_BLOCK_BYTES if device.type == "cuda" else 1))


def evaluations(case, device: torch.device) -> dict:
    """How often the branches are evaluated in one step, and how many they are. Of the case in eager mode, batch 2."""
    model, step = prepared(replace(case, batch=2, mode="eager"), device)
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
