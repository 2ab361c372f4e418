"""Training one of the models on one of the data sets, in a folder of its own: stoppable at any time, and resumable."""

import sys
import time
from pathlib import Path

import torch

from memcnn import data as cifar
from memcnn.models.resnet import MODELS
from memcnn.training import checkpoint, record
from memcnn.training.files import locked, move_aside
from memcnn.training.loop import Run
from memcnn.training.recipe import Recipe
from memcnn.training.record import RunRecord, run_name
from memcnn.training.stopping import Stop


class BadArgument(ValueError):
    """What was asked for cannot be run; the message says what could."""


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
    progress: bool = True,
) -> RunRecord:
    """Train until the recipe is done, or stopped; the record, which also lies in RUNS/<run_name>/record.json.

    Goes on from the folder's checkpoint if there is one, and returns the record of a finished run as it is; `fresh`
    moves the old folder aside first. Stops at a clean point on Ctrl-C, on SIGTERM, and before `budget_seconds` from
    this call are over: status "partial", with the reason. A loss or weight that is no number ends it with status
    "failed"; the last good checkpoint stays, and another call goes on from there. On a CPU, with the same number of
    threads, a run that was stopped ends with the same bits as one that was not.

    data: see `memcnn.data.load`; device: by default "cuda" where there is one, else "cpu"; disable: RevNets as plain
    autograd; progress: show it on standard error.
    Raises BadArgument, BadCheckpoint for a folder that holds another run (both ValueError), memcnn.archives.DataNotFound,
    and FolderBusy while another process trains in the same folder.
    """
    deadline = None if budget_seconds is None else time.monotonic() + budget_seconds
    if model_name not in MODELS:
        raise BadArgument(f"unknown model {model_name!r}: choose one of {', '.join(MODELS)}")
    if dataset_name not in cifar.DATASETS:
        raise BadArgument(f"unknown data set {dataset_name!r}: choose one of {', '.join(cifar.DATASETS)}")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise BadArgument(f"seed: got {seed!r}, wanted a whole number from 0 up to 2**63")
    chosen_device = _device(device)
    folder = Path(runs) / run_name(model_name, dataset_name, recipe, seed)
    identity = {
        "model": model_name,
        "dataset": dataset_name,
        "seed": seed,
        "recipe": recipe.to_dict(),
        "engine": not disable,
        "official data": cifar.whereabouts(data) != cifar.GENERATED,
    }
    if not fresh and (done := _finished(folder, identity)):
        if progress:
            print(f"{folder} is already complete; --fresh trains it anew.", file=sys.stderr)
        return done
    dataset = cifar.load(dataset_name, data)
    _check_sizes(recipe, dataset)
    if fresh and folder.exists():
        with locked(folder):
            pass
        move_aside(folder)
    with locked(folder), Stop(deadline) as stop:
        return Run(folder, identity, recipe, dataset, chosen_device, stop).go(shown=progress)


def _device(name: str | None) -> torch.device:
    count = torch.cuda.device_count()
    if name is None:
        return torch.device("cuda", 0) if count else torch.device("cpu")
    there = ["cpu", *(["cuda"] if count else []), *(f"cuda:{index}" for index in range(count))]
    if name not in there:
        raise BadArgument(f"device: got {name!r}, but this PyTorch sees only {', '.join(there)}")
    return torch.device(name)


def _finished(folder: Path, identity: dict) -> RunRecord | None:
    try:
        found = record.load(folder)
    except record.BadRecord:
        return None
    if found.status != "complete":
        return None
    there = {name: getattr(found, name) for name in ("model", "dataset", "seed", "engine")}
    there |= {"recipe": found.recipe.to_dict(), "official data": found.data["official"]}
    checkpoint.refuse_other_run(folder / record.FILE_NAME, there, identity)
    return found


def _check_sizes(recipe: Recipe, data: cifar.Data) -> None:
    for name, wanted, there in (
        ("batch_size", recipe.batch_size, len(data.train_images)),
        ("test_images", recipe.test_images or 1, len(data.test_images)),
    ):
        if wanted > there:
            raise BadArgument(f"{name}: got {wanted}, but there are only {there} images")
