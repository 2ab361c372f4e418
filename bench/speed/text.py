"""The files of ``bench.speed``: speed.csv, and the page speed.md that shows its rows."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from bench.tables import markdown
from memcnn.models.resnet import MODELS
from memcnn.training.files import write_by_rename
from reports.cells import DASH

ROWS, TRIES, PAGE = "speed.csv", "tries.csv", "speed.md"
KEYS = ["network", "execution", "group", "batch"]
COLUMNS = (
    *KEYS, "ms", "ms_low", "ms_high", "rounds", "steps", "to_plain", "to_plain_low", "to_plain_high", "gflop", "gb",
    "floor_ms", "gflop_per_second", "gb_per_second", "device_type", "device", "threads", "clock", "torch", "cuda",
    "cudnn", "python", "commit", "clean", "date",
)  # fmt: skip


def read(folder: Path) -> pd.DataFrame:
    """Read speed.csv in a device's folder; return an empty table if there is no file.

    Raises:
        ValueError: if the file lacks a column.
    """
    return read_rows(folder / ROWS, COLUMNS)


def add(folder: Path, rows: pd.DataFrame) -> pd.DataFrame:
    """Add measured rows to speed.csv; replace earlier rows of the same network, execution, group and batch.

    Returns:
        All rows of the file, in the order of the networks.
    """
    add_rows(folder / ROWS, rows, COLUMNS)
    return read(folder)


def read_rows(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """Read a file of measured rows; return an empty table if there is no file.

    Raises:
        ValueError: if the file lacks a column.
    """
    if not path.is_file():
        return pd.DataFrame(columns=list(columns))
    table = pd.read_csv(path, dtype=dict.fromkeys(("torch", "cuda", "cudnn", "python", "commit"), "string"))
    if missing := set(columns) - set(table):
        raise ValueError(f"{path}: missing columns {', '.join(sorted(missing))}; move the file away and measure again")
    return table


def add_rows(path: Path, rows: pd.DataFrame, columns: Sequence[str]) -> None:
    """Add rows to a file, ordered by network; replace earlier rows of the same network, execution, group and batch."""
    there = read_rows(path, columns)
    new = set(map(tuple, rows[KEYS].to_numpy().tolist()))
    kept = there[[tuple(key) not in new for key in there[KEYS].to_numpy().tolist()]]
    table = pd.concat([frame for frame in (kept, rows[list(columns)]) if not frame.empty], ignore_index=True)
    table = table.sort_values("network", key=lambda names: names.map(list(MODELS).index), kind="stable")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_by_rename(path, table.to_csv(index=False, float_format="%.6g", lineterminator="\n").encode())


def page(table: pd.DataFrame, command: str, floor: str, variants: pd.DataFrame | None) -> str:
    """Return all rows as a Markdown page.

    Args:
        table: the rows of speed.csv.
        command: the command that measured last.
        floor: the explanation of the floor.
        variants: the table of variants timed on a CPU; None to leave it out.
    """
    parts = [
        "# Time of a training step, beside the floor of the device",
        f"Last measured with `{command}`",
        "\n".join(f"* {line}" for line in [*origins(table), *ceilings(table)]),
        "A training step includes augmentation and update. Times are median and quartiles of n rounds, in which the "
        "executions take turns. *Together* is the number of runs in one process, each on its own stream, whose steps "
        "are interleaved; *ms a step* is then the time of a round divided by the number of steps of all these runs.",
        markdown(shown(table)),
        floor,
    ]
    if variants is not None:
        parts += ["## Variants of the step on this CPU", markdown(variants)]
    return "\n\n".join(parts) + "\n"


def origins(table: pd.DataFrame) -> list[str]:
    """Return a line for each combination of date, device, software and clock with which rows were measured."""
    names = ["date", "device", "device_type", "threads", "torch", "cuda", "cudnn", "python", "commit", "clean", "clock"]
    lines = []
    for key, rows in table.astype(object).groupby(names, dropna=False, sort=False):
        row = dict(zip(names, key, strict=True))
        threads = "" if row["device_type"] == "cuda" else f", {row['threads']:.0f} thread{'s' * (row['threads'] > 1)}"
        cuda = f", CUDA {row['cuda']}, cuDNN {row['cudnn']}" if row["device_type"] == "cuda" else ""
        changes = " with local changes" if row["clean"] is False else ""
        clock = "this process's CPU time, because other processes use the CPU too" if row["clock"] == "cpu" else "wall"
        commit = "none" if pd.isna(row["commit"]) else row["commit"][:12]
        lines.append(
            f"{', '.join(dict.fromkeys(rows['network']))}: {row['date']}, {row['device']}{threads}; torch "
            f"{row['torch']}{cuda}, Python {row['python']}, commit {commit}{changes}. Clock: {clock}."
        )
    return lines


def ceilings(table: pd.DataFrame) -> list[str]:
    """Return a line for each measurement of the device's rates. The floors are computed from these rates."""
    rates = table.assign(precision=table["execution"].str.split(",").str[0])
    lines = []
    for (precision, flops, size), rows in rates.groupby(["precision", "gflop_per_second", "gb_per_second"], sort=False):
        lines.append(
            f"Ceilings in {precision} ({', '.join(dict.fromkeys(rows['network']))}): {flops:,.0f} GFLOP/s in a matrix "
            f"product, {size:,.1f} GB/s in a copy, the best of several."
        )
    return lines


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows as text."""
    digits = [0 if kind == "cpu" else 2 for kind in table["device_type"]]

    def spread(name: str, places: list[int]) -> list[str]:
        columns = [table[f"{name}{end}"] for end in ("", "_low", "_high")]
        values = zip(*columns, places, strict=True)
        return [DASH if pd.isna(middle) else interval(middle, *rest) for middle, *rest in values]

    return pd.DataFrame(
        {
            "network": table["network"],
            "execution": table["execution"],
            "together": table["group"].map(str),
            "batch": table["batch"].map(str),
            "ms a step": spread("ms", digits),
            "n": table["rounds"].map(str),
            "to float32": spread("to_plain", [2] * len(table)),
            "GFLOP": table["gflop"].map(lambda value: f"{value:,.0f}"),
            "GB": table["gb"].map(lambda value: f"{value:.2f}"),
            "floor, ms": [f"{value:,.{d}f}" for value, d in zip(table["floor_ms"], digits, strict=True)],
            "times the floor": (table["ms"] / table["floor_ms"]).map(lambda value: f"{value:.1f}"),
        }
    )


def interval(middle: float, low: float, high: float, digits: int) -> str:
    """Return median and quartiles as text, such as "829 (817 to 863)"."""
    return f"{middle:,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"
