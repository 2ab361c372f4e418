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
        recipe: the training recipe.
        runs: the folder of all runs.
        data: see ``memcnn.data.load``.
        threads: CPU threads for each cell; None for PyTorch's default.
        deadline: the ``time.time()`` at which all training must have ended; None for no deadline.
        execution: how training steps run.
        unofficial_data: also train on files with wrong checksums.
        allow_mixed: also resume a run in another execution.
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
        """Return the seconds until the deadline; None without a deadline."""
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
        """Return the place in which cells train; ``others`` are further fields of ``Place``."""
        return Place(data=self.data, unofficial_data=self.unofficial_data, runs=self.runs, **others)

    def folder_of(self, cell: Cell) -> Path:
        """Return the folder of a cell's run."""
        kind = _data_kind(cell.dataset, self.data, self.unofficial_data)
        return self.job(cell).folder(self.place(), data_kind=kind)

    def record_of(self, cell: Cell) -> RunRecord:
        """Return the record of a cell's run.

        Raises:
            BadRecord: if there is no record, or it cannot be read.
        """
        return load(self.folder_of(cell))

    def stop(self) -> Stop:
        """Return a stop at the deadline."""
        seconds = self.remaining_seconds()
        return Stop(None if seconds is None else time.monotonic() + seconds)


@cache  # to recognise unofficial files it reads all of them
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
    """Train ``at_once`` cells at a time in this process. Yield each cell with its outcome when it ends.

    Args:
        cells: the cells; the next one is taken when there is room for it.
        settings: the settings that all cells share.
        device: the name of the device; None for a GPU if there is one, else the CPU.
        at_once: number of cells that take turns.
        shared_by: number of such processes that share the device.
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
