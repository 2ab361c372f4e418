"""Try every fault many times, and write a table of the survived tries to reports/faults.md.

    python -m properties.faults                    100 kills, and 10 tries of every other fault: ten minutes
    python -m properties.faults --only disk        only faults whose name contains the word; writes nothing

Exit status: 0 if every try was survived, 1 otherwise.
"""

import sys
import tempfile
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import torch

from memcnn import cli
from memcnn.training.environment import device_info, software_versions
from memcnn.training.files import write_by_rename
from memcnn.training.text import clean
from properties.faults.kills import kill_at_a_file_operation, kill_at_a_random_instant
from properties.faults.sandbox import INTERVAL, ITERATIONS, ROOT, Sandbox
from properties.faults.trying import FAULTS, Outcome, attempt
from reports.text import escape_markdown

PAGE = ROOT / "reports" / "faults.md"
KILLS, TRIES, SEED = 100, 10, 0


@cli.command("properties.faults")
def main(arguments: Sequence[str] | None = None) -> int:
    """Try the faults that the command line asks for, and return the exit status."""
    parser = cli.parser_from("properties.faults", __doc__, whole=True)
    parser.add_argument(
        "--only", metavar="WORD", default="", help="try only faults whose name contains WORD; write nothing"
    )
    parser.add_argument(
        "--tries", metavar="N", type=cli.count, help=f"tries of each fault (default: {KILLS} kills, else {TRIES})"
    )
    parser.add_argument(
        "--seed",
        metavar="N",
        type=cli.whole_number,
        default=SEED,
        help="of random choices (default: %(default)s)",
    )
    given = parser.parse_args(arguments)
    if not any(given.only in fault.__name__ for fault in FAULTS):
        known = ", ".join(fault.__name__ for fault in FAULTS)
        parser.error(f"argument --only: got {given.only!r}, wanted a part of one of {known}")
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="memcnn-faults-") as folder:
        sandbox = Sandbox(Path(folder))
        usual = {kill_at_a_random_instant: KILLS, kill_at_a_file_operation: sandbox.operations}
        for fault in FAULTS:
            if given.only in fault.__name__:
                tries = given.tries or usual.get(fault, TRIES)
                outcomes.append(attempt(sandbox, fault, tries, given.seed))
                print(f"{fault.__name__}: {outcomes[-1]}", flush=True)
        sandbox.close()
    if not given.only:
        write_by_rename(PAGE, page(outcomes, given.seed).encode())
        print(f"Written {PAGE}")
    return int(any(outcome.lost for outcome in outcomes))


def page(outcomes: list[Outcome], seed: int) -> str:
    """Return the page reports/faults.md in Markdown."""
    versions, processor = software_versions(), device_info(torch.device("cpu"))["name"]
    names = ", ".join(f"{name} {versions[name]}" for name in ("memcnn", "python", "torch", "platform"))
    lines = [
        "# Faults, and the training that they cost",
        f"Made by `python -m properties.faults`, seed {seed}, on {date.today()}. {names}; {processor}.",
        "In each try, `python -m memcnn.train` trains a small reversible network on generated images for "
        f"{ITERATIONS} iterations in its own process, with a checkpoint after every {INTERVAL} iterations. A run "
        "survives a fault if the same command resumes it, repeats no more than one interval, ends with the same bits "
        "as an undisturbed run (weights, momentum, curve, record, TensorBoard), and leaves no other file. If the run "
        "must not start, it survives if the command refuses it, names the cause and changes nothing.",
        "| fault | tries | survived | lost | what happens |\n| --- | ---: | ---: | ---: | --- |\n"
        + "\n".join(
            f"| {one.fault} | {one.tries} | {one.survived} | {one.lost} | {escape_markdown(clean(one.text))} |"
            for one in outcomes
        ),
    ]
    return "\n\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
