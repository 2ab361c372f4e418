"""Every fault before every law, as a Markdown table: `python -m properties.zoo [--out reports/zoo.md]`."""

import math
import sys
from collections.abc import Iterable, Sequence

import torch

from memcnn import cli
from memcnn.testing import Result
from memcnn.testing.checks import LAWS
from properties.zoo.faults import FAULTS
from properties.zoo.healthy import HEALTHY
from properties.zoo.specimen import Fault, named_by
from reports.text import escape_markdown

COMMAND = "python -m properties.zoo --out reports/zoo.md"


@cli.command("properties.zoo")
def main(arguments: Sequence[str] | None = None) -> int:
    parser = cli.parser_from("properties.zoo", __doc__, whole=True)
    parser.add_argument("--out", type=cli.output_file, metavar="FILE", help="write the table there; default: print it")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows, missed = [], 0
    for fault in FAULTS:
        report = fault.specimen.report()
        result = named_by(fault, report)
        caught = result is not None and report.failed_laws == {fault.law} | fault.also
        missed += not caught
        rows.append(_row(fault, report.failed_laws, result, caught))
    alarms = [specimen.name for specimen in HEALTHY if not specimen.report().passed]
    score = (
        f"{len(FAULTS) - missed} of {len(FAULTS)} faults are caught by the law that names them and by nothing "
        f"unrelated; {len(alarms)} of {len(HEALTHY)} healthy specimens are found fault with."
    )
    header = (
        "fault",
        "what it does",
        *(law.replace("_", " ") for law in LAWS),
        "claim",
        "error",
        "limit",
        "the words of the check",
    )
    text = "\n".join(
        [
            "# Deliberately broken blocks and engines, and the laws that catch them",
            "",
            f"`{COMMAND}`, torch {torch.__version__}, CPU, float32, seed 0.",
            "",
            score,
            "",
            "**X**: the law that names the fault. x: a law that fails in consequence, as gradients do where "
            "activations are rebuilt by a wrong inverse.",
            "",
            *_table(header, rows),
            "",
        ]
    )
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    else:
        print(text)
    print(score, *(f"false alarm: {name}" for name in alarms), sep="\n", file=sys.stderr)
    return 1 if missed or alarms else 0


def _row(fault: Fault, failed: Iterable[str], result: Result | None, caught: bool) -> list[str]:
    marks = ["**X**" if law == fault.law and result else "x" if law in failed else "" for law in LAWS]
    name = fault.specimen.name if caught else f"**MISSED** {fault.specimen.name}"
    if result is None:
        return [name, fault.what, *marks, fault.claim, "", "", ""]
    return [name, fault.what, *marks, result.claim, _number(result.error), _number(result.limit), result.explanation]


def _number(value: float) -> str:
    return f"{value:.2g}" if math.isfinite(value) else str(value)


def _table(header: Iterable[str], rows: Iterable[list[str]]) -> list[str]:
    header = list(header)
    cells = [[cell if cell == "**X**" else escape_markdown(cell) for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *cells)]


if __name__ == "__main__":
    sys.exit(main())
