"""Train one of the models on one of the data sets, in a folder of its own: stoppable at any time, and resumable."""

import errno
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from memcnn import data as cifar
from memcnn.models.resnet import MODELS
from memcnn.training import checkpoint, record
from memcnn.training.distributed import World, joined
from memcnn.training.execution import Execution
from memcnn.training.files import locked, move_aside
from memcnn.training.loop import Run, Setting
from memcnn.training.recipe import Recipe
from memcnn.training.record import RunRecord, run_name
from memcnn.training.stopping import Stop
from memcnn.training.turns import Lane, Turns, finish

UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}

PLAIN = Execution()


class BadArgument(ValueError):
    """What was asked for cannot be run; the message names what can."""


class CannotWrite(RuntimeError):
    """The disk is full, or the run's folder may not be written to. The checkpoints in it are as they were."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run that is asked for.

    Attributes:
        model: one of ``memcnn.models.resnet.MODELS``.
        dataset: "cifar10" or "cifar100".
        recipe: what to compute.
        seed: of weights, order and augmentation.
        data: see ``memcnn.data.load``.
        runs: the folder of all runs.
        fresh: move a run that is there already aside, and begin anew.
        disable: train RevNets as plain autograd.
        unofficial_data: train on files with wrong checksums too; the record says so.
        allow_mixed: resume a run even where it was executed differently so far; the record lists both executions.
    Raises:
        BadArgument: when a value is none of the choices.
    """

    model: str
    dataset: str
    recipe: Recipe
    seed: int = 0
    data: str | Path | None = None
    runs: str | Path = "runs"
    fresh: bool = False
    disable: bool = False
    unofficial_data: bool = False
    allow_mixed: bool = False

    def __post_init__(self) -> None:
        if self.model not in MODELS:
            raise BadArgument(f"unknown model {self.model!r}: choose one of {', '.join(MODELS)}")
        if self.dataset not in cifar.DATASETS:
            raise BadArgument(f"unknown data set {self.dataset!r}: choose one of {', '.join(cifar.DATASETS)}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise BadArgument(f"seed: got {self.seed!r}, wanted a whole number from 0 up to 2**63")

    @property
    def data_kind(self) -> str:
        """What the images are, as ``record.run_name`` takes it; the files decide where others will do as well."""
        where = cifar.whereabouts(self.data)
        if where == cifar.GENERATED:
            return cifar.GENERATED
        if not self.unofficial_data:
            return "official"
        official = cifar.files.find(self.dataset, Path(where), download=False, unofficial=True)[1]
        return "official" if official else "unofficial"

    def folder(self, *, data_kind: str | None = None, processes: int = 1) -> Path:
        """Return the run's folder; without ``data_kind`` after a look at the files."""
        name = run_name(
            self.model, self.dataset, self.recipe, self.seed,
            data=data_kind or self.data_kind, engine=not self.disable, processes=processes,
        )  # fmt: skip
        return Path(self.runs) / name


@dataclass(frozen=True)
class Start:
    """A job that can be trained: its folder, what makes it this run, and its images, which are on the device."""

    job: Job
    folder: Path
    identity: dict
    images: cifar.Data


def train(
    model_name: str,
    dataset_name: str,
    *,
    recipe: Recipe,
    device: str | None = None,
    budget_seconds: float | None = None,
    execution: Execution = PLAIN,
    shared_by: int = 1,
    progress: bool = True,
    **options,
) -> RunRecord:
    """Train until the recipe is done, or stopped; return the record, which also lies in RUNS/<run_name>/record.json.

    Goes on from the folder's checkpoint if there is one, and returns the record of a finished run as it is. Stops at a
    clean point on Ctrl-C, on SIGTERM, and before the budget is used up: status "partial", with the reason. A loss or
    weight that is not finite ends the run with status "failed"; the last good checkpoint stays, and another call goes
    on from there. On a CPU, with the same number of threads, a run that was stopped ends with the same bits as one that
    was not. Besides the checkpoints at evaluations and at a stop there is one every 20 seconds of training.

    In a process that torchrun started, it is one run with the others, see ``memcnn.training.distributed``.

    Args:
        model_name: see `Job.model`.
        dataset_name: see `Job.dataset`.
        recipe: what to compute.
        device: by default "cuda" where there is one, else "cpu".
        budget_seconds: stop before so many seconds from this call are over.
        execution: how the steps are run, see ``memcnn.training.execution``.
        shared_by: how many runs share the device, in other processes too; the record says so.
        progress: show progress on standard error.
        options: the other attributes of a `Job`.
    Raises:
        BadArgument, BadCheckpoint, MixedExecution: what was asked for cannot be done (all are ValueErrors).
        memcnn.data.DataNotFound, memcnn.data.BadData: the images are missing or damaged.
        FolderBusy: another process trains in the same folder.
        CannotWrite: the disk is full, or may not be written to.
        distributed.ProcessLost: another process of the run has ended.
    """
    deadline = None if budget_seconds is None else time.monotonic() + budget_seconds
    job = Job(model=model_name, dataset=dataset_name, recipe=recipe, **options)
    with joined(device) as world, world.noticing_losses():
        stop = Stop(deadline)
        shown = progress and world.is_first
        setting = setting_of(device, execution, world, stop, shown=shown, shared_by=shared_by)
        check_batch(recipe, world)
        ready = begin(job, setting)
        if isinstance(ready, RunRecord):
            return ready
        with stop, setting.execution.settings(setting.device):
            result = finish(turns(ready, setting, Lane(setting.device)))
            world.agreed(None)  # nobody leaves before all is written
            return result


def setting_of(
    device: str | None, execution: Execution, world: World, stop: Stop, *, shown: bool, shared_by: int = 1
) -> Setting:
    """Return what runs on a device have in common; print which options have no effect there.

    Raises:
        BadArgument: when there is no such device, or when the execution cannot be had on it.
    """
    chosen = pick_device(device, world)
    try:
        effective, without_effect = execution.on(chosen, processes=world.size)
    except ValueError as error:
        raise BadArgument(str(error)) from None
    if shown and without_effect:
        print(*without_effect, sep="\n", file=sys.stderr)
    return Setting(device=chosen, execution=effective, world=world, stop=stop, shown=shown, shared_by=shared_by)


def begin(job: Job, setting: Setting) -> Start | RunRecord:
    """Check a job and load its images; return the record instead where the run is complete. Writes nothing."""
    world = setting.world
    images = None
    if job.unofficial_data:  # the files alone decide what they are
        images = _images(job, setting)
    kind = job.data_kind if images is None else images.kind
    folder = job.folder(data_kind=kind, processes=world.size)
    identity = {
        "model": job.model,
        "dataset": job.dataset,
        "seed": job.seed,
        "recipe": job.recipe.to_dict(),
        "engine": not job.disable,
        "official data": kind == "official",
    }
    if images is not None:
        identity["data checksums"] = images.checksums
    if not job.fresh and (done := world.from_first(lambda: _finished(folder, identity))):
        if setting.shown:
            print(f"{folder} is already complete; --fresh trains it anew.", file=sys.stderr)
        return done
    images = images or _images(job, setting)
    _check_sizes(job.recipe, images)
    return Start(job, folder, identity, images)


def _images(job: Job, setting: Setting) -> cifar.Data:
    """Return a job's images on the device; they are read once for all runs of the process."""
    key = (job.dataset, cifar.whereabouts(job.data), job.unofficial_data)
    if key not in setting.images:
        how = {"unofficial": True} if job.unofficial_data else {}
        loaded = setting.world.in_turn(lambda: cifar.load(job.dataset, job.data, **how))
        setting.images[key] = loaded.to(setting.device)
    return setting.images[key]


def turns(start: Start, setting: Setting, lane: Lane) -> Turns[RunRecord]:
    """Train in the run's folder, which is locked meanwhile. See `train` for what is raised."""
    job, folder, world = start.job, start.folder, setting.world
    with _explaining_disks(folder), ExitStack() as stack:
        with setting.clock.held():
            if job.fresh:
                world.from_first(lambda: _set_aside(folder))
            dead = world.from_first(lambda: stack.enter_context(locked(folder)))
            if dead and setting.shown:
                print(f"Taking over from {dead}, which has ended.", file=sys.stderr)
            run = Run(folder, start.identity, job.recipe, start.images, setting, lane, allow_mixed=job.allow_mixed)
        return (yield from run.turns())


@contextmanager
def _explaining_disks(folder: Path) -> Iterator[None]:
    """Raise CannotWrite for the errors of a disk that is full or may not be written to."""
    try:
        yield
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        raise CannotWrite(
            f"cannot write in {folder} ({error}). The last checkpoint there, if any, is as it was: when there is "
            "room and leave to write, the same command goes on from it. --runs FOLDER writes elsewhere."
        ) from error


def _set_aside(folder: Path) -> None:
    if folder.exists():
        with locked(folder):
            if os.name == "posix":
                move_aside(folder)
        if os.name != "posix":  # Windows does not rename a folder in which a file is open
            move_aside(folder)


def check_batch(recipe: Recipe, world: World) -> None:
    """Raise BadArgument where the processes cannot share each batch equally."""
    if recipe.batch_size % world.size:
        raise BadArgument(
            f"batch_size: got {recipe.batch_size}, which {world.size} processes cannot share equally; start as many "
            f"as divide it: {', '.join(str(n) for n in range(1, recipe.batch_size + 1) if recipe.batch_size % n == 0)}"
        )


def pick_device(name: str | None, world: World) -> torch.device:
    """Return the device of that name, or the best for None; BadArgument when there is none for this process."""
    count = torch.cuda.device_count()
    there = ["cpu", *(["cuda"] if count else []), *(f"cuda:{index}" for index in range(count))]
    if name is not None and name not in there:
        raise BadArgument(f"device: got {name!r}, but this PyTorch sees only {', '.join(there)}")
    if world.size == 1 or name == "cpu" or not count:
        return torch.device("cuda", 0) if name is None and count else torch.device(name or "cpu")
    if name not in (None, "cuda") or world.local_rank >= count:
        raise BadArgument(
            f"device: got {name or 'cuda'!r} for process {world.local_rank} of this machine; each process takes a GPU "
            f"of its own, of which there are {count}: leave the option out, and start a process for each GPU"
        )
    return torch.device("cuda", world.local_rank)


def _finished(folder: Path, identity: dict) -> RunRecord | None:
    try:
        found = record.load(folder)
    except record.BadRecord:
        return None
    if found.status != "complete":
        return None
    there = {name: getattr(found, name) for name in ("model", "dataset", "seed", "engine")}
    there |= {"recipe": found.recipe.to_dict(), "official data": found.data["official"]}
    if "data checksums" in identity:
        there["data checksums"] = found.data["checksums"]
    checkpoint.refuse_other_run(folder / record.FILE_NAME, there, identity)
    return found


def _check_sizes(recipe: Recipe, data: cifar.Data) -> None:
    for name, wanted, there in (
        ("batch_size", recipe.batch_size, len(data.train_images)),
        ("test_images", recipe.test_images or 1, len(data.test_images)),
    ):
        if wanted > there:
            raise BadArgument(f"{name}: got {wanted}, but there are only {there} images")
