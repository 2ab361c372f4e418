"""The cells of the table that a command line asks for, and the training of the missing ones."""

import argparse
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

from tqdm import tqdm

from bench import planning
from bench.placement import Cell, Outcome, Settings, in_turns, on_cluster, on_devices, train_cell
from bench.planning import Needs
from bench.table_options import first_device
from memcnn.data import GENERATED, whereabouts
from memcnn.training.recipe import RECIPES
from memcnn.training.record import BadRecord, RunRecord, load, run_name
from memcnn.training.text import clean
from reports import cells

TIMING_SHARE = 0.25
"""Share of the budget after which no further network is timed."""


def wanted_cells(given: argparse.Namespace) -> list[Cell]:
    """Return the cells, ordered by seed, data set (CIFAR-10 first) and model."""
    return [Cell(model, dataset, seed) for seed, dataset, model in product(given.seeds, given.datasets, given.models)]


def train_cells(given: argparse.Namespace, settings: Settings) -> int:
    """Train every wanted cell that is not complete, print a line for each cell, and return the exit status."""
    wanted = wanted_cells(given)
    numbers = {cell: f"[{place:>{len(str(len(wanted)))}}/{len(wanted)}]" for place, cell in enumerate(wanted, 1)}
    complete, failures, stopped, left_out = 0, [], None, []
    for cell, outcome in _outcomes(wanted, settings, given, left_out):
        line = f"{numbers[cell]} {cell}  "
        if isinstance(outcome, Exception):
            text = clean(f"{type(outcome).__name__}: {outcome}")
            _print(f"{line}failed: {'as above' if text in failures else text}")
            failures.append(text)
            continue
        _print(line + _line_of(outcome))
        complete += outcome.status == "complete"
        if outcome.status == "failed":
            failures.append(outcome.reason)
        if outcome.status == "partial":
            stopped = outcome.reason
    if not stopped and complete + len(failures) + len(left_out) < len(wanted):
        used_up = settings.deadline is not None and settings.remaining_seconds() <= 0
        stopped = "budget exhausted" if used_up else "interrupted"
    parts = [f"{complete} of {len(wanted)} cells complete"]
    if failures:
        parts.append(f"{len(failures)} failed")
    if left_out:
        parts.append(f"{len(left_out)} not started for lack of time")
    if stopped:
        parts.append(f"stopped ({stopped}); the same command resumes from here")
    _print(", ".join(parts) + ".\n")
    if failures:
        return 1
    return 0 if complete == len(wanted) else 3


def _print(text: str) -> None:
    """Print a line above the progress bars."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


def _outcomes(
    wanted: list[Cell], settings: Settings, given: argparse.Namespace, left_out: list[Cell]
) -> Iterator[Outcome]:
    """Yield each cell that starts before a stop, with its record or its exception. After an exception, continue.

    Cells that do not fit into the budget are added to ``left_out``.
    """
    missing = []
    for cell in wanted:
        if record := committed(given, cell):
            yield cell, record
        else:
            missing.append(cell)
    at_once, cells = given.jobs_per_device or 1, iter(missing)
    if settings.deadline is not None and not given.cluster:
        cells = _fitting(missing, settings, given, left_out)
    if given.cluster:
        yield from on_cluster(missing, settings, given.cluster, at_once)
    elif given.devices:
        yield from on_devices(cells, settings, given.devices, at_once)
    elif at_once == 1:
        yield from _one_by_one(cells, settings, given.device)
    elif first_device(given).type == "cuda":
        yield from in_turns(cells, settings, str(first_device(given)), at_once, progress=sys.stderr.isatty())
    else:
        yield from on_devices(cells, settings, ["cpu"], at_once)


def _fitting(
    missing: list[Cell], settings: Settings, given: argparse.Namespace, left_out: list[Cell]
) -> Iterator[Cell]:
    """Yield first the complete cells, then the cells to train within the budget, each when there is room for it."""
    pending = []
    for cell in missing:
        if is_complete(settings, cell):
            yield cell
        else:
            pending.append(cell)
    device = first_device(given)
    if settings.remaining_seconds() <= 0 or not pending:
        return
    settings = replace(settings, execution=settings.execution.on(device)[0])
    needs, found = Needs(settings, device, given.jobs_per_device or 1, use_records=True), []
    last = settings.deadline - (1 - TIMING_SHARE) * settings.remaining_seconds()
    for cell in pending:
        if needs.knows(cell) or time.time() < last:
            found.append(needs.of(cell))
        else:
            left_out.append(cell)
            _print(f"{cell}  not started: a quarter of the budget is used up for timing other networks")
    for cell in planning.cells_to_start(found, settings.remaining_seconds, _print):
        found = [need for need in found if need.cell != cell]
        yield cell
    left_out += [need.cell for need in found]


def is_complete(settings: Settings, cell: Cell) -> bool:
    """Return True if the run of a cell is complete."""
    try:
        return settings.record_of(cell).status == "complete"
    except BadRecord:
        return False


def _one_by_one(cells: Iterable[Cell], settings: Settings, device: str | None) -> Iterator[Outcome]:
    """Train the cells one after the other in this process. Yield each cell with its outcome."""
    for cell in cells:
        remaining_seconds = settings.remaining_seconds()
        if remaining_seconds is not None and remaining_seconds <= 0:
            return
        try:
            record = train_cell(cell, settings, device, progress=sys.stderr.isatty())
        except KeyboardInterrupt:
            return
        except Exception as error:
            yield cell, error
            continue
        yield cell, record
        if record.status == "partial":
            return


def committed(given: argparse.Namespace, cell: Cell) -> RunRecord | None:
    """Return the cell's complete run from the committed records, if there is one on the requested data."""
    try:
        kind = GENERATED if whereabouts(given.data) == GENERATED else "official"
        name = run_name(cell.model, cell.dataset, RECIPES[given.recipe], cell.seed, data=kind)
        record = load(Path(given.records) / name)
    except BadRecord:
        return None
    official = kind == "official"
    return record if record.status == "complete" and record.engine and record.data["official"] == official else None


def _line_of(record: RunRecord) -> str:
    """Return accuracy, time and status of a run as text; if the run is not complete, also its progress and reason."""
    accuracy = cells.DASH if record.test_accuracy is None else f"{record.test_accuracy:.1f}"
    words = f"accuracy {accuracy:>5} %  {cells.duration(record.train_seconds):>5}  {record.status}{record.mark}"
    if record.status == "complete":
        return words
    return f"{words} at {record.iterations}/{record.recipe.iterations}: {record.reason}"
