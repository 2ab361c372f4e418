"""Tables and figures of a benchmark result, for reading and for committing.

    python -m bench.report results/bench/FILE.json --out reports/bench/cpu

Writes summary.md with its figures, page.html, which needs no other file, measurements.csv, a row per measurement, and
environment.json, which says where and with what they were made.
"""

import argparse
import base64
import json
import shlex
import sys
from pathlib import Path

import jinja2
import pandas as pd

from bench import folders
from bench.figures import draw, pareto_of_peers, save
from bench.summary import MIB, load, origin, sections, series_of, time_table
from memcnn.training.files import write_by_rename

TITLE = "What reversibility costs and saves"
PEERS = Path(__file__).resolve().parents[1] / "reports" / "peers.json"
NESTED = ("device", "software")  # the same in all rows: in environment.json


def headline(results: pd.DataFrame) -> list[str]:
    """Gains and losses in sentences, from the measurements alone."""
    memory, times = series_of(results, "memory", "depth"), time_table(results)
    lines = []
    if {"plain", "checkpoint", "reversible"} <= set(memory.subject):
        depth = memory.depth.max()
        mib = memory[memory.depth == depth].set_index("subject").activation_bytes / MIB
        lines.append(f"Memory: at {depth:.0f} blocks activations take {mib['plain']:.0f} MiB in plain autograd, "
                     f"{mib['checkpoint']:.0f} with checkpoints, {mib['reversible']:.0f} in a reversible chain.")

    def loss(series: str, pick: pd.Series | None, what: str) -> None:
        rows = times[(times.series == series) & times.subject.isin(["reversible", "checkpoint"])].dropna(subset="ratio")
        if pick is not None and not rows.empty:
            rows = rows[rows[pick] == (rows[pick].max() if series == "depth" else rows[pick].min())]
        rows = rows.set_index("subject")
        if {"reversible", "checkpoint"} <= set(rows.index):
            ours, other = rows.loc["reversible"], rows.loc["checkpoint"]
            lines.append(f"{what}: a reversible step takes {ours.ratio:.2f} [{ours.ratio_low:.2f}, "
                         f"{ours.ratio_high:.2f}] times plain's; checkpoint per block {other.ratio:.2f} "
                         f"[{other.ratio_low:.2f}, {other.ratio_high:.2f}].")

    loss("depth", "depth", "Time at the largest depth")
    loss("batch", "batch", "The smallest batch")
    loss("tiny", None, "Tiny tensors, where Python and launches are all there is")
    return lines


def write(results: pd.DataFrame, folder: Path, command: str) -> list[Path]:
    """Write the files of the report; return their paths."""
    figures = draw(results)
    if PEERS.is_file():
        peers = json.loads(PEERS.read_text("utf-8"))
        figures["pareto_of_peers"] = (pareto_of_peers(peers), "Beside other packages, from reports/peers.json")
    folder.mkdir(parents=True, exist_ok=True)
    written = [path for name, (figure, _) in figures.items() for path in save(figure, folder / "figures" / name)]
    pictures = [(title, (folder / "figures" / f"{name}.svg").read_bytes()) for name, (_, title) in figures.items()]
    texts = {"summary.md": markdown(results, {n: t for n, (_, t) in figures.items()}, command),
             "page.html": html(results, pictures, command),
             folders.ENVIRONMENT: json.dumps(environment(results), indent=1) + "\n",
             "measurements.csv": results.drop(columns=list(NESTED)).to_csv(index=False, float_format="%.6g",
                                                                           lineterminator="\n")}
    for name, text in texts.items():
        write_by_rename(folder / name, text.encode())
        written.append(folder / name)
    return written


def environment(results: pd.DataFrame) -> dict:
    """Return device, versions, commit and clock of the measurements of one command."""
    first = results.iloc[0]
    load = [float(results.load.min()), float(results.load.max())]
    clean = None if pd.isna(first.clean) else bool(first.clean)
    return {**{name: first[name] for name in (*NESTED, "commit")}, "clean": clean, "load": load}


def markdown(results: pd.DataFrame, figures: dict[str, str], command: str) -> str:
    parts = [f"# {TITLE}", f"Made by `python -m bench`, then `{command}`.", f"Measured on {origin(results)}.",
             "\n".join(f"* {line}" for line in headline(results))]
    tables = [f"## {title}\n\n{note}\n\n{table.to_markdown(index=False, floatfmt='.6g')}"
              for title, note, table in sections(results)]
    pictures = [f"## {title}\n\n![{title}](figures/{name}.svg)" for name, title in figures.items()]
    parts += [*tables[:1], *pictures, *tables[1:]]
    return "\n\n".join(part for part in parts if part) + "\n"


def html(results: pd.DataFrame, pictures: list[tuple[str, bytes]], command: str) -> str:
    """Return one page that needs no other file, with pictures of (title, SVG)."""
    return page(
        title=TITLE, origin=origin(results), headline=headline(results), sections=sections(results),
        pictures=pictures, command=f"python -m bench, then {command}",
    )  # fmt: skip


def page(
    *, title: str, origin: str, headline: list[str], sections: list, pictures: list[tuple[str, bytes]], command: str
) -> str:
    """Return tables and pictures as one page that needs no other file. All text in it is escaped."""
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True,
                                     undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    tables = [(title, note, list(table), [[_cell(value) for value in row] for row in table.itertuples(index=False)])
              for title, note, table in sections]
    return environment.get_template("page.html").render(
        title=title, origin=origin, headline=headline, tables=tables, command=command,
        pictures=[(title, base64.b64encode(picture).decode()) for title, picture in pictures])


def _cell(value: object) -> str:
    return value if isinstance(value, str) else "" if pd.isna(value) else f"{value:.6g}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.report", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", metavar="FILE.json", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder of the report")
    options = parser.parse_args()
    try:
        results = load(options.result)
    except (OSError, ValueError) as error:
        print(f"bench.report: {error}", file=sys.stderr)
        return 2
    command = f"python -m bench.report FILE.json --out {shlex.quote(str(options.out))}"
    print(*write(results, options.out, command), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
