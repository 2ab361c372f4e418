"""Train cells on a Ray cluster."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.placement.cells import Cell, Lost, Outcome, Settings, train_cell
from bench.placement.progress import POLL_SECONDS, bars
from memcnn.training.record import BadRecord, RunRecord

RETRIES = 10
"""Number of times that a cell is restarted after its worker or node was lost."""


def on_cluster(
    cells: Sequence[Cell], settings: Settings, address: str, jobs_per_device: int, *, num_cpus: int | None = None
) -> Iterator[Outcome]:
    """Train cells as Ray tasks. Yield each cell with its outcome when it ends.

    If a worker or node is lost, its cells restart elsewhere, each at most ``RETRIES`` times.

    Args:
        cells: the cells.
        settings: the settings that all cells share.
        address: address of a running cluster, or "local" to start one on this machine for this command.
        jobs_per_device: number of cells that share a GPU, if the cluster has GPUs.
        num_cpus: CPUs of a local cluster; all CPUs of the machine by default.

    Raises:
        ModuleNotFoundError: if Ray is not installed.
        ConnectionError: if there is no cluster at the address.
    """
    import ray

    root = Path(__file__).resolve().parents[2]
    local = address == "local"
    ray.init(
        address=None if local else address,
        num_cpus=num_cpus if local else None,
        log_to_driver=False,
        include_dashboard=False if local else None,
        logging_level="ERROR",
        runtime_env={"env_vars": {"PYTHONPATH": str(root)}},
    )
    try:
        gpus = 1 / jobs_per_device if ray.cluster_resources().get("GPU") else 0
        task = ray.remote(num_cpus=settings.threads or 1, num_gpus=gpus, max_retries=RETRIES)(train_cell)
        running = {task.remote(cell, settings, None): cell for cell in cells}
        with bars(settings) as view:
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
    """Return the record of a task that has ended, or the exception that explains why there is none."""
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
