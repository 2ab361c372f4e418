"""Rebuild the published table of accuracy and time from the records of training runs; --train first runs missing cells.

    python -m bench.reproduce_table                       render the existing records
    python -m bench.reproduce_table --train --seeds 0-2   every model on both data sets with three seeds, then render
    python -m bench.reproduce_table --plan --budget 13m   how long each missing cell takes here, and which ones fit
    python -m bench.reproduce_table --train --budget 13m  train the longest cells that can finish in time
    python -m bench.reproduce_table --train --devices 0,1 --jobs-per-device 3   six cells at a time on two GPUs
    python -m bench.reproduce_table --train --cluster local                     a Ray task for each cell

After a stop by --budget or Ctrl-C, the same command resumes. Exit status: 0 if every wanted cell is
complete (always without --train), 3 if some are incomplete, 1 if some failed, 2 for misuse.
"""

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

import reports
from bench import planning
from bench.placement import Settings
from bench.planning import Needs
from bench.table_options import build_parser, check_places, chosen_execution, first_device
from bench.table_training import committed, is_complete, train_cells, wanted_cells
from memcnn import cli
from memcnn.training.environment import device_info
from memcnn.training.recipe import RECIPES

RESERVED_SECONDS = 10.0
"""Part of the budget that is reserved for start-up and rendering."""


@cli.command("bench.reproduce_table")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, and return the exit status."""
    started = time.monotonic()
    parser = build_parser(__doc__)
    given = parser.parse_args(arguments)
    try:
        check_places(given)
        execution = chosen_execution(given)
    except ValueError as error:
        parser.error(str(error))
    seconds = None if given.budget is None else given.budget - RESERVED_SECONDS - (time.monotonic() - started)
    settings = Settings(
        RECIPES[given.recipe],
        Path(given.runs).absolute(),
        given.data,
        given.threads,
        None if seconds is None else time.time() + seconds,
        execution,
        given.unofficial_data,
        given.allow_mixed,
    )
    if given.plan:
        print(plan(given, settings))
        return 0
    status = 0
    if given.train:
        try:
            status = train_cells(given, settings)
        except ModuleNotFoundError as error:
            if error.name != "ray":
                raise
            parser.error("--cluster needs Ray: pip install ray, or use --devices, which needs no further package")
        except ConnectionError as error:
            parser.error(f"--cluster {given.cluster}: {error}")
    report = reports.build(given.runs, given.records)
    paths = reports.write(report, given.out)
    print(reports.terminal(report, width=min(120, shutil.get_terminal_size((120, 24)).columns)))
    print("\nWritten", *paths, sep="\n  ")
    return status


def plan(given: argparse.Namespace, settings: Settings) -> str:
    """Return a table of the time of each missing cell on this device, and of the cells that fit into the budget."""
    device, at_once = first_device(given), given.jobs_per_device or 1
    settings = replace(settings, execution=settings.execution.on(device)[0])
    missing = [cell for cell in wanted_cells(given) if not (committed(given, cell) or is_complete(settings, cell))]
    if not missing:
        return "No cell is missing."
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    needs, found = Needs(settings, device, at_once, use_records=False), []
    for cell in missing:
        if cell.model not in {need.cell.model for need in found}:
            print(f"Timing {cell.model} ...", file=sys.stderr, flush=True)
        found.append(needs.of(cell))
    budget = None if given.budget is None else max(0.0, given.budget - RESERVED_SECONDS)
    lanes = at_once * len(given.devices or [device])
    title = f"{device_info(device)['name']}, {settings.execution}, {settings.recipe.name} recipe"
    return f"{title}\n\n{planning.table(found, budget, at_once, lanes)}"


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")
    sys.exit(main())
