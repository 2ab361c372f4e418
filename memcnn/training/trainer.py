"""Training one of the models on one of the data sets, in a folder of its own: stoppable at any time, and resumable."""

import errno
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import torch

from memcnn import data as cifar
from memcnn.models.resnet import MODELS
from memcnn.training import checkpoint, record
from memcnn.training.distributed import World, joined
from memcnn.training.execution import Execution
from memcnn.training.files import locked, move_aside
from memcnn.training.loop import Run
from memcnn.training.recipe import Recipe
from memcnn.training.record import RunRecord, run_name
from memcnn.training.stopping import Stop

UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}

PLAIN = Execution()


class BadArgument(ValueError):
    """What was asked for cannot be run; the message says what could."""


class CannotWrite(RuntimeError):
    """The disk is full, or the run's folder may not be written to; the checkpoints in it are as they were."""


def train(
    model_name: str,
    dataset_name: str,
    *,
    recipe: Recipe,
    seed: int = 0,
    data: str | Path | None = None,
    runs: str | Path = "runs",
    device: str | None = None,
    fresh: bool = False,
    budget_seconds: float | None = None,
    disable: bool = False,
    unofficial_data: bool = False,
    execution: Execution = PLAIN,
    progress: bool = True,
) -> RunRecord:
    """Train until the recipe is done, or stopped; the record, which also lies in RUNS/<run_name>/record.json.

    Goes on from the folder's checkpoint if there is one, and returns the record of a finished run as it is; `fresh`
    moves the old folder aside first. Stops at a clean point on Ctrl-C, on SIGTERM, and before `budget_seconds` from
    this call are over: status "partial", with the reason. A loss or weight that is no number ends it with status
    "failed"; the last good checkpoint stays, and another call goes on from there. On a CPU, with the same number of
    threads, a run that was stopped ends with the same bits as one that was not.

    data: see `memcnn.data.load`; device: by default "cuda" where there is one, else "cpu"; disable: RevNets as plain
    autograd; unofficial_data: train on files with wrong checksums too, which the record says; execution: how the steps
    are run, see `memcnn.training.execution`; progress: show it on standard error.
    In a process that torchrun started it is one run with the others, see `memcnn.training.distributed`, and
    distributed.ProcessLost where one of them is gone.
    Raises BadArgument, BadCheckpoint for a folder that holds another run (both ValueError), archives.DataNotFound and
    archives.BadData, FolderBusy while another process trains in the same folder, and CannotWrite.
    """
    deadline = None if budget_seconds is None else time.monotonic() + budget_seconds
    if model_name not in MODELS:
        raise BadArgument(f"unknown model {model_name!r}: choose one of {', '.join(MODELS)}")
    if dataset_name not in cifar.DATASETS:
        raise BadArgument(f"unknown data set {dataset_name!r}: choose one of {', '.join(cifar.DATASETS)}")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise BadArgument(f"seed: got {seed!r}, wanted a whole number from 0 up to 2**63")
    with joined(device) as world, world.noticing_losses():
        chosen_device = pick_device(device, world)
        effective = _effective(execution, chosen_device, recipe, world)
        show = progress and world.is_first
        if show and effective[1]:
            print(*effective[1], sep="\n", file=sys.stderr)
        folder = Path(runs) / run_name(model_name, dataset_name, recipe, seed)
        identity = {
            "model": model_name,
            "dataset": dataset_name,
            "seed": seed,
            "recipe": recipe.to_dict(),
            "engine": not disable,
            "official data": cifar.whereabouts(data) != cifar.GENERATED,
        }
        dataset = None
        if unofficial_data:  # only the files tell what they are
            dataset = world.in_turn(lambda: cifar.load(dataset_name, data, unofficial=True))
            identity |= {"official data": dataset.official, "data checksums": dataset.checksums}
        if not fresh and (done := world.from_first(lambda: _finished(folder, identity))):
            if show:
                print(f"{folder} is already complete; --fresh trains it anew.", file=sys.stderr)
            return done
        dataset = dataset or world.in_turn(lambda: cifar.load(dataset_name, data))
        _check_sizes(recipe, dataset)
        try:
            if fresh:
                world.from_first(lambda: _set_aside(folder))
            with ExitStack() as stack:
                dead = world.from_first(lambda: stack.enter_context(locked(folder)))
                if dead and show:
                    print(f"Taking over from {dead}, which has ended.", file=sys.stderr)
                stop = stack.enter_context(Stop(deadline))
                stack.enter_context(effective[0].settings(chosen_device))
                run = Run(
                    folder, identity, recipe, dataset, chosen_device, stop, execution=effective[0], world=world
                )
                result = run.go(shown=show)
                world.agreed(None)  # nobody leaves before all is written
                return result
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
            move_aside(folder)


def _effective(
    execution: Execution, device: torch.device, recipe: Recipe, world: World
) -> tuple[Execution, list[str]]:
    if recipe.batch_size % world.size:
        raise BadArgument(
            f"batch_size: got {recipe.batch_size}, which {world.size} processes cannot share equally; start as many "
            f"as divide it: {', '.join(str(n) for n in range(1, recipe.batch_size + 1) if recipe.batch_size % n == 0)}"
        )
    try:
        return execution.on(device, processes=world.size)
    except ValueError as error:
        raise BadArgument(str(error)) from None


def pick_device(name: str | None, world: World) -> torch.device:
    """The device of that name, None for the best; BadArgument when there is none, or none for this process."""
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
