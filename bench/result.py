"""Read the measurements of one run of ``python -m bench``, and compute ratios, quartiles and descriptions of them."""

import json
from pathlib import Path

import pandas as pd

from bench import folders
from memcnn import cli
from reports.cells import DASH

MIB = 2**20
GIB = 2**30

NAMES = {
    "plain": "plain autograd",
    "checkpoint": "checkpoint per block",
    "checkpoint-sqrt": "checkpoint sqrt(n)",
    "keep-every-2": "every 2nd block stored",
    "keep-every-4": "every 4th block stored",
    "wrapped": "wrapped blocks",
    "reversible": "ReversibleSequential",
}
"""The names of the subjects, in the order of the tables."""

OPTIONAL = (
    "repeat", "depth", "batch", "channels", "side", "shape", "target", "mode", "network", "load",
    "peak_bytes", "activation_bytes", "allocated_bytes", "evaluations", "branches",
)  # fmt: skip
"""Columns that not every measurement has."""
MEASUREMENTS = "measurements.csv"


def load(path: str | Path) -> pd.DataFrame:
    """Read a result of ``python -m bench``, or the folder that ``bench.report`` made of one.

    Returns:
        One row for each measurement: ``group`` ("time" or "memory"), ``median_s``, ``rounds``, and the fields of its
        ``extra_info``, such as case, device and versions.

    Raises:
        ValueError: when there are no measurements of ``bench``.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: there is no such file or folder; wanted a result of python -m bench")
    try:
        results = _committed(path) if path.is_dir() else _measured(path)
        if results.empty or not {"group", "case", "comparison", "subject", "series"} <= set(results):
            raise KeyError("case")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path} holds no measurements of python -m bench ({type(error).__name__}); wanted its FILE.json, or the "
            "folder of a report"
        ) from None
    results["median_s"] = pd.to_numeric(results["median_s"])  # a baseline has no times: null in all rows
    return results.reindex(columns=list(dict.fromkeys([*results, *OPTIONAL])))


def _measured(path: Path) -> pd.DataFrame:
    """Return the rows of a file of pytest-benchmark."""
    benchmarks = json.loads(path.read_text("utf-8"))["benchmarks"]
    return pd.DataFrame(
        {"group": b["group"], "median_s": b["stats"]["median"], "rounds": b["stats"]["rounds"], **b["extra_info"]}
        for b in benchmarks
    )


def _committed(folder: Path) -> pd.DataFrame:
    """Return the rows of a report's folder."""
    environment = folders.read_environment(folder)
    if environment is None or not (folder / MEASUREMENTS).is_file():
        raise KeyError(MEASUREMENTS)
    results = pd.read_csv(folder / MEASUREMENTS)
    names = ("device", "software", "commit", "clean")
    return results.assign(**{name: pd.Series([environment[name]] * len(results), dtype=object) for name in names})


def ratios(results: pd.DataFrame) -> pd.DataFrame:
    """Return the time measurements with their ``ratio`` to plain autograd; NaN where plain did not run.

    A ratio compares two subjects in the same repeat, which ran one right after the other.
    """
    times = results[results.group == "time"].copy()
    keys = ["comparison", "repeat"]
    plain = times[times.subject == "plain"].set_index(keys).median_s
    times["ratio"] = times.median_s / plain.reindex(pd.MultiIndex.from_frame(times[keys])).array
    return times


def time_table(results: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each case: seconds and ratio to plain as median and quartiles over its ``n`` repeats."""
    groups = ratios(results).groupby("case", sort=False)
    names = ["series", "comparison", "subject", "depth", "batch", "channels", "side", "shape", "mode", "network"]
    rows = groups[names].first()
    quartiles = {share: groups.ratio.quantile(share) for share in (0.25, 0.5, 0.75)}
    return rows.assign(
        median_s=groups.median_s.median(),
        low_s=groups.median_s.quantile(0.25),
        high_s=groups.median_s.quantile(0.75),
        n=groups.size(),
        ratio=quartiles[0.5],
        ratio_low=quartiles[0.25],
        ratio_high=quartiles[0.75],
    )


def series_of(results: pd.DataFrame, group: str, series: str) -> pd.DataFrame:
    """Return the measurements of one group ("time" or "memory") in one series of cases."""
    return results[(results.group == group) & (results.series == series)]


def spread(values: pd.Series, digits: int | None = 2) -> str:
    """Return the median and, in brackets, the quartiles, such as ``1.70 [1.65, 1.78]``; a dash without any value.

    Args:
        values: the numbers.
        digits: decimals; None for about three significant digits.
    """
    low, median, high = values.quantile([0.25, 0.5, 0.75])
    if pd.isna(median):
        return DASH
    if digits is None:
        digits = 0 if abs(median) >= 100 else 1 if abs(median) >= 10 else 2
    return f"{median:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def span(counts: pd.Series) -> str:
    """Return "5", or "3 to 5" if the counts differ."""
    return " to ".join(str(count) for count in dict.fromkeys((counts.min(), counts.max())))


def shapes(rows: pd.DataFrame) -> pd.Series:
    """Return the shape of each row's input, as "4 x 64 x 32 x 32"."""
    sizes = [rows[name].astype(int).astype(str) for name in ("batch", "channels", "side")]
    return sizes[0] + " x " + sizes[1] + " x " + sizes[2] + " x " + sizes[2]


def size(rows: pd.DataFrame) -> str:
    """Describe the input of all rows, with "*" for a size in which they differ."""
    if rows["shape"].notna().all():
        return f"input {rows['shape'].iloc[0]}, float32"
    batch, channels, side = (
        f"{rows[name].iloc[0]:.0f}" if rows[name].nunique() == 1 else "*" for name in ("batch", "channels", "side")
    )
    return f"input {batch} x {channels} x {side} x {side}, float32"


def origin(results: pd.DataFrame) -> str:
    """Return device, threads, load, versions and commit of the measurements as text."""
    if "clean" not in results:
        raise cli.Misuse(
            "got a baseline of bench.gate, which has only bytes and evaluations; wanted a result of python -m bench"
        )
    first = results.iloc[0]
    device, software = first.device, first.software
    changes = "" if first.clean in (True, None) else " with uncommitted changes"
    clock = {"wall": "", "cpu": "; seconds are the process's own CPU time"}[device["clock"]]
    load = f"load average {results.load.min():.1f} to {results.load.max():.1f} while measuring"
    sizes = {word: device[f"{word}s"] for word in ("core", "thread")}
    size = ", ".join(f"{number} {word}{'' if number == 1 else 's'}" for word, number in sizes.items())
    return (
        f"{device['name']} ({device['type']}, {size}), {load}{clock}; "
        f"torch {software['torch']}, Python {software['python']}, memcnn {software['memcnn']}, commit "
        f"{(first.commit or 'unknown')[:12]}{changes}"
    )
