"""Tables and figures of a benchmark result, for reading and for committing.

    python -m bench.report results/bench/FILE.json --out reports/bench/cpu   write the report of a run
    python -m bench.report reports/bench/cpu                                 only its page, from committed data

Data, to be committed: summary.md with its figures as SVG; measurements.csv, a row for each measurement; and
environment.json with device, versions and commit. Rendered, not committed: page.html, which needs no other file, and
the figures as PNG. They go to reports/out/bench/<device> for a folder in reports/bench, else beside the data.
"""

import json
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from bench import folders, gate, history
from bench.cases import THREE
from bench.figures import draw, pareto_of_peers, save
from bench.result import MIB, load, origin, series_of, time_table
from bench.summary import sections
from memcnn import cli
from memcnn.training.files import write_by_rename
from reports import page
from reports.cells import number
from reports.page import Figure, Page, Section

BUSY_LOAD = 1.0
"""If other processes add more than this to the load average, the page warns and leaves times out of its headline."""
SIX_DIGITS = 5e-6
"""Growth that the rounding of committed measurements explains. ``bench.gate`` compares measured files to the byte."""
BASELINES = Path(__file__).with_name("baselines")
TITLE = "What reversibility costs and saves"
PEERS = Path(__file__).resolve().parents[1] / "reports" / "peers.json"
NESTED = ("device", "software")  # columns with the same dict in all rows, which environment.json holds


def busy_warning(results: pd.DataFrame) -> str:
    """Return a warning if other processes used the CPU while the times were measured; "" if not."""
    times = results[results.group == "time"]
    device = results.iloc[0].device
    own = device["threads"] if device["type"] == "cpu" else 1
    load = times.load.max()
    if times.empty or pd.isna(load) or load <= own + BUSY_LOAD:
        return ""
    fix = "measure again on an idle machine" + (", or with --clock cpu" if device["clock"] == "wall" else "")
    return (
        f"other processes used this machine: the load average was up to {load:.1f}, and this run accounts for {own}. "
        f"Times and ratios of this run cannot be used: {fix}. Bytes and evaluations are exact."
    )


def against_baseline(results: pd.DataFrame) -> Section | None:
    """Return the section on metrics that differ from the committed baseline; None if there is nothing to compare."""
    baseline = BASELINES / f"{results.iloc[0].device['type']}.json"
    if not baseline.is_file() or not (results.series == "gate").any():
        return None
    base = load(baseline)
    try:
        changes, missing = gate.compare(base, results, gate.DEFAULT)
    except cli.Misuse as error:
        return Section("Against the committed baseline", note=f"Not compared: {error}")
    moved = [change for change in changes if abs(change.growth) > SIX_DIGITS]
    worse = sum(change.failed for change in moved)
    place = f"bench/baselines/{baseline.name}"
    summary = (
        f"{len(changes)} figures of {len({change.case for change in changes})} cases compared with {place}: {worse} "
        f"became worse, {len(moved) - worse} better, the others are equal to six digits."
    )
    rows = [
        {
            "case": change.case,
            "metric": change.metric,
            "baseline": f"{change.base:,.0f}",
            "here": f"{change.now:,.0f}",
            "change, %": per_cent(change.growth),
        }
        for change in sorted(moved, key=lambda change: -change.growth)
    ]
    notes = [f"missing here: {', '.join(sorted(missing))}"] if missing else []
    table = page.text_frame(pd.DataFrame(rows)) if rows else None
    return Section("Against the committed baseline", note=summary, table=table, notes=notes)


def per_cent(growth: float) -> str:
    """Return a change in per cent with its sign and two significant digits. Only an unchanged value shows as zero."""
    digits = max(1, 1 - math.floor(math.log10(100 * abs(growth)))) if math.isfinite(growth) else 1
    return number(100 * growth, digits, sign=True)


def headline(results: pd.DataFrame) -> list[str]:
    """Return gains and losses in sentences, from the measurements alone."""
    memory, times = series_of(results, "memory", "depth"), time_table(results)
    lines = []
    if {"plain", "checkpoint", "reversible"} <= set(memory.subject):
        depth = memory.depth.max()
        mib = memory[memory.depth == depth].set_index("subject").activation_bytes / MIB
        plain, other, ours = (f"{mib[name]:,.{0 if mib[name] >= 10 else 2}f}" for name in THREE)
        lines.append(
            f"Memory: at {depth:.0f} blocks activations take {plain} MiB in plain autograd, {other} with checkpoints, "
            f"{ours} in a reversible chain."
        )
    if busy_warning(results):
        return lines
    losses = (
        ("depth", "depth", "Time at the largest depth"),
        ("batch", "batch", "The smallest batch"),
        ("tiny", None, "Tiny tensors, where Python and kernel launches take most of the time"),
    )
    lines += [sentence for series, column, what in losses if (sentence := _loss(times, series, column, what))]
    return lines


def _loss(times: pd.DataFrame, series: str, column: str | None, what: str) -> str:
    """Return a sentence on the time relative to plain at the extreme of a series; "" if it was not measured."""
    rows = times[(times.series == series) & times.subject.isin(["reversible", "checkpoint"])].dropna(subset="ratio")
    if column is not None and not rows.empty:
        rows = rows[rows[column] == (rows[column].max() if series == "depth" else rows[column].min())]
    rows = rows.set_index("subject")
    if not {"reversible", "checkpoint"} <= set(rows.index):
        return ""
    ours, other = rows.loc["reversible"], rows.loc["checkpoint"]
    return (
        f"{what}: a reversible step takes {ours.ratio:.2f} [{ours.ratio_low:.2f}, {ours.ratio_high:.2f}] times "
        f"plain's; checkpoint per block {other.ratio:.2f} [{other.ratio_low:.2f}, {other.ratio_high:.2f}]."
    )


def write(results: pd.DataFrame, folder: Path, command: str, *, results_folder: Path | None = None) -> list[Path]:
    """Write the report of a result.

    Args:
        results: see ``bench.result.load``.
        folder: where the data goes; the rendered files go to ``folders.page_folder(folder)``.
        command: the command that makes the report, for the page.
        results_folder: folder of results of ``python -m bench`` to add to the report's history; None adds nothing.

    Returns:
        The paths of all files.
    """
    origin(results)  # refuses a baseline of the gate before anything is written
    figures = _figures(results)
    folder.mkdir(parents=True, exist_ok=True)
    past = history.read(folder) if results_folder is None else history.extend(folder, results_folder)
    written = [save(figure, folder / "figures" / f"{name}.svg") for name, (figure, _) in figures.items()]
    pictures = [Figure(title, path.read_text("utf-8"), f"figures/{path.name}")
                for path, (_, title) in zip(written, figures.values(), strict=True)]  # fmt: skip
    made = page_of(results, pictures, command, past)
    texts = {
        "summary.md": page.markdown(made),
        folders.ENVIRONMENT: json.dumps(environment(results), indent=1) + "\n",
        "measurements.csv": measurements(results),
    }
    for name, text in texts.items():
        write_by_rename(folder / name, text.encode())
        written.append(folder / name)
    return written + _write_page(made, figures, folders.page_folder(folder))


def write_page(folder: Path, command: str) -> list[Path]:
    """Render the page of committed data, and return the paths of its files.

    Args:
        folder: a folder that ``write`` wrote.
        command: the command that makes the page.
    """
    results = load(folder)
    figures, out = _figures(results), folders.page_folder(folder)
    pictures = []
    for name, (figure, title) in figures.items():
        path = save(figure, out / "figures" / f"{name}.svg")
        pictures.append(Figure(title, path.read_text("utf-8"), f"figures/{path.name}"))
    return _write_page(page_of(results, pictures, command, history.read(folder)), figures, out)


def _write_page(made: Page, figures: dict, folder: Path) -> list[Path]:
    written = [save(figure, folder / "figures" / f"{name}.png") for name, (figure, _) in figures.items()]
    write_by_rename(folder / "page.html", page.html(made).encode())
    return [*written, folder / "page.html"]


def _figures(results: pd.DataFrame) -> dict:
    """Return {name: (figure, title)}, including the figure of the peers."""
    figures = draw(results)
    if PEERS.is_file() and results.target.isna().all():
        peers = json.loads(PEERS.read_text("utf-8"))
        figures["pareto_of_peers"] = (pareto_of_peers(peers), "Beside other packages, from reports/peers.json")
    return figures


def environment(results: pd.DataFrame) -> dict:
    """Return device, versions, commit and clock of the measurements of one command."""
    first = results.iloc[0]
    load = [float(results.load.min()), float(results.load.max())]
    clean = None if pd.isna(first.clean) else bool(first.clean)
    return {**{name: first[name] for name in (*NESTED, "commit")}, "clean": clean, "load": load}


def measurements(results: pd.DataFrame) -> str:
    """Return a row for each measurement as CSV: whole numbers exactly, others to six digits."""
    table = results.drop(columns=list(NESTED))
    for name in table.select_dtypes("float"):
        if (table[name].dropna() % 1 == 0).all():
            table[name] = table[name].astype("Int64")
    return table.to_csv(index=False, float_format="%.6g", lineterminator="\n")


def page_of(results: pd.DataFrame, figures: list[Figure], command: str, past: pd.DataFrame | None = None) -> Page:
    """Return the report as a page: the main table, baseline and history, the figures, then all other tables.

    Args:
        results: see ``bench.result.load``.
        figures: the pictures.
        command: the command that makes the report.
        past: see ``bench.history.read``.
    """
    tables = [Section(title, note=note, table=page.text_frame(table)) for title, note, table in sections(results)]
    pictures = [Section(figure.title, figures=[figure]) for figure in figures]
    target = results.target.dropna()
    return Page(
        TITLE if target.empty else f"What reversibility costs and saves in {target.iloc[0]}",
        [*tables[:1], *_over_time(results, past), *pictures, *tables[1:]],
        warning=busy_warning(results),
        summary=headline(results),
        origin=[f"Measured on {origin(results)}."],
        commands=["python -m bench", command],
    )


def _over_time(results: pd.DataFrame, past: pd.DataFrame | None) -> list[Section]:
    """Return the sections that compare the results with others: the baseline and the history."""
    found = [against_baseline(results)]
    if past is not None and not past.empty and results.target.isna().all():
        note = (
            f"ReversibleSequential at {history.DEPTH} blocks, newest first; + is a tree with uncommitted changes. "
            "Compare times only where the load is about that of the run itself."
        )
        found.append(Section("History", note=note, table=page.text_frame(history.shown(past))))
    return [section for section in found if section is not None]


@cli.command("bench.report")
def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report; return the exit status."""
    parser = cli.parser_from("bench.report", __doc__, whole=True)
    parser.add_argument(
        "result", metavar="FILE.json", type=Path, help="a result of python -m bench, or a report's folder"
    )
    parser.add_argument("--out", type=cli.output_folder, help="folder of the report of FILE.json")
    given = parser.parse_args(arguments)
    if given.result.is_dir() == (given.out is not None):
        got = (
            f"the folder {given.result} with --out"
            if given.out
            else f"{given.result}, which is no folder, without --out"
        )
        parser.error(f"got {got}; wanted FILE.json with --out FOLDER, or the folder of a report without --out")
    try:
        if given.result.is_dir():
            paths = write_page(given.result, f"python -m bench.report {shlex.quote(str(given.result))}")
        else:
            command = f"python -m bench.report FILE.json --out {shlex.quote(str(given.out))}"
            paths = write(load(given.result), given.out, command, results_folder=given.result.parent)
    except (OSError, ValueError) as error:
        print(f"bench.report: {error}", file=sys.stderr)
        return 2
    print(*paths, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
