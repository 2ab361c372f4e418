"""Where the cells of the table are trained: several at once on the devices of this machine, or on a Ray cluster.

Either way a cell is one run in its folder, which only one process at a time can train, and which goes on from its last
checkpoint wherever it is taken up again: the folder of runs must be on storage that all machines share.
"""

import multiprocessing
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path

import torch
from tqdm import tqdm

from memcnn.training.execution import Execution
from memcnn.training.recipe import Recipe
from memcnn.training.record import BadRecord, RunRecord, load, run_name
from memcnn.training.trainer import train

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


@dataclass(frozen=True)
class Settings:
    """What all cells have in common. `deadline` is a time.time(), None for none."""

    recipe: Recipe
    runs: Path
    data: str | None = None
    threads: int | None = None
    deadline: float | None = None
    execution: Execution = field(default_factory=Execution)
    unofficial_data: bool = False

    def remaining_seconds(self) -> float | None:
        return None if self.deadline is None else self.deadline - time.time()

    def record_of(self, cell: Cell) -> RunRecord:
        """What the run of the cell has written. BadRecord where there is nothing to read."""
        return load(self.runs / run_name(cell.model, cell.dataset, self.recipe, cell.seed))


class Lost(RuntimeError):
    """The process that trained a cell ended without a result."""


def train_cell(cell: Cell, settings: Settings, device: str | None, progress: bool = False) -> RunRecord:
    """Train in this process."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    return train(cell.model, cell.dataset, recipe=settings.recipe, seed=cell.seed, data=settings.data,
                 runs=settings.runs, device=device, budget_seconds=settings.remaining_seconds(),
                 unofficial_data=settings.unofficial_data, execution=settings.execution, progress=progress)


def on_devices(cells: Sequence[Cell], settings: Settings, devices: Sequence[str], jobs_per_device: int
               ) -> Iterator[tuple[Cell, RunRecord | Exception]]:
    """Each cell and its outcome as it ends; a process for each of `jobs_per_device` places on each device.

    After Ctrl-C, which reaches all processes, or the deadline no further cell is begun.
    """
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    waiting, running = list(cells), {}
    free = [device for _ in range(jobs_per_device) for device in devices]
    stopped = False
    with _view(settings) as view:
        while running or (waiting and not stopped):
            stopped = stopped or (settings.deadline is not None and settings.remaining_seconds() <= 0)
            while waiting and free and not stopped:
                cell, device = waiting.pop(0), free.pop(0)
                process = context.Process(target=_trained_in_process, args=(cell, settings, device), name=str(cell))
                process.start()
                running[process.sentinel] = process, cell, device
            try:
                ended = wait(list(running), POLL_SECONDS)
            except KeyboardInterrupt:
                stopped = True
                continue
            view.show([cell for _, cell, _ in running.values()])
            for sentinel in ended:
                process, cell, device = running.pop(sentinel)
                process.join()
                free.append(device)
                outcome = _outcome(process.exitcode, cell, settings)
                stopped = stopped or getattr(outcome, "status", None) == "partial"
                yield cell, outcome


def _trained_in_process(cell: Cell, settings: Settings, device: str) -> None:
    try:
        train_cell(cell, settings, device)
    except KeyboardInterrupt:
        sys.exit(3)
    except Exception as error:
        sys.exit(f"{cell}: {type(error).__name__}: {error}")  # status 1, and the message on standard error


def _outcome(status: int, cell: Cell, settings: Settings) -> RunRecord | Exception:
    if status in (0, 3):
        try:
            return settings.record_of(cell)
        except BadRecord as error:
            return error
    how = f"was killed by signal {-status}" if status < 0 else "failed, as told above"
    return Lost(f"its process {how}")


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
