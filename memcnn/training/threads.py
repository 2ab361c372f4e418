"""Check, before the first step on a CPU, that several threads are not slower than one.

If other processes use the CPU, the threads of a small operation wait for each other. A step then takes up to twenty
times as long as with one thread. The check times a convolution of its own, so it does not affect the run.
"""

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

REPEATS = 3
LIMIT_SECONDS = 1.0
"""Time after which a measurement is not repeated."""
SLOWER = 1.5
"""Warn if several threads take at least this many times as long as one."""


def warning(batch_size: int, *, measure: Callable[[int, int], float] | None = None) -> str | None:
    """Return a warning if this process's CPU threads are slower than one thread; None if they are not.

    Args:
        batch_size: images of a step.
        measure: returns the seconds of a part of a step, for a batch size and a number of threads.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        return None
    measure = measure or branch_seconds
    several, one = measure(batch_size, threads), measure(batch_size, 1)
    if several < SLOWER * one:
        return None
    return (
        f"{threads} CPU threads are slower than one: a convolution of this batch takes {1e3 * several:.0f} ms, and "
        f"{1e3 * one:.0f} ms with one thread, probably because other processes use the CPU. To train faster, stop with "
        "Ctrl-C and resume with --threads 1, or set OMP_NUM_THREADS=1"
    )


def branch_seconds(batch_size: int, threads: int) -> float:
    """Return the least seconds of a forward and backward pass of a convolution with BatchNorm, 16 channels of 32 x 32.

    Args:
        batch_size: number of images.
        threads: number of CPU threads; this process's number is restored afterwards.
    """
    before = torch.get_num_threads()
    x = torch.ones(batch_size, 16, 32, 32).contiguous(memory_format=torch.channels_last)
    weight = torch.ones(16, 16, 3, 3, requires_grad=True)
    torch.set_num_threads(threads)
    try:
        found: list[float] = []
        begun = time.perf_counter()
        while len(found) <= REPEATS and (not found or time.perf_counter() - begun < LIMIT_SECONDS):
            started = time.perf_counter()
            y = F.conv2d(x, weight, padding=1)
            F.relu(F.batch_norm(y, None, None, training=True)).sum().backward()
            found.append(time.perf_counter() - started)
        return min(found)
    finally:
        torch.set_num_threads(before)
