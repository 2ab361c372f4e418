"""Several runs at once in one process, which take turns on one device.

On a GPU each run has a stream of its own, so that the kernels of one run fill the gaps that another one leaves.
Processes cannot do that: they get the GPU one after the other. On a CPU the runs only take turns; each ends with the
bits that it has alone. ``memcnn.training.turns`` defines a turn.
"""

import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from memcnn.training.distributed import World
from memcnn.training.execution import Execution
from memcnn.training.job import Job, Place
from memcnn.training.record import RunRecord
from memcnn.training.setting import Setting, setting_of
from memcnn.training.starting import check_job
from memcnn.training.stopping import Stop
from memcnn.training.trainer import HERE, PLAIN, turns
from memcnn.training.turns import Event, Lane, Turns

Outcome = tuple[Job, RunRecord | Exception]


class DeviceLost(RuntimeError):
    """The GPU can no longer be used in this process, because a kernel of one run has failed."""


def train_together(
    jobs: Iterable[Job],
    at_once: int,
    *,
    stop: Stop,
    execution: Execution = PLAIN,
    place: Place = HERE,
) -> Iterator[Outcome]:
    """Train the jobs, ``at_once`` of them at a time; yield each with its record, or with its error, as it ends.

    When a run ends, even by an error, the next job takes its place and the others continue. After a stop each run ends
    as it would alone, and no further job begins.

    Args:
        jobs: the jobs, taken one by one when there is room, so that a generator can choose by the time left.
        at_once: how many runs share the device.
        stop: the stop of all runs, which this function enters as a context.
        execution: the execution of steps.
        place: folders and device; ``shared_by`` counts the processes that share the device, each with as many runs as
            this one.
    Raises:
        BadArgument: there is no such device, or the execution is impossible on it.
        DeviceLost: a run has left the GPU unusable. The runs can be resumed in another process.
    """
    setting = setting_of(place, execution, World(), stop)
    with stop, setting.execution.settings(setting.device):
        group = _Group(iter(jobs), at_once, setting)
        try:
            yield from group.outcomes()
        finally:
            group.close()


@dataclass
class _Member:
    """A run of the group: its job, its turns, its stream, and the event for which its next turn waits."""

    job: Job
    turns: Turns[RunRecord]
    lane: Lane
    event: Event | None = None

    @property
    def is_ready(self) -> bool:
        return self.event is None or self.event.query()


class _Group:
    """The runs in training, in the order of their turns."""

    def __init__(self, jobs: Iterator[Job], at_once: int, setting: Setting) -> None:
        self.jobs, self.at_once, self.setting = jobs, at_once, setting
        self.members: list[_Member] = []

    def outcomes(self) -> Iterator[Outcome]:
        """Give each run that is ready one turn, again and again; yield those that have ended."""
        while self._fill():
            ready = [member for member in self.members if member.is_ready]
            if not ready and (event := self.members[0].event) is not None:
                event.synchronize()  # the one that has waited longest
            for member in ready:
                self.members.remove(member)
                outcome = self._advance(member)
                if outcome is None:
                    self.members.append(member)
                else:
                    yield member.job, outcome

    def close(self) -> None:
        """End the runs that are still in training, as by a kill: their last checkpoints remain."""
        for member in self.members:
            with member.lane.turn():
                member.turns.close()

    def _fill(self) -> bool:
        """Take jobs while there is room and no stop; return whether there is a run to advance."""
        while len(self.members) < self.at_once and self.setting.stop.reason(needed_seconds=0.0) is None:
            job = next(self.jobs, None)
            if job is None:
                break
            lane = Lane(self.setting.device, own_stream=True)
            self.members.append(_Member(job, _turns_of(job, self.setting, lane), lane))
        return bool(self.members)

    def _advance(self, member: _Member) -> RunRecord | Exception | None:
        """Give a run one turn; return its record or its error if it has ended, None if it continues."""
        try:
            with member.lane.turn():
                member.event = next(member.turns)
        except StopIteration as end:
            return end.value
        except Exception as error:
            traceback.clear_frames(error.__traceback__)  # they hold the run's tensors
            self._check_device(error)
            return error
        return None

    def _check_device(self, error: Exception) -> None:
        """Raise DeviceLost if the GPU cannot be used after an error: all later work would fail as well."""
        if self.setting.device.type != "cuda":
            return
        try:
            torch.zeros(1, device=self.setting.device).item()
        except RuntimeError:
            raise DeviceLost(f"the GPU failed in a run, and can no longer be used in this process: {error}") from error


def _turns_of(job: Job, setting: Setting, lane: Lane) -> Turns[RunRecord]:
    with setting.clock.held():
        start = check_job(job, setting)
    if isinstance(start, RunRecord):
        return start
    return (yield from turns(start, setting, lane))
