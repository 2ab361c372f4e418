"""Train a job in the folder of its run. The run can be stopped at any time and resumed."""

import errno
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from memcnn.training import threads
from memcnn.training.distributed import process_group
from memcnn.training.execution import Execution
from memcnn.training.files import locked, move_aside
from memcnn.training.job import BadArgument, Job, Place
from memcnn.training.loop import Run
from memcnn.training.record import RunRecord
from memcnn.training.setting import Setting, check_batch, pick_device, setting_of
from memcnn.training.starting import Start, check_job
from memcnn.training.stopping import Stop
from memcnn.training.turns import Lane, Turns, finish

__all__ = ["PLAIN", "BadArgument", "CannotWrite", "Job", "Place", "pick_device", "train", "turns"]

UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
PLAIN = Execution()
HERE = Place()


class CannotWrite(RuntimeError):
    """The disk is full, or the run's folder is read-only. Its checkpoints are unchanged."""


def train(
    job: Job, execution: Execution = PLAIN, place: Place = HERE, *, budget_seconds: float | None = None
) -> RunRecord:
    """Train until the recipe is done or until a stop; return the record, which is also written as record.json.

    The run resumes from the folder's checkpoint if there is one; the record of a complete run is returned unchanged.
    The run stops after an iteration on Ctrl-C, on SIGTERM, and before the budget is used up: status "partial", with the
    reason. A loss or weight that is not finite ends it with status "failed"; the last good checkpoint remains, and
    another call resumes from there. On a CPU, with the same number of threads, a run that was stopped ends with the
    same bits as one that was not. Checkpoints are written at evaluations, at a stop, and about every 20 seconds, less
    often if writing takes more than 3 % of the time.

    In a process that torchrun started, the run is shared with the others, see ``memcnn.training.distributed``.

    Args:
        job: the model, the data set, the recipe and the seed.
        execution: the execution of steps.
        place: the folders of data and runs, and the device.
        budget_seconds: seconds from this call after which training has stopped; None for no limit.
    Raises:
        BadArgument, BadCheckpoint, MixedExecution: the request is impossible (all are ValueErrors).
        memcnn.data.DataNotFound, memcnn.data.BadData: the images are missing or damaged.
        FolderBusy: another process trains in the same folder.
        CannotWrite: the disk is full or read-only.
        distributed.ProcessLost: another process of the run has ended.
    """
    deadline = None if budget_seconds is None else time.monotonic() + budget_seconds
    with process_group(place.device) as world, world.detect_lost_process():
        stop = Stop(deadline)
        setting = setting_of(place, execution, world, stop)
        check_batch(job.recipe.batch_size, world.size)
        ready = check_job(job, setting)
        if isinstance(ready, RunRecord):
            return ready
        if setting.shown and setting.device.type == "cpu" and (slow := threads.warning(job.recipe.batch_size)):
            print(f"Warning: {slow}.", file=sys.stderr)
        with stop, setting.execution.settings(setting.device):
            result = finish(turns(ready, setting, Lane(setting.device)))
            world.first_reason(None)  # no process ends before rank 0 has written everything
            return result


def turns(start: Start, setting: Setting, lane: Lane) -> Turns[RunRecord]:
    """Train in the run's folder, and hold its lock meanwhile. ``train`` lists the exceptions."""
    folder, world = start.folder, setting.world
    with _explaining_disks(folder), ExitStack() as stack:
        with setting.clock.held():
            if start.job.fresh:
                world.on_rank_0(lambda: _set_aside(folder))
            dead = world.on_rank_0(lambda: stack.enter_context(locked(folder)))
            if dead and setting.shown:
                print(f"Taking over from {dead}, which has ended.", file=sys.stderr)
            run = Run(start, setting, lane)
        return (yield from run.turns())


@contextmanager
def _explaining_disks(folder: Path) -> Iterator[None]:
    """Raise CannotWrite for the errors of a disk that is full or read-only."""
    try:
        yield
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        raise CannotWrite(
            f"cannot write in {folder} ({error}). The last checkpoint there, if any, is as it was: when there is room "
            "and permission to write, run the same command again to resume from it. --runs FOLDER writes elsewhere."
        ) from error


def _set_aside(folder: Path) -> None:
    if folder.exists():
        with locked(folder):
            if os.name == "posix":
                move_aside(folder)
        if os.name != "posix":  # Windows does not rename a folder in which a file is open
            move_aside(folder)
