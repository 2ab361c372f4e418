"""Tables of a benchmark result: `python -m bench.summary results/bench/FILE.json`."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from bench import folders
from bench.peer_tables import spread

MIB = 2**20
GIB = 2**30
BUDGETS_GIB = (1, 4, 16, 80)

NAMES = {
    "plain": "plain autograd",
    "checkpoint": "checkpoint per block",
    "checkpoint-sqrt": "checkpoint sqrt(n)",
    "keep-every-2": "every 2nd block stored",
    "keep-every-4": "every 4th block stored",
    "wrapped": "wrapped blocks",
    "reversible": "ReversibleSequential",
}
"""Of the contenders, in order: the dial stands between plain and reversible."""

Section = tuple[str, str, pd.DataFrame]
"""Title, what is to be known about it, and a table of text and numbers."""


OPTIONAL = (
    "repeat", "depth", "batch", "channels", "side", "mode", "network", "load",
    "peak_bytes", "activation_bytes", "allocated_bytes", "evaluations", "branches",
)  # fmt: skip
"""Columns that not every measurement has."""
MEASUREMENTS = "measurements.csv"


def load(path: str | Path) -> pd.DataFrame:
    """Read a result of ``python -m bench``, or the folder that ``bench.report`` made of one.

    Returns:
        One row for each measurement: ``group`` ("time" or "memory"), ``median_s``, ``rounds``, and what is in its
        ``extra_info``, such as case, device and versions.

    Raises:
        ValueError: when there are no measurements of ``bench``.
    """
    path = Path(path)
    try:
        results = _committed(path) if path.is_dir() else _measured(path)
        if results.empty or not {"group", "case", "comparison", "subject", "series"} <= set(results):
            raise KeyError("case")
    except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} holds no measurements of python -m bench ({type(error).__name__})") from None
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
    """The time measurements, with `ratio` to plain.

    It is taken within one repeat, whose subjects ran one right after the other; nan where plain did not run.
    """
    times = results[results.group == "time"].copy()
    keys = ["comparison", "repeat"]
    plain = times[times.subject == "plain"].set_index(keys).median_s
    times["ratio"] = times.median_s / plain.reindex(pd.MultiIndex.from_frame(times[keys])).array
    return times


def time_table(results: pd.DataFrame) -> pd.DataFrame:
    """Per case: median seconds and n over the repeats, and the ratio to plain as median and quartiles."""
    groups = ratios(results).groupby("case", sort=False)
    rows = groups[["series", "comparison", "subject", "depth", "batch", "channels", "side", "mode", "network"]].first()
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
    return results[(results.group == group) & (results.series == series)]


def pivot(rows: pd.DataFrame, column: str, value: str, how: Callable | str = "first") -> pd.DataFrame:
    """Contenders, by their names and in their order, against `column`."""
    table = rows.assign(**{column: rows[column].astype(int)}).pivot_table(
        index="subject", columns=column, values=value, aggfunc=how, sort=False, observed=True
    )
    table = table.reindex(index=[s for s in NAMES if s in table.index]).sort_index(axis=1)
    return table.rename(index=NAMES).rename_axis(index=None, columns=None)


def fit(rows: pd.DataFrame) -> pd.DataFrame:
    """Peak bytes of a step as a + b depth, by least squares from depth 4 on.

    A row per contender: `a` and `b` in bytes, `misfit` the largest relative error at a measured depth. Left out are
    contenders measured at fewer than three depths, and those whose peak is no straight line within 1 %.
    """
    fits = {}
    for subject, one in rows[rows.depth >= 4].groupby("subject", sort=False):
        if len(one) >= 3:
            b, a = np.polyfit(one.depth, one.peak_bytes, 1)
            fits[subject] = a, b, abs((a + b * one.depth) / one.peak_bytes - 1).max()
    table = pd.DataFrame.from_dict(fits, orient="index", columns=["a", "b", "misfit"])
    return table.reindex([s for s in NAMES if s in table.index]).query("misfit < 0.01")


def largest_depth(fits: pd.DataFrame, budget_bytes: float) -> pd.Series:
    """How many blocks fit, by ``fit``: the largest d with a + b d within the budget."""
    return np.floor(np.maximum((budget_bytes - fits.a) / fits.b, 0)).astype(int)


def contenders(results: pd.DataFrame) -> pd.DataFrame:
    """Contenders x (time ratio to plain, peak activations, evaluations of F and G), from the series "depth"."""
    times, memory = series_of(ratios(results), "time", "depth"), series_of(results, "memory", "depth")
    columns = {}
    for depth in [d for d in (16, 64) if (times.depth == d).any()]:
        ratio = pivot(times[times.depth == depth], "depth", "ratio", spread)
        columns[f"time / plain, {depth} blocks"] = ratio[depth]
    for depth in [d for d in (16, 64) if (memory.depth == d).any()]:
        columns[f"peak activations, {depth} blocks, MiB"] = pivot(memory, "depth", "activation_bytes")[depth] / MIB
    deepest = memory[memory.depth == memory.depth.max()]
    if not deepest.empty:
        per_branch = deepest.assign(per_branch=2 * deepest.evaluations / deepest.branches)
        columns["evaluations of F and G per block and step"] = pivot(per_branch, "depth", "per_branch").iloc[:, 0]
    return pd.DataFrame(columns)


def sections(results: pd.DataFrame) -> list[Section]:
    """All tables that the measurements allow."""
    memory, times = results[results.group == "memory"], ratios(results)
    per_repeat = f"Median [quartiles] of n = {span(times.groupby('case').size())} interleaved repeats. "
    found: list[Section] = []

    def add(title: str, note: str, table: pd.DataFrame) -> None:
        if not table.empty:
            found.append((title, note, table.reset_index(names="").round(3)))

    of_depth = series_of(memory, "memory", "depth")
    add(
        "Contenders",
        per_repeat + "Time relative to plain autograd; the arithmetic of one more evaluation of F and G "
        "makes 4/3 = 1.33. Peak of the tensors beyond parameters, gradients and input, exact. Evaluations: 2 is once F "
        "and once G.",
        contenders(results),
    )
    if not of_depth.empty:
        add(
            "Peak activation memory against depth, MiB",
            "By blocks: what the worst instant of a step holds beyond "
            "parameters, gradients and input; tensors alone, equal on every machine.",
            pivot(of_depth, "depth", "activation_bytes") / MIB,
        )
        scratch = of_depth.assign(scratch=of_depth.allocated_bytes - of_depth.peak_bytes)
        add(
            "What the allocator gave beyond that, MiB",
            "Scratch that kernels borrow, which is this machine's.",
            pivot(scratch, "depth", "scratch") / MIB,
        )
    of_law = series_of(memory, "memory", "law")
    if not of_law.empty:
        add(
            "The law of memory, KiB",
            f"Many blocks on small tensors, {size(of_law)}.",
            pivot(of_law, "depth", "activation_bytes") / 1024,
        )
    fits = fit(of_depth)
    if not fits.empty:
        depths = {f"{budget} GiB": largest_depth(fits, budget * GIB) for budget in BUDGETS_GIB}
        terms = {"start, MiB": fits.a / MIB, "per block, MiB": fits.b / MIB}
        table = pd.DataFrame({**terms, "largest misfit, %": 100 * fits.misfit, **depths}).rename(index=NAMES)
        add(
            "Largest depth per memory budget",
            "Computed, not run: from the intercept and slope of the measured peaks "
            f"(parameters, gradients and input included) at {size(of_depth)}. Left out: whose peak is no line.",
            table,
        )
    of_depth_time = series_of(times, "time", "depth")
    if not of_depth_time.empty:
        add(
            "Time against depth",
            per_repeat + "Ratio to plain autograd, by blocks.",
            pivot(of_depth_time, "depth", "ratio", spread),
        )
    for series, column, what in (("batch", "batch", "by samples in the batch"), ("width", "channels", "by channels")):
        rows = series_of(times, "time", series)
        if not rows.empty:
            add(
                f"Time against {series}",
                per_repeat + f"Ratio to plain autograd, {what}; {size(rows)}.",
                pivot(rows, column, "ratio", spread),
            )
    add(
        "Tiny tensors",
        per_repeat + "32 blocks on 2 x 4 x 4 x 4: what is measured is Python and the launching of kernels.",
        tiny(times),
    )
    add(
        "Training step of the CIFAR networks",
        per_repeat + "Forward, backward, SGD. Ratio: to the same network with "
        "the engine off. Memory at the worst instant, tensors alone.",
        network_table(memory, times),
    )
    add("Modes", per_repeat + "Milliseconds of a step.", mode_table(times))
    return found


def tiny(times: pd.DataFrame) -> pd.DataFrame:
    rows = series_of(times, "time", "tiny")
    if rows.empty:
        return pd.DataFrame()
    rows = rows.assign(us=rows.median_s / rows.depth * 1e6)
    by_subject = rows.groupby("subject")
    table = pd.DataFrame(
        {"microseconds per block": by_subject.us.agg(spread, digits=0), "ratio to plain": by_subject.ratio.agg(spread)}
    )
    return table.reindex([s for s in NAMES if s in table.index]).rename(index=NAMES)


def network_table(memory: pd.DataFrame, times: pd.DataFrame) -> pd.DataFrame:
    rows = series_of(times, "time", "network")
    columns = {}
    if not rows.empty:
        groups = rows.groupby(["network", "subject"], sort=False)
        seconds = groups.median_s.median()
        columns |= {
            "batch": groups.batch.first(),
            "ms": groups.median_s.agg(lambda s: spread(1e3 * s, 0)),
            "steps/s": (1 / seconds).round(2),
            "images/s": (groups.batch.first() / seconds).round(1),
            "ratio": groups.ratio.agg(spread),
        }
    rows = series_of(memory, "memory", "network").set_index(["network", "subject"])
    kinds = ("peak", "parameter", "gradient", "optimizer", "activation")
    columns |= {f"{kind} MiB": rows[f"{kind}_bytes"] / MIB for kind in kinds if not rows.empty}
    table = pd.DataFrame(columns)
    if table.empty:
        return table
    table.index = [
        network if network.startswith("resnet") else f"{network}, engine {'off' if subject == 'plain' else 'on'}"
        for network, subject in table.index
    ]
    return table


def mode_table(times: pd.DataFrame) -> pd.DataFrame:
    rows = series_of(times, "time", "mode")
    if rows.empty:
        return pd.DataFrame()
    shape = rows.depth.astype(int).astype(str) + " blocks, " + shapes(rows)
    rows = rows.assign(ms=1e3 * rows.median_s, row=shape + ", " + rows["mode"])
    table = rows.pivot_table(index="row", columns="subject", values="ms", aggfunc=spread, sort=False)
    return table.rename(columns=NAMES).rename_axis(index=None, columns=None)


def span(counts: pd.Series) -> str:
    """ "5", or "3 to 5" where they differ."""
    return " to ".join(str(count) for count in dict.fromkeys((counts.min(), counts.max())))


def shapes(rows: pd.DataFrame) -> pd.Series:
    sizes = [rows[name].astype(int).astype(str) for name in ("batch", "channels", "side")]
    return sizes[0] + " x " + sizes[1] + " x " + sizes[2] + " x " + sizes[2]


def size(rows: pd.DataFrame) -> str:
    """The input that all rows have in common, "*" where they differ."""
    batch, channels, side = (
        f"{rows[name].iloc[0]:.0f}" if rows[name].nunique() == 1 else "*" for name in ("batch", "channels", "side")
    )
    return f"input {batch} x {channels} x {side} x {side}, float32"


def origin(results: pd.DataFrame) -> str:
    """Device, threads, load, versions, commit."""
    first = results.iloc[0]
    device, software = first.device, first.software
    changes = "" if first.clean in (True, None) else " with uncommitted changes"
    clock = {"wall": "", "cpu": "; seconds are the process's own CPU time"}[device["clock"]]
    load = f"load average {results.load.min():.1f} to {results.load.max():.1f} while measuring"
    return (
        f"{device['name']} ({device['type']}, {device['cores']} cores, {device['threads']} threads), {load}{clock}; "
        f"torch {software['torch']}, Python {software['python']}, memcnn {software['memcnn']}, commit "
        f"{(first.commit or 'unknown')[:12]}{changes}"
    )


def render(results: pd.DataFrame, level: str = "##") -> str:
    """All tables as Markdown, with the environment in which they were measured."""
    parts = [origin(results)]
    for title, note, table in sections(results):
        parts += [f"{level} {title}", note, table.to_markdown(index=False, floatfmt=".6g")]
    return "\n\n".join(parts)


if __name__ == "__main__":
    print(render(load(sys.argv[1])))
