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
from reports.tables import clean, memory_table, results_table, runs_table

RECORDS = Path(__file__).with_name("records")  # the committed ones


@dataclass(frozen=True)
class Report:
    """The tables (see reports/tables.py), the training curves as (title, SVG), and where all this comes from.

    problems: a line a record or curve that could not be used: its file and the reason.
    """

    results: pd.DataFrame
    memory: pd.DataFrame
    runs: pd.DataFrame
    curves: list[tuple[str, str]]
    problems: list[str]
    made: str
    commit: str
    software: str


def build(runs: str | Path = "runs", records: str | Path = RECORDS) -> Report:
    """Read every record in both folders; either may be missing. Never fails for what a record file holds.

    Where both hold a full run of the same model, data set and seed, the one in `records` counts.
    """
    found, problems = [], []
    for folder in (records, runs):
        some, wrong = load_all(folder)
        found += some
        problems += wrong
    table = runs_table(found)
    curves, wrong = read_curves(table)
    git, software = git_state(), software_versions()
    changes = "" if git["clean"] else ", with local changes"
    names = f"memcnn {software['memcnn']}, Python {platform.python_version()}, torch {software['torch']}"
    return Report(
        results=results_table(table),
        memory=memory_table(table),
        runs=table,
        curves=draw_curves(table, curves),
        problems=[clean(problem) for problem in [*problems, *wrong]],
        made=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        commit=f"{git['commit'][:10]}{changes}" if git["commit"] else "unknown",
        software=f"{names}, pandas {version('pandas')}",
    )
