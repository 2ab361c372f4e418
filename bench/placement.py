"""Where the cells of the table are trained: on the devices of this machine, or on a Ray cluster.

A cell is one run in its folder. Only one process at a time can train it, and it resumes from its last checkpoint
wherever it is taken up again: the folder of runs must be on storage that all machines share.

Several cells share a GPU as runs that take turns in one process, see ``memcnn.training.together``. On a CPU each cell
at a time has a process of its own, since processes use several cores.
"""

import multiprocessing
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch
from tqdm import tqdm

from memcnn.training.execution import Execution
from memcnn.training.recipe import Recipe
from memcnn.training.record import BadRecord, RunRecord, load
from memcnn.training.stopping import Stop
from memcnn.training.together import train_together
from memcnn.training.trainer import Job, Place, train

POLL_SECONDS = 1.0
RETRIES = 10
"""How often a cell is begun again on a cluster after its worker or node was lost."""


@dataclass(frozen=True)
class Cell:
    """One run: of a model on a data set with a seed."""

    model: str
    dataset: str
    seed: int

    def __str__(self) -> str:
        return f"{self.model:<9} {self.dataset:<8} s{self.seed}"


Outcome = tuple[Cell, RunRecord | Exception]


@dataclass(frozen=True)
class Settings:
    """What all cells have in common.

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
        return Job(model=cell.model, dataset=cell.dataset, seed=cell.seed, recipe=self.recipe,
                   allow_mixed=self.allow_mixed)  # fmt: skip

    def place(self, **others) -> Place:
        """Return where cells are trained; ``others`` are further fields of a `Place`."""
        return Place(data=self.data, unofficial_data=self.unofficial_data, runs=self.runs, **others)

    def folder_of(self, cell: Cell) -> Path:
        """Return the folder of a cell's run."""
        kind = _data_kind(cell.dataset, self.data, self.unofficial_data)
        return self.job(cell).folder(self.place(), data_kind=kind)

    def record_of(self, cell: Cell) -> RunRecord:
        """Return what the run of the cell has written; BadRecord where there is nothing to read."""
        return load(self.folder_of(cell))

    def stop(self) -> Stop:
        """Return a stop at the deadline."""
        seconds = self.remaining_seconds()
        return Stop(None if seconds is None else time.monotonic() + seconds)


@cache  # to know the kind of unofficial files takes a look at all of them
def _data_kind(dataset: str, data: str | None, unofficial: bool) -> str:
    return Place(data=data, unofficial_data=unofficial).data_kind(dataset)


class Lost(RuntimeError):
    """The process that trained a cell ended without a result."""


def train_cell(
    cell: Cell, settings: Settings, device: str | None, progress: bool = False, shared_by: int = 1
) -> RunRecord:
    """Train a cell in this process; `shared_by` cells share the device, in other processes too."""
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
    """Train cells in this process, `at_once` of them at a time; yield each and its outcome as it ends.

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


def on_devices(
    cells: Iterable[Cell], settings: Settings, devices: Sequence[str], jobs_per_device: int
) -> Iterator[Outcome]:
    """Train cells in processes of their own; yield each and its outcome as it ends.

    A GPU has one process, in which its cells take turns; a CPU has one for each of its `jobs_per_device` cells. After
    Ctrl-C, SIGTERM or the deadline all processes stop cleanly, and no further cell is begun.

    Args:
        cells: taken one by one when there is room.
        settings: what the cells have in common.
        devices: names of devices.
        jobs_per_device: how many cells share a device.
    """
    places = []
    for number in range(jobs_per_device):
        for device in devices:
            if not device.startswith("cuda"):
                places.append(_Place(settings, device, at_once=1, shared_by=jobs_per_device))
            elif number == 0:
                places.append(_Place(settings, device, at_once=jobs_per_device, shared_by=1))
    with settings.stop() as stop, _view(settings) as view:
        try:
            yield from _supply(places, iter(cells), stop, view)
        finally:
            for place in places:
                place.interrupt()


def _supply(places: list["_Place"], cells: Iterator[Cell], stop: Stop, view: "_Bars") -> Iterator[Outcome]:
    """Give each place a cell whenever it has room, until all are done or a stop; yield the outcomes."""
    while True:
        reason = stop.reason(needed_seconds=0.0)
        for place in places:
            if reason == "interrupted":
                place.interrupt()
            if place.has_room and reason is None and (cell := next(cells, None)):
                place.take(cell)
            elif place.asks:
                place.dismiss()
        connections = {place.connection: place for place in places if place.connection}
        if not connections:
            return
        for connection in wait(list(connections), POLL_SECONDS):
            for cell, outcome in connections[connection].receive():
                if getattr(outcome, "status", None) == "partial":  # a stop reaches the other processes as well
                    cells = iter(())
                yield cell, outcome
        view.show([cell for place in places for cell in place.running])


class _Place:
    """A process that trains cells on one device. It asks for a cell when it has room, and reports each that ends.

    Args:
        settings: what the cells have in common.
        device: the name of the device.
        at_once: how many cells take turns in the process.
        shared_by: how many such processes share the device.
    """

    def __init__(self, settings: Settings, device: str, *, at_once: int, shared_by: int) -> None:
        self.settings, self.device, self.at_once, self.shared_by = settings, device, at_once, shared_by
        self.process: multiprocessing.Process | None = None
        self.connection: Connection | None = None
        self.running: list[Cell] = []
        self.asks = self.interrupted = False

    @property
    def has_room(self) -> bool:
        """Whether a cell would be begun at once; the first one starts the process."""
        return self.asks or self.process is None

    def take(self, cell: Cell) -> None:
        """Begin a cell."""
        self.running.append(cell)
        if self.process is not None:
            self._answer(cell)
            return
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self.connection, far_end = context.Pipe()
        arguments = (far_end, cell, self.settings, self.device, self.at_once, self.shared_by)
        self.process = context.Process(target=_train_cells, args=arguments, name=self.device)
        self.process.start()
        far_end.close()

    def dismiss(self) -> None:
        """Let the process end when the cells that it trains have ended."""
        self._answer(None)

    def interrupt(self) -> None:
        """Let the process stop cleanly."""
        if self.process is not None and not self.interrupted:
            self.interrupted = True
            self.process.terminate()

    def receive(self) -> Iterator[Outcome]:
        """Read one message of the process; yield the outcomes in it."""
        try:
            message = self.connection.recv()
        except (EOFError, OSError):
            yield from self._ended()
            return
        if message is None:
            self.asks = True
        else:
            self.running.remove(message[0])
            yield message

    def _answer(self, cell: Cell | None) -> None:
        self.asks = False
        with suppress(OSError):  # it has ended, which the next message says
            self.connection.send(cell)

    def _ended(self) -> Iterator[Outcome]:
        """Yield the cells that the process has left without a report."""
        self.process.join()
        status, left = self.process.exitcode, self.running
        self.connection.close()
        self.process, self.connection, self.running, self.asks = None, None, [], False
        for cell in left:
            if not self.interrupted and status not in INTERRUPTED:
                how = f"was killed by signal {-status}" if status < 0 else "failed, see the message above"
                yield cell, Lost(f"its process {how}")


INTERRUPTED = (3, -signal.SIGTERM)  # exit statuses of a process that was interrupted before it trained


def _train_cells(
    connection: Connection, first: Cell, settings: Settings, device: str, at_once: int, shared_by: int
) -> None:
    """Train cells in this process: the first, and those that it asks for."""

    def cells() -> Iterator[Cell]:
        cell = first
        while cell is not None:
            yield cell
            connection.send(None)
            cell = connection.recv()

    try:
        for outcome in in_turns(cells(), settings, device, at_once, shared_by=shared_by):
            connection.send(outcome)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED[0])
    except Exception as error:
        sys.exit(f"{first}: {type(error).__name__}: {error}")  # status 1, and the message on standard error


def on_cluster(cells: Sequence[Cell], settings: Settings, address: str, jobs_per_device: int, *,
               num_cpus: int | None = None) -> Iterator[tuple[Cell, RunRecord | Exception]]:
    """Each cell and its outcome as it ends; a Ray task for each, begun again elsewhere when its worker or node is lost.

    Args:
        address: of a running cluster, or "local" for one of this machine that ends with the command.
        jobs_per_device: cells that share a GPU, where the cluster has any.
        num_cpus: of a local cluster; default: those of the machine.
    Raises ModuleNotFoundError without Ray, ConnectionError when there is no cluster at the address.
    """
    import ray

    root = Path(__file__).resolve().parents[1]
    local = address == "local"
    ray.init(address=None if local else address, num_cpus=num_cpus if local else None, log_to_driver=False,
             include_dashboard=False if local else None, logging_level="ERROR",
             runtime_env={"env_vars": {"PYTHONPATH": str(root)}})
    try:
        gpus = 1 / jobs_per_device if ray.cluster_resources().get("GPU") else 0
        task = ray.remote(num_cpus=settings.threads or 1, num_gpus=gpus, max_retries=RETRIES)(train_cell)
        running = {task.remote(cell, settings, None): cell for cell in cells}
        with _view(settings) as view:
            while running:
                try:
                    ended, _ = ray.wait(list(running), timeout=POLL_SECONDS)
                except KeyboardInterrupt:
                    for reference in running:
                        ray.cancel(reference)
                    ended, _ = ray.wait(list(running), num_returns=len(running))
                view.show(list(running.values()))
                for reference in ended:
                    cell = running.pop(reference)
                    yield cell, _result(ray, reference, cell, settings)
    finally:
        ray.shutdown()


def _result(ray, reference, cell: Cell, settings: Settings) -> RunRecord | Exception:
    try:
        return ray.get(reference)
    except ray.exceptions.TaskCancelledError:
        try:
            return settings.record_of(cell)
        except BadRecord as error:
            return error
    except ray.exceptions.RayTaskError as error:
        return error.cause if isinstance(error.cause, Exception) else error
    except ray.exceptions.RayError as error:
        return Lost(f"given up after {RETRIES} retries: {type(error).__name__}")


class _Bars:
    """A bar for every cell that is under way, from what its record says; nothing where nobody watches."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.bars: dict[Cell, tqdm] = {}

    def show(self, cells: Sequence[Cell]) -> None:
        if not sys.stderr.isatty():
            return
        for cell in [cell for cell in self.bars if cell not in cells]:
            self.bars.pop(cell).close()
        for cell in cells:
            try:
                record = self.settings.record_of(cell)
            except BadRecord:  # nothing written yet
                continue
            if cell not in self.bars:
                self.bars[cell] = tqdm(total=self.settings.recipe.iterations, desc=str(cell), leave=False, unit="it")
            self.bars[cell].n = record.iterations
            if record.test_accuracy is not None:
                self.bars[cell].set_postfix_str(f"test {record.test_accuracy:.2f} %", refresh=False)
            self.bars[cell].refresh()


@contextmanager
def _view(settings: Settings) -> Iterator[_Bars]:
    view = _Bars(settings)
    try:
        yield view
    finally:
        view.show([])
