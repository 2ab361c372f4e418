"""From the folders of runs to everything a report shows, as plain data."""

import platform
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import pandas as pd

from memcnn.training.environment import git_state, software_versions
from memcnn.training.record import load_all
from reports.figures import draw_curves, read_curves
from reports.tables import MEASUREMENTS, clean, gpu_measurements, memory_table, results_table, runs_table

RECORDS = Path(__file__).with_name("records")  # the committed ones


@dataclass(frozen=True)
class Report:
    """The tables (see reports/tables.py), the training curves as (title, SVG), and where all this comes from.

    Attributes:
        problems: a line for each file that could not be used, with its name and the reason.
    """

    results: pd.DataFrame
    memory: pd.DataFrame
    runs: pd.DataFrame
    curves: list[tuple[str, str]]
    problems: list[str]
    made: str
    commit: str
    software: str


def build(runs: str | Path = "runs", records: str | Path = RECORDS, measurements: str | Path = MEASUREMENTS) -> Report:
    """Read every record, and every measurement of memory on a GPU. No content of a file makes this fail.

    Args:
        runs: folder of runs; it may be missing.
        records: folder of committed runs. Where both hold a full run of the same model, data set and seed, this one
            counts.
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
    git, software = git_state(), software_versions()
    changes = "" if git["clean"] else ", with local changes"
    names = f"memcnn {software['memcnn']}, Python {platform.python_version()}, torch {software['torch']}"
    return Report(
        results=results_table(table),
        memory=memory_table(table, measured),
        runs=table,
        curves=draw_curves(table, curves),
        problems=[clean(problem) for problem in [*problems, *bad_curves, *bad_measurements]],
        made=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        commit=f"{git['commit'][:10]}{changes}" if git["commit"] else "unknown",
        software=f"{names}, pandas {version('pandas')}",
    )
