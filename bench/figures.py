"""Figures of a benchmark result, as SVG: `python -m bench.figures results/bench/FILE.json [FOLDER]`."""

import sys
from pathlib import Path

import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.summary import load, memory_table, time_table

SUBJECTS = {  # name, colour (apart in shades of grey too), marker, line
    "plain": ("ordinary autograd", "#b2452b", "o", "-"),
    "checkpoint": ("checkpoint per block", "#7a7a7a", "s", "--"),
    "keep-every-2": ("reversible, every 2nd block stored", "#9dbfd9", "v", ":"),
    "keep-every-4": ("reversible, every 4th block stored", "#5b93bd", "D", ":"),
    "reversible": ("reversible", "#14588c", "^", "-"),
}


def memory_figure(results: pd.DataFrame, folder: Path) -> Path:
    """Peak activation memory (MiB) against depth (blocks)."""
    table = memory_table(results, "tensor_activation_bytes")
    figure, axes = _axes("blocks", "peak activation memory, MiB")
    for subject, row in table.iterrows():
        _line(axes, subject, row.index, row)
    axes.set_ylim(0)
    return _save(figure, axes, table.columns, folder / "memory_against_depth.svg")


def time_figure(results: pd.DataFrame, folder: Path) -> Path:
    """Time of a step relative to ordinary autograd against depth (blocks): median and range over the repeats."""
    table = time_table(results).unstack("subject")
    figure, axes = _axes("blocks", "time of a step / ordinary autograd")
    for subject in table["ratio to plain"]:
        ratio, low, high = (table[column][subject] for column in ("ratio to plain", "lowest", "highest"))
        _line(axes, subject, ratio.index, ratio, [ratio - low, high - ratio])
    axes.axhline(4 / 3, color="black", linewidth=0.8, linestyle=":")
    axes.annotate("4/3: one more evaluation", (table.index[0], 4 / 3), (0, 3), textcoords="offset points", fontsize=8)
    return _save(figure, axes, table.index, folder / "time_against_depth.svg")


def _axes(x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=x, ylabel=y)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _line(axes: Axes, subject: str, x: pd.Index, y: pd.Series, spread: list | None = None) -> None:
    name, colour, marker, line = SUBJECTS[subject]
    axes.errorbar(x, y, spread, marker=marker, linestyle=line, color=colour, label=name, capsize=3)


def _save(figure: Figure, axes: Axes, depths: pd.Index, path: Path) -> Path:
    axes.set_xticks(list(depths))
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context({"svg.hashsalt": "memcnn"}):
        figure.savefig(path, metadata={"Date": None})
    return path


if __name__ == "__main__":
    measured, target = load(Path(sys.argv[1])), Path(sys.argv[2]) if len(sys.argv) > 2 else Path(".")
    for group, draw in (("memory", memory_figure), ("time", time_figure)):
        if (measured.group == group).any():
            print(draw(measured, target))
