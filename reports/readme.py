"""Write the table of results at the top of the README from the committed records.

python -m reports.readme    write the table into README.md, between the two comments that mark its place
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from memcnn import cli
from memcnn.models.resnet import MODELS
from memcnn.training.files import write_by_rename
from memcnn.training.record import DATASETS
from reports import cells, notes, text
from reports.report import RECORDS, Report, build
from reports.verdict import NOT_ENOUGH

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- results: python -m reports.readme -->", "<!-- end of results -->"


class NoPlace(ValueError):
    """Raised if the README lacks the two comments that mark the place of the table."""


def block(report: Report) -> str:
    """Return both data sets as one Markdown table, sentences that explain it, and a list with the runs of each cell.

    The report must hold only committed records, because a reader of the README has no others.
    """
    columns = {("", "model"): [cells.LABELS[model] for model in MODELS]}
    for dataset in DATASETS:
        table = cells.results(report.results, dataset)
        label = cells.LABELS[dataset]
        for group, name in ((cells.TENSORFLOW, "TensorFlow"), (cells.PYTORCH, "PyTorch")):
            pairs = zip(table[group, "accuracy %"], table[group, "time"], strict=True)
            columns["", f"{label} {name}"] = [f"{accuracy}, {time}" for accuracy, time in pairs]
        columns["", f"{label} this project"] = [_ours(row) for _, row in table[cells.OURS].iterrows()]
    runs = "\n".join(f"- {text.escape_markdown(line)}" for line in notes.executions(report.runs))
    state = text.escape_markdown(" ".join(_state(report)))
    return "\n\n".join(part for part in (text.markdown(pd.DataFrame(columns)), state, runs) if part)


def _ours(row: pd.Series) -> str:
    """Return accuracy, time, number of runs and, if there is one, the verdict; a dash without a full run."""
    if row["runs"] == "0":
        return cells.DASH
    words = [f"{row['accuracy %']}, {row['time']}, n = {row['runs']}"]
    if row["verdict"] != NOT_ENOUGH:
        words.append(row["verdict"])
    return ": ".join(words)


def _state(report: Report) -> list[str]:
    """Return sentences that explain the cells and count their verdicts."""
    empty = int((report.results["n"] == 0).sum())
    sentences = [notes.RUNS] if empty < len(report.results) else []
    if (report.results["shared_by"] > 1).any():
        sentences.append(notes.SHARED)
    sentences.append(notes.summary(report.results))
    if empty:
        sentences.append(f"A dash: no full run ({empty} of {len(report.results)}).")
    return sentences


def inserted(readme: str, content: str) -> str:
    """Return the README with ``content`` between its two comments.

    Raises:
        NoPlace: if the comments are missing, repeated or in the wrong order.
    """
    parts = [readme.partition(BEGIN)[0], readme.partition(BEGIN)[2].partition(END)[2]]
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise NoPlace(
            f"wanted {BEGIN} and {END} in the file, once each and in this order; put them back around the table"
        )
    return f"{parts[0]}{BEGIN}\n\n{content}\n\n{END}{parts[1]}"


@cli.command("reports.readme")
def main(arguments: Sequence[str] | None = None) -> int:
    """Write the table; return 0, or 2 if the README has no place for it."""
    cli.parser_from("reports.readme", __doc__, whole=True).parse_args(arguments)
    report = build(runs=RECORDS, records=RECORDS)
    try:
        content = inserted(README.read_text("utf-8"), block(report))
    except NoPlace as error:
        print(f"{README}: {error}", file=sys.stderr)
        return 2
    write_by_rename(README, content.encode())
    print(f"Written {README}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
