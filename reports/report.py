"""Read the folders of runs, and build all data of a report."""

import platform
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import pandas as pd

from memcnn.training.environment import git_state, software_versions
from memcnn.training.record import load_all
from reports.figures import draw_curves, read_curves
from reports.tables import (
    MEASUREMENTS,
    clean,
    gpu_measurements,
    memory_table,
    results_table,
    runs_table,
    step_times,
)

RECORDS = Path(__file__).with_name("records")
"""The folder of the committed records."""


@dataclass(frozen=True)
class Report:
    """All data of a report.

    Attributes:
        results: the main table, see ``reports.tables.results_table``.
        memory: the memory table, see ``reports.tables.memory_table``.
        runs: a row for each run, see ``reports.tables.runs_table``.
        steps: the time of a training step on each device, see ``reports.tables.step_times``.
        curves: (title, SVG) pairs of training curves.
        problems: a line for each file that could not be used, with its name and the reason.
        made: date and time.
        commit: abbreviated commit of this tree.
        software: versions of the software that built the report.
    """

    results: pd.DataFrame
    memory: pd.DataFrame
    runs: pd.DataFrame
    steps: pd.DataFrame
    curves: list[tuple[str, str]]
    problems: list[str]
    made: str
    commit: str
    software: str


def build(runs: str | Path = "runs", records: str | Path = RECORDS, measurements: str | Path = MEASUREMENTS) -> Report:
    """Read all records and all measurements of memory on GPUs. A bad file is reported in ``problems``.

    Args:
        runs: folder of runs; it may be missing.
        records: folder of committed runs. If both folders hold a full run of the same model, data set and seed, the
            committed one counts.
        measurements: holds a folder for each measured device, see ``reports.tables.gpu_measurements``.
    """
    found, problems = [], []
    for folder in (records, runs):
        some, wrong = load_all(folder)
        found += some
        problems += wrong
    table = runs_table(found)
    measured, bad_measurements = gpu_measurements(measurements)
    curves, bad_curves = read_curves(table)
    steps, bad_speeds = step_times(table, measurements)
    git, software = git_state(), software_versions()
    changes = "" if git["clean"] else ", with local changes"
    names = f"memcnn {software['memcnn']}, Python {platform.python_version()}, torch {software['torch']}"
    return Report(
        results=results_table(table),
        memory=memory_table(table, measured),
        runs=table,
        steps=steps,
        curves=draw_curves(table, curves),
        problems=[clean(problem) for problem in [*problems, *bad_curves, *bad_measurements, *bad_speeds]],
        made=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        commit=f"{git['commit'][:10]}{changes}" if git["commit"] else "unknown",
        software=f"{names}, pandas {version('pandas')}",
    )
