"""The history of the benchmark over commits: a row for each result of ``python -m bench``, in history.csv.

The file lies beside a report's data and is committed with it. Every new report adds the results beside its own.
"""

import json
from pathlib import Path

import pandas as pd

from bench.result import MIB, load, series_of, time_table
from memcnn.training.files import write_by_rename

FILE = "history.csv"
DEPTH = 16
"""The depth that quick and full runs share."""
COLUMNS = ("date", "commit", "torch", "load", "ratio", "ratio_low", "ratio_high", "activation_mib")


def row(path: Path) -> dict | None:
    """Return the row of a result; None if it lacks the chains of ``DEPTH`` blocks.

    Args:
        path: a result of ``python -m bench`` as JSON.

    Raises:
        ValueError: the file is not such a result.
    """
    results = load(path)
    own = results[results.target.isna() & (results.depth == DEPTH) & (results.subject == "reversible")]
    memory, first = series_of(own, "memory", "depth"), results.iloc[0]
    times = time_table(results[results.target.isna()]).assign(group="time")
    times = series_of(times, "time", "depth")
    times = times[(times.depth == DEPTH) & (times.subject == "reversible")].dropna(subset="ratio")
    if memory.empty or times.empty:
        return None
    changed = "" if first.clean in (True, None) else "+"
    return {
        "date": json.loads(path.read_text("utf-8")).get("datetime", "")[:16],
        "commit": f"{(first.commit or 'unknown')[:10]}{changed}",
        "torch": first.software["torch"],
        "load": round(float(results.load.max()), 1),
        **{name: round(float(times[name].iloc[0]), 4) for name in ("ratio", "ratio_low", "ratio_high")},
        "activation_mib": round(float(memory.activation_bytes.iloc[0]) / MIB, 3),
    }


def read(folder: Path) -> pd.DataFrame:
    """Return the history in a report's folder, oldest first; empty if the file is missing or has other columns."""
    path = folder / FILE
    table = pd.read_csv(path, dtype={"date": str, "commit": str}) if path.is_file() else pd.DataFrame()
    return table[list(COLUMNS)] if set(COLUMNS) <= set(table) else pd.DataFrame(columns=list(COLUMNS))


def extend(folder: Path, results: Path) -> pd.DataFrame:
    """Add the results in a folder to a report's history, and return the history. Other files there are ignored.

    Args:
        folder: the folder of the report.
        results: holds results of ``python -m bench`` as JSON.
    """
    rows = []
    for path in sorted(results.glob("*.json")):
        try:
            rows.append(row(path))
        except (ValueError, OSError):  # the folder of results may hold anything
            continue
    new = pd.DataFrame([one for one in rows if one is not None], columns=list(COLUMNS))
    there = read(folder)
    table = pd.concat([frame for frame in (there, new) if not frame.empty] or [there])
    table = table.drop_duplicates(["date", "commit"], keep="last").sort_values("date", ignore_index=True)
    if not table.empty:
        write_by_rename(folder / FILE, table.to_csv(index=False, lineterminator="\n").encode())
    return table


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """Return the history as a table of text, newest first."""
    rows = table.iloc[::-1]
    spreads = [
        f"{middle:.2f} [{low:.2f}, {high:.2f}]"
        for middle, low, high in zip(rows.ratio, rows.ratio_low, rows.ratio_high, strict=True)
    ]
    return pd.DataFrame(
        {
            "date": rows["date"].str.replace("T", " "),
            "commit": rows["commit"],
            "torch": rows["torch"],
            "load": [f"{value:.1f}" for value in rows["load"]],
            "time / plain": spreads,
            "activations MiB": [f"{value:.1f}" for value in rows["activation_mib"]],
        }
    )
