"""A run as a generator of turns, so that one process can advance several runs on one device.

1. A turn launches a little work (one training step, one batch of an evaluation, a checkpoint) and ends at a ``yield``.
2. A turn never waits for the GPU. A run that must wait yields an ``Event``: its next turn begins after all work that
   was launched before the event is done. On a CPU all work is done when a call returns, and runs yield None.
3. A turn reads a value from the GPU only after such an event, so that reading takes no time. It never synchronises the
   device, which would also wait for all other runs.
4. A run launches at most ``2 * STEPS_BETWEEN_EVENTS`` steps ahead of the GPU. A stop therefore waits for a few steps
   only, and no run fills the GPU's queue at the expense of the others.
5. A run has a ``Lane``: its CUDA stream, or the CPU. ``Lane.turn`` makes the stream current for each turn, from the
   first tensor of the run on, so that memory is allocated, used and freed on one stream.
6. The generator's return value is the run's record.

``finish`` runs all turns of one run; ``memcnn.training.together`` interleaves the turns of several.
"""

import time
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol, TypeVar

import torch

from memcnn.data import EpochPlan

T = TypeVar("T")
STEPS_BETWEEN_EVENTS = 4


class Event(Protocol):
    """The methods of ``torch.cuda.Event`` that are used. An event is a point in the work of one stream."""

    def query(self) -> bool:
        """Return whether the work before the event is done."""

    def synchronize(self) -> None:
        """Wait until it is done."""


Turns = Generator[Event | None, None, T]


def finish(turns: Turns[T]) -> T:
    """Run all turns of one run, and return its result."""
    while True:
        try:
            event = next(turns)
        except StopIteration as end:
            return end.value
        if event is not None:
            event.synchronize()


class Lane:
    """The CUDA stream of one run, or the CPU.

    Args:
        device: the device that trains.
        own_stream: on CUDA, use a new stream instead of the current one. The new stream waits for the work launched on
            the current one so far, such as the copies of the images that all runs read.
    """

    def __init__(self, device: torch.device, *, own_stream: bool = False) -> None:
        self.device, self.stream = device, None
        self._marks: deque[Event] = deque()
        self._launched = 0
        if device.type == "cuda" and own_stream:
            self.stream = torch.cuda.Stream(device)
            self.stream.wait_stream(torch.cuda.current_stream(device))

    def turn(self) -> AbstractContextManager:
        """Return the context of one turn, in which the lane's stream is the current one."""
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def mark(self) -> Event | None:
        """Return an event after all work that was launched so far; None on a CPU, where this work is done already."""
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def launched(self) -> Event | None:
        """Count a step that was launched; return the event to wait for before the next one, if any (rule 4)."""
        self._launched += 1
        if self.device.type != "cuda" or self._launched % STEPS_BETWEEN_EVENTS:
            return None
        if (mark := self.mark()) is not None:
            self._marks.append(mark)
        return self._marks.popleft() if len(self._marks) > 1 else None

    def copy(self, plan: EpochPlan) -> EpochPlan:
        """Return the plan on the lane's device, without waiting for the copy there."""
        if self.device.type != "cuda":
            return plan.to(self.device)
        pinned = (value.pin_memory() for value in vars(plan).values())
        return EpochPlan(*(value.to(self.device, non_blocking=True) for value in pinned))


class Clock:
    """A clock of training time, which stops while the process starts a run.

    Starting a run (reading data, compiling, capturing) takes up to a minute, and no other run gets a turn meanwhile.
    """

    def __init__(self) -> None:
        self._held_seconds = 0.0

    def now(self) -> float:
        """Return the time in seconds; the difference of two calls leaves out the time for which the clock was held."""
        return time.perf_counter() - self._held_seconds

    @contextmanager
    def held(self) -> Iterator[None]:
        """Stop the clock for as long as the context lasts."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._held_seconds += time.perf_counter() - started
