"""The setting that all runs of one process share: device, execution, processes, clock and images."""

import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from memcnn import data as cifar
from memcnn.training.distributed import World
from memcnn.training.environment import segment_from
from memcnn.training.execution import Execution
from memcnn.training.job import BadArgument, Job, Place
from memcnn.training.segment import Segment
from memcnn.training.stopping import Stop
from memcnn.training.turns import Clock

if TYPE_CHECKING:
    from memcnn.training.loop import Run


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The setting that all runs of a process share.

    Attributes:
        place: the folders of data and runs.
        device: the device that trains.
        execution: the execution of steps on the device; its ``settings`` are in force.
        world: the processes that share each batch.
        stop: the stop of all runs.
        shown: whether progress is shown.
        clock: the clock of training time.
        running: the runs in training in this process. If they are more than ``place.shared_by``, their number is the
            number of runs that share the device.
        images: the images on the device, by data set and source, which all runs read. They stay until the last run has
            ended. The copy to the device is synchronous, so that every stream may read them afterwards.
    """

    place: Place
    device: torch.device
    execution: Execution
    world: World
    stop: Stop
    shown: bool = False
    clock: Clock = field(default_factory=Clock)
    running: list["Run"] = field(default_factory=list)
    images: dict[tuple, cifar.Data] = field(default_factory=dict)

    def images_of(self, job: Job) -> cifar.Data:
        """Return a job's images on the device; read them once for all runs of the process."""
        place = self.place
        key = (job.dataset, cifar.whereabouts(place.data))
        if key not in self.images:
            how = {"unofficial": True} if place.unofficial_data else {}
            loaded = self.world.in_turn(lambda: cifar.load(job.dataset, place.data, **how))
            self.images[key] = loaded.to(self.device)
        return self.images[key]

    def segment_from(self, iteration: int) -> Segment:
        """Return the segment of a run that begins here and now, after ``iteration`` iterations."""
        return segment_from(
            iteration,
            execution=str(self.execution),
            device=self.device,
            processes=self.world.size,
            shared_by=self.place.shared_by,
        )


def setting_of(place: Place, execution: Execution, world: World, stop: Stop) -> Setting:
    """Return the setting of the runs of this process; print the options that have no effect on the device.

    Raises:
        BadArgument: there is no such device, or the execution is impossible on it.
    """
    device = pick_device(place.device, world)
    try:
        effective, without_effect = execution.on(device, processes=world.size)
    except ValueError as error:
        raise BadArgument(str(error)) from None
    shown = place.progress and world.is_first
    if shown and without_effect:
        print(*without_effect, sep="\n", file=sys.stderr)
    return Setting(place=place, device=device, execution=effective, world=world, stop=stop, shown=shown)


def pick_device(name: str | None, world: World) -> torch.device:
    """Return the device of that name; for None a GPU if there is one, else the CPU.

    Raises:
        BadArgument: there is no such device for this process.
    """
    count = torch.cuda.device_count()
    there = ["cpu", *(["cuda"] if count else []), *(f"cuda:{index}" for index in range(count))]
    if name is not None and name not in there:
        raise BadArgument(f"device: got {name!r}, but this PyTorch sees only {', '.join(there)}")
    if world.size == 1 or name == "cpu" or not count:
        return torch.device("cuda", 0) if name is None and count else torch.device(name or "cpu")
    if name not in (None, "cuda") or world.local_rank >= count:
        raise BadArgument(
            f"device: got {name or 'cuda'!r} for process {world.local_rank} of this machine; each process takes its "
            f"own GPU, and there are {count}: leave the option out, and start a process for each GPU"
        )
    return torch.device("cuda", world.local_rank)


def check_batch(batch_size: int, processes: int) -> None:
    """Raise BadArgument if the processes cannot share each batch equally."""
    if batch_size % processes:
        divisors = ", ".join(str(number) for number in range(1, batch_size + 1) if batch_size % number == 0)
        raise BadArgument(
            f"batch_size: got {batch_size}, which {processes} processes cannot share equally; start as many as divide "
            f"it: {divisors}"
        )
