"""The tables of a benchmark result: ``python -m bench.summary results/bench/FILE.json``."""

import math
import sys
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pandas as pd

from bench.result import GIB, MIB, NAMES, load, origin, ratios, series_of, shapes, size, span, spread
from memcnn import cli
from reports import page, text

BUDGETS_GIB = (1, 4, 16, 80)

Section = tuple[str, str, pd.DataFrame]
"""A title, a note, and a table of text and numbers."""


def sections(results: pd.DataFrame) -> list[Section]:
    """Return all tables that the measurements allow."""
    memory, times = results[results.group == "memory"], ratios(results)
    repeats = span(times.groupby("case").size()) if len(times) else "0"
    per_repeat = f"Median [quartiles] of n = {repeats} interleaved repeats. "
    contenders_note = (
        "Time relative to plain autograd; the arithmetic of one more evaluation of F and G makes 4/3 = 1.33. Peak of "
        "the tensors beyond parameters, gradients and input, exact. Evaluations: 2 is once F and once G."
    )
    networks_note = (
        "Forward, backward, SGD. Ratio: to the same network with the engine off. Memory at the worst instant, tensors "
        "alone."
    )
    found = [
        ("Contenders", per_repeat + contenders_note, contenders(results)),
        *_memory_sections(memory),
        *_time_sections(times, per_repeat),
        ("Training step of the CIFAR networks", per_repeat + networks_note, network_table(memory, times)),
        ("Modes", per_repeat + "Milliseconds of a step.", mode_table(times)),
    ]
    return [(title, note, table.reset_index(names="").map(_shown)) for title, note, table in found if not table.empty]


def _shown(value: object) -> object:
    """Round a number to four significant digits, but not before the decimal point."""
    if not isinstance(value, float) or not math.isfinite(value) or not value:
        return value
    return round(value, max(0, 3 - math.floor(math.log10(abs(value)))))


def _memory_sections(memory: pd.DataFrame) -> Iterator[Section]:
    """Yield the tables of the memory of chains."""
    of_depth, of_law = series_of(memory, "memory", "depth"), series_of(memory, "memory", "law")
    if not of_depth.empty:
        yield (
            "Peak activation memory against depth, MiB",
            "By blocks: what the worst instant of a step holds beyond parameters, gradients and input; tensors alone, "
            "equal on every machine.",
            pivot(of_depth, "depth", "activation_bytes") / MIB,
        )
        scratch = of_depth.assign(scratch=of_depth.allocated_bytes - of_depth.peak_bytes)
        yield (
            "What the allocator gave beyond that, MiB",
            "Scratch memory that kernels borrow; it depends on the machine.",
            pivot(scratch, "depth", "scratch") / MIB,
        )
    if not of_law.empty:
        note = f"Many blocks on small tensors, {size(of_law)}."
        yield "The law of memory, KiB", note, pivot(of_law, "depth", "activation_bytes") / 1024
    fits = fit(of_depth)
    if not fits.empty:
        depths = {f"{budget} GiB": largest_depth(fits, budget * GIB) for budget in BUDGETS_GIB}
        terms = {"start, MiB": fits.a / MIB, "per block, MiB": fits.b / MIB}
        yield (
            "Largest depth per memory budget",
            "Computed, not run: from the intercept and slope of the measured peaks (parameters, gradients and input "
            f"included) at {size(of_depth)}. Contenders whose peak is no straight line are left out.",
            pd.DataFrame({**terms, "largest misfit, %": 100 * fits.misfit, **depths}).rename(index=NAMES),
        )


def _time_sections(times: pd.DataFrame, per_repeat: str) -> Iterator[Section]:
    """Yield the tables of the time of chains."""
    of_depth = series_of(times, "time", "depth")
    if not of_depth.empty:
        ratio = pivot(of_depth, "depth", "ratio", spread)
        yield "Time against depth", per_repeat + "Ratio to plain autograd, by blocks.", ratio
    for series, column, what in (("batch", "batch", "by samples in the batch"), ("width", "channels", "by channels")):
        rows = series_of(times, "time", series)
        if not rows.empty:
            note = per_repeat + f"Ratio to plain autograd, {what}; {size(rows)}."
            yield f"Time against {series}", note, pivot(rows, column, "ratio", spread)
    note = "32 blocks on 2 x 4 x 4 x 4, where the time is that of Python and of launching kernels."
    yield "Tiny tensors", per_repeat + note, tiny(times)


def pivot(rows: pd.DataFrame, column: str, value: str, how: Callable | str = "first") -> pd.DataFrame:
    """Return a table of ``value``: a row for each contender, by name and in order, a column for each ``column``."""
    table = rows.assign(**{column: rows[column].astype(int)}).pivot_table(
        index="subject", columns=column, values=value, aggfunc=how, sort=False, observed=True
    )
    table = table.reindex(index=[s for s in NAMES if s in table.index]).sort_index(axis=1)
    return table.rename(index=NAMES).rename_axis(index=None, columns=None)


def fit(rows: pd.DataFrame) -> pd.DataFrame:
    """Fit a + b * depth to the peak bytes of a step, by least squares from depth 4 on.

    Returns:
        One row for each contender: ``a`` and ``b`` in bytes, and ``misfit``, the largest relative error at a measured
        depth. Contenders measured at fewer than three depths, or with a misfit of 1 % or more, are left out.
    """
    fits = {}
    for subject, one in rows[rows.depth >= 4].groupby("subject", sort=False):
        if len(one) >= 3:
            b, a = np.polyfit(one.depth, one.peak_bytes, 1)
            fits[subject] = a, b, abs((a + b * one.depth) / one.peak_bytes - 1).max()
    table = pd.DataFrame.from_dict(fits, orient="index", columns=["a", "b", "misfit"])
    return table.reindex([s for s in NAMES if s in table.index]).query("misfit < 0.01")


def largest_depth(fits: pd.DataFrame, budget_bytes: float) -> pd.Series:
    """Return the number of blocks that fit into a budget: the largest d with a + b * d within it, see ``fit``."""
    return np.floor(np.maximum((budget_bytes - fits.a) / fits.b, 0)).astype(int)


def contenders(results: pd.DataFrame) -> pd.DataFrame:
    """Return time relative to plain, peak activations and evaluations of each contender, from the series "depth"."""
    times, memory = series_of(ratios(results), "time", "depth"), series_of(results, "memory", "depth")
    columns = {}
    deepest = max(times.depth.max(), memory.depth.max()) if len(times) and len(memory) else 0
    shown = [depth for depth in (16, 64) if depth in {*times.depth, *memory.depth}] or [int(deepest)]
    for depth in [d for d in shown if (times.depth == d).any()]:
        ratio = pivot(times[times.depth == depth], "depth", "ratio", spread)
        columns[f"time / plain, {depth} blocks"] = ratio[depth]
    for depth in [d for d in shown if (memory.depth == d).any()]:
        columns[f"peak activations, {depth} blocks, MiB"] = pivot(memory, "depth", "activation_bytes")[depth] / MIB
    deepest = memory[(memory.depth == memory.depth.max()) & (memory.branches > 0)]
    if not deepest.empty:
        per_branch = deepest.assign(per_branch=2 * deepest.evaluations / deepest.branches)
        columns["evaluations of F and G per block and step"] = pivot(per_branch, "depth", "per_branch").iloc[:, 0]
    return pd.DataFrame(columns)


def tiny(times: pd.DataFrame) -> pd.DataFrame:
    """Return the time per block of each contender on tiny tensors."""
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
    """Return the time and the memory of a training step of each network."""
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
    """Return the milliseconds of a step in each mode."""
    rows = series_of(times, "time", "mode")
    if rows.empty:
        return pd.DataFrame()
    shape = rows.depth.astype(int).astype(str) + " blocks, " + shapes(rows)
    rows = rows.assign(ms=1e3 * rows.median_s, row=shape + ", " + rows["mode"])
    table = rows.pivot_table(index="row", columns="subject", values="ms", aggfunc=spread, sort=False)
    return table.rename(columns=NAMES).rename_axis(index=None, columns=None)


def render(results: pd.DataFrame, level: str = "##") -> str:
    """Return all tables as Markdown, with the environment in which they were measured."""
    parts = [origin(results)]
    for title, note, table in sections(results):
        parts += [f"{level} {title}", note, text.markdown(page.text_frame(table))]
    return "\n\n".join(parts)


@cli.command("bench.summary")
def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables; return the exit status."""
    parser = cli.parser_from("bench.summary", __doc__, whole=True)
    parser.add_argument("result", metavar="FILE.json", help="a result of python -m bench, or a report's folder")
    try:
        print(render(load(parser.parse_args(arguments).result)))
    except ValueError as error:
        parser.error(str(error))
    return cli.DONE


if __name__ == "__main__":
    sys.exit(main())
