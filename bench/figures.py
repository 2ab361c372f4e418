"""Figures of a benchmark result, as SVG and PNG: ``python -m bench.figures results/bench/FILE.json [FOLDER]``.

Subjects differ in marker and line as well as in colour, so that a copy in black and white can be read. A function
returns None if the measurements that its figure needs are missing.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from bench.audit import peer_tables
from bench.result import GIB, MIB, NAMES, load, series_of, size, span, time_table
from bench.summary import fit, largest_depth
from memcnn import cli

STYLES = {  # colour (apart in shades of grey too), marker, line
    "plain": ("#b2452b", "o", "-"),
    "checkpoint": ("#6f6f6f", "s", "--"),
    "checkpoint-sqrt": ("#8f8f8f", "P", "-."),
    "keep-every-2": ("#6fa3c9", "v", ":"),
    "keep-every-4": ("#3f7fae", "D", ":"),
    "wrapped": ("#2a8c6b", "X", "--"),
    "reversible": ("#14406e", "^", "-"),
}
PEER_STYLES = {
    "MemCNN 1.5.2": ("#c98a1b", "*", "-"),
    "RevTorch": ("#8d5aa8", "<", "-"),
    "RevLib": ("#5d8a2f", ">", "-"),
}
ONE_MORE_EVALUATION = 4 / 3


def memory_against_depth(results: pd.DataFrame) -> Figure | None:
    """Draw peak activation memory (MiB) against depth (blocks)."""
    rows = series_of(results, "memory", "depth")
    if rows.depth.nunique() < 2:
        return None
    figure, axes = _axes("blocks", "peak activation memory, MiB")
    for subject, one in _by_subject(rows):
        _line(axes, subject, one.depth, one.activation_bytes / MIB)
    axes.set_ylim(0)
    axes.set_xlim(0)
    axes.set_xticks(sorted(d for d in rows.depth.unique() if d == 1 or d >= rows.depth.max() / 8))
    return _finished(figure, axes, size(rows))


def law_of_memory(results: pd.DataFrame) -> Figure | None:
    """Draw peak activation memory (KiB) against depth up to 1000 blocks, both logarithmic."""
    rows = series_of(results, "memory", "law")
    if rows.depth.nunique() < 2:
        return None
    figure, axes = _axes("blocks", "peak activation memory, KiB")
    for subject, one in _by_subject(rows):
        _line(axes, subject, one.depth, one.activation_bytes / 1024)
    _logarithmic(axes, x=rows.depth.unique(), y=[10, 30, 100, 300, 1000, 3000, 10000, 30000])
    return _finished(figure, axes, size(rows))


def time_against_depth(results: pd.DataFrame) -> Figure | None:
    """Draw the time of a step relative to plain autograd against depth (blocks)."""
    rows = series_of(time_table(results).assign(group="time"), "time", "depth")
    if rows.depth.nunique() < 2 or rows.ratio.isna().all():
        return None
    figure, axes = _axes("blocks", "time of a step / plain autograd")
    _ratio_lines(axes, rows, "depth")
    _logarithmic(axes, x=sorted(rows.depth.unique()))
    return _finished(figure, axes, f"{size(rows)}; bars: quartiles of n = {span(rows.n)} repeats")


def where_it_loses(results: pd.DataFrame) -> Figure | None:
    """Draw the time of a step relative to plain autograd against batch and against width."""
    table = time_table(results).assign(group="time")
    panels = [
        (series_of(table, "time", series), column, label)
        for series, column, label in (("batch", "batch", "samples in the batch"), ("width", "channels", "channels"))
    ]
    if any(rows.empty or rows.ratio.isna().all() for rows, *_ in panels):
        return None
    figure = Figure(figsize=(8.6, 3.4), layout="constrained")
    for axes, (rows, column, label) in zip(figure.subplots(1, 2, sharey=True), panels, strict=True):
        axes.set(xlabel=f"{label} ({size(rows)})", ylabel="time of a step / plain autograd")
        axes.spines[["top", "right"]].set_visible(False)
        axes.label_outer()
        _ratio_lines(axes, rows, column)
        _logarithmic(axes, x=sorted(rows[column].unique()))
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    return figure


def pareto(results: pd.DataFrame) -> Figure | None:
    """Draw time relative to plain against memory (MiB) at the largest depth up to 16, with the Pareto front."""
    times = series_of(time_table(results).assign(group="time"), "time", "depth")
    memory = series_of(results, "memory", "depth")
    depths = [d for d in times.depth.unique() if d <= 16 and d in set(memory.depth)]
    if not depths or times.ratio.isna().all():
        return None
    rows = times[times.depth == max(depths)].set_index("subject")
    rows["memory"] = memory[memory.depth == max(depths)].set_index("subject").activation_bytes / MIB
    title = f"{max(depths):.0f} blocks, {size(rows)}; bars: quartiles of n = {span(rows.n)} repeats"
    return _front(rows.dropna(subset=["memory", "ratio"]), title)


def pareto_of_peers(peers: dict) -> Figure:
    """Draw time relative to plain against memory (MiB) from ``bench.peers``, at its smaller depth."""
    times = peer_tables.ratios(peers["time"])
    blocks = times.blocks.min()
    groups = times[times.blocks == blocks].groupby("contender", sort=False).ratio
    memory = pd.DataFrame(peers["memory"])
    rows = pd.DataFrame(
        {
            "ratio": groups.median(),
            "ratio_low": groups.quantile(0.25),
            "ratio_high": groups.quantile(0.75),
            "memory": memory[memory.blocks == blocks].set_index("contender").peak_bytes / MIB,
        }
    )
    ours = {"ReversibleSequential": "reversible", "wrapped blocks": "wrapped", "upstream": "MemCNN 1.5.2"}
    case = "{batch} x {channels} x {side} x {side}".format(**peers["case"])
    return _front(
        rows.rename(index=ours),
        f"{blocks} blocks, input {case}, float32, gradients of the parameters "
        f"included;\nbars: quartiles of n = {peers['rounds']} rounds",
    )


def depth_per_budget(results: pd.DataFrame) -> Figure | None:
    """Draw the largest depth that fits, computed from the measured intercept and slope."""
    rows = series_of(results, "memory", "depth")
    fits = fit(rows)
    if fits.empty:
        return None
    budgets = [0.5, 1, 2, 4, 8, 16, 32, 80]
    figure, axes = _axes("memory, GiB", "largest depth, blocks")
    table = pd.DataFrame({budget: largest_depth(fits, budget * GIB) for budget in budgets})
    for subject, depths in table.iterrows():
        _line(axes, subject, depths.index, depths.where(depths > 0))
    _logarithmic(axes, x=budgets, y=[10, 30, 100, 300, 1000, 3000, 10_000, 30_000, 100_000, 300_000])
    return _finished(figure, axes, f"computed from measured intercepts and slopes; {size(rows)}")


def networks(results: pd.DataFrame) -> Figure | None:
    """Draw the time and the peak memory of a training step of the CIFAR networks."""
    table = time_table(results).assign(group="time")
    times, memory = series_of(table, "time", "network"), series_of(results, "memory", "network")
    if times.empty or memory.empty:
        return None
    names = list(dict.fromkeys(memory.network))[::-1]
    panels = (
        (times, "median_s", 1e-3, "time of a training step, ms"),
        (memory, "peak_bytes", MIB, "peak memory of a training step, MiB"),
    )
    figure = Figure(figsize=(8.6, 3.4), layout="constrained")
    for axes, (rows, column, unit, label) in zip(figure.subplots(1, 2, sharey=True), panels, strict=True):
        for subject, offset, hatch in (("plain", 0.2, ""), ("reversible", -0.2, "////")):
            one = rows[rows.subject == subject].set_index("network")
            places = [names.index(name) + (offset if name.startswith("rev") else 0) for name in one.index]
            spread = [(one.median_s - one.low_s) / unit, (one.high_s - one.median_s) / unit] if rows is times else None
            label_of = {"plain": "plain autograd", "reversible": "reversible"}[subject]
            axes.barh(
                places,
                one[column] / unit,
                0.38,
                color="white" if hatch else STYLES[subject][0],
                hatch=hatch,
                edgecolor=STYLES[subject][0],
                label=label_of,
                xerr=spread,
                capsize=2,
            )
        axes.set_xlabel(label)
        axes.set_yticks(range(len(names)), names)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    title = f"batch {memory.batch.iloc[0]:.0f}, float32, SGD; bars: quartiles of n = {span(times.n)} repeats"
    figure.legend(
        handles, labels, loc="outside upper center", ncols=2, frameon=False, fontsize=9, title=title, title_fontsize=8.5
    )
    return figure


FIGURES: dict[str, tuple[Callable[[pd.DataFrame], Figure | None], str]] = {
    "memory_against_depth": (memory_against_depth, "Peak activation memory of a training step against depth"),
    "time_against_depth": (time_against_depth, "Time of a training step against depth"),
    "pareto": (pareto, "Memory and time of every contender, with the Pareto front"),
    "where_it_loses": (where_it_loses, "Time against batch and width: Python's overhead shows where tensors are small"),
    "law_of_memory": (law_of_memory, "The law of memory: many blocks on small tensors"),
    "depth_per_budget": (depth_per_budget, "Largest depth per memory budget (computed)"),
    "networks": (networks, "The training step of the CIFAR networks"),
}


def _by_subject(rows: pd.DataFrame):
    for subject in (s for s in STYLES if s in set(rows.subject)):
        yield subject, rows[rows.subject == subject].sort_values("depth")


def _axes(x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7.6, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=x, ylabel=y)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _line(axes: Axes, subject: str, x, y, spread: list | None = None) -> None:
    colour, marker, line = STYLES[subject]
    axes.errorbar(x, y, spread, marker=marker, linestyle=line, color=colour, label=NAMES[subject], capsize=3)


def _ratio_lines(axes: Axes, rows: pd.DataFrame, column: str) -> None:
    """Draw ratios against a logarithmic axis. Subjects are slightly shifted, so that no error bar hides another."""
    there = [s for s in STYLES if s in set(rows.subject)]
    for place, subject in enumerate(there):
        one = rows[rows.subject == subject].sort_values(column)
        x = one[column] * 1.03 ** (place - (len(there) - 1) / 2)
        _line(axes, subject, x, one.ratio, [one.ratio - one.ratio_low, one.ratio_high - one.ratio])
    _reference_line(axes)


def _reference_line(axes: Axes) -> None:
    axes.axhline(
        ONE_MORE_EVALUATION, color="black", linewidth=0.8, linestyle=(0, (1, 3)), label="4/3: one more evaluation"
    )


def _front(rows: pd.DataFrame, title: str) -> Figure:
    """Draw contenders by memory (MiB) and ratio, and the Pareto front."""
    figure, axes = _axes("peak activation memory, MiB", "time of a step / plain autograd")
    for name, row in rows.iterrows():
        colour, marker, _ = {**STYLES, **PEER_STYLES}[name]
        axes.errorbar(
            row.memory,
            row.ratio,
            [[row.ratio - row.ratio_low], [row.ratio_high - row.ratio]],
            marker=marker,
            markersize=8,
            color=colour,
            linestyle="none",
            capsize=3,
            label=NAMES.get(name, name),
        )
    front = rows.sort_values(["memory", "ratio"])
    front = front[front.ratio <= front.ratio.cummin()]
    axes.step(front.memory, front.ratio, where="post", color="black", linewidth=0.8, zorder=0, label="Pareto front")
    _reference_line(axes)
    axes.set_xlim(rows.memory.min() / 1.5, rows.memory.max() * 1.5)
    _logarithmic(axes, x=[digit * 10**power for power in range(-3, 6) for digit in (1, 2, 5)])
    return _finished(figure, axes, title)


def _logarithmic(axes: Axes, x=None, y=None) -> None:
    """Set logarithmic axes with ticks at these numbers, written out."""
    for axis, ticks, limits in ((axes.xaxis, x, axes.get_xlim), (axes.yaxis, y, axes.get_ylim)):
        if ticks is not None:
            (axes.set_xscale if axis is axes.xaxis else axes.set_yscale)("log")
            low, high = limits()
            axis.set_ticks([tick for tick in ticks if low <= tick <= high])
            axis.set_minor_locator(NullLocator())
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))


def _finished(figure: Figure, axes: Axes, title: str) -> Figure:
    """Add title and legend, in which the front and the reference line come last."""
    axes.set_title(title, fontsize=8.5, loc="left")
    handles, labels = axes.get_legend_handles_labels()
    last = [labels.index(label) for label in labels if label.startswith(("Pareto", "4/3"))]
    order = [i for i in range(len(labels)) if i not in last] + last
    figure.legend(
        [handles[i] for i in order], [labels[i] for i in order], loc="outside right upper", frameon=False, fontsize=9
    )
    return figure


def draw(results: pd.DataFrame) -> dict[str, tuple[Figure, str]]:
    """Return {name: (figure, title)} for the figures that the measurements allow."""
    drawn = {name: (make(results), title) for name, (make, title) in FIGURES.items()}
    return {name: (figure, title) for name, (figure, title) in drawn.items() if figure is not None}


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as SVG or PNG (the path's suffix) with reproducible bytes, and return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # no date and no version, so that equal figures have equal bytes
    with rc_context({"svg.hashsalt": "memcnn", "savefig.dpi": 144}):
        figure.savefig(path, metadata={"Date" if path.suffix == ".svg" else "Software": None})
    return path


@cli.command("bench.figures")
def main(arguments: Sequence[str] | None = None) -> int:
    """Write the figures, print their paths; return the exit status."""
    parser = cli.parser_from("bench.figures", __doc__, whole=True)
    parser.add_argument("result", metavar="FILE.json", help="a result of python -m bench, or a report's folder")
    parser.add_argument("folder", metavar="FOLDER", nargs="?", type=cli.output_folder, default=".", help="(default: .)")
    given = parser.parse_args(arguments)
    try:
        results = load(given.result)
    except ValueError as error:
        parser.error(str(error))
    for name, (figure, _) in draw(results).items():
        print(*(save(figure, given.folder / f"{name}.{suffix}") for suffix in ("svg", "png")))
    return cli.DONE


if __name__ == "__main__":
    sys.exit(main())
