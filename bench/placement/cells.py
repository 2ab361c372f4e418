"""A cell of the table, the settings that all cells share, and the training of cells in this process."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch

from memcnn.training.execution import Execution
from memcnn.training.recipe import Recipe
from memcnn.training.record import RunRecord, load
from memcnn.training.stopping import Stop
from memcnn.training.together import train_together
from memcnn.training.trainer import Job, Place, train


@dataclass(frozen=True)
class Cell:
    """One run: a model, a data set and a seed."""

    model: str
    dataset: str
    seed: int

    def __str__(self) -> str:
        return f"{self.model:<9} {self.dataset:<8} s{self.seed}"


Outcome = tuple[Cell, RunRecord | Exception]


@dataclass(frozen=True)
class Settings:
    """The settings that all cells share.

    Attributes:
        recipe: what to compute.
        runs: the folder of all runs.
        data: see ``memcnn.data.load``.
        threads: CPU threads of a cell; None for PyTorch's choice.
        deadline: the ``time.time()`` at which all must be over, None for none.
        execution: how the steps are run.
        unofficial_data: train on files with wrong checksums too.
        allow_mixed: resume a run in another execution, too.
    """

    recipe: Recipe
    runs: Path
    data: str | None = None
    threads: int | None = None
    deadline: float | None = None
    execution: Execution = field(default_factory=Execution)
    unofficial_data: bool = False
    allow_mixed: bool = False

    def remaining_seconds(self) -> float | None:
        """Return the seconds that are left before the deadline; None without one."""
        return None if self.deadline is None else self.deadline - time.time()

    def job(self, cell: Cell) -> Job:
        """Return the run of a cell."""
        return Job(
            model=cell.model,
            dataset=cell.dataset,
            seed=cell.seed,
            recipe=self.recipe,
            allow_mixed=self.allow_mixed,
        )

    def place(self, **others) -> Place:
        """Return where cells are trained; ``others`` are further fields of a ``Place``."""
        return Place(data=self.data, unofficial_data=self.unofficial_data, runs=self.runs, **others)

    def folder_of(self, cell: Cell) -> Path:
        """Return the folder of a cell's run."""
        kind = _data_kind(cell.dataset, self.data, self.unofficial_data)
        return self.job(cell).folder(self.place(), data_kind=kind)

    def record_of(self, cell: Cell) -> RunRecord:
        """Return the record of a cell's run.

        Raises:
            BadRecord: when there is none, or it cannot be read.
        """
        return load(self.folder_of(cell))

    def stop(self) -> Stop:
        """Return a stop at the deadline."""
        seconds = self.remaining_seconds()
        return Stop(None if seconds is None else time.monotonic() + seconds)


@cache  # for unofficial files all of them must be read
def _data_kind(dataset: str, data: str | None, unofficial: bool) -> str:
    return Place(data=data, unofficial_data=unofficial).data_kind(dataset)


class Lost(RuntimeError):
    """The process that trained a cell ended without a result."""


def train_cell(
    cell: Cell, settings: Settings, device: str | None, progress: bool = False, shared_by: int = 1
) -> RunRecord:
    """Train a cell in this process, while ``shared_by`` cells share the device."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    place = settings.place(device=device, shared_by=shared_by, progress=progress)
    return train(settings.job(cell), settings.execution, place, budget_seconds=settings.remaining_seconds())


def in_turns(
    cells: Iterable[Cell],
    settings: Settings,
    device: str | None,
    at_once: int,
    *,
    shared_by: int = 1,
    progress: bool = False,
) -> Iterator[Outcome]:
    """Train cells in this process, ``at_once`` of them at a time; yield each and its outcome as it ends.

    Args:
        cells: taken one by one when there is room.
        settings: what the cells have in common.
        device: the name of the device; None for a GPU where there is one, else the CPU.
        at_once: how many cells take turns.
        shared_by: how many processes like this one share the device.
        progress: show progress on standard error.
    """
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    outcomes = train_together(
        map(settings.job, cells),
        at_once,
        stop=settings.stop(),
        execution=settings.execution,
        place=settings.place(device=device, shared_by=shared_by, progress=progress),
    )
    for job, outcome in outcomes:
        yield Cell(job.model, job.dataset, job.seed), outcome
