"""Measure time and peak memory of training steps: plain, checkpointed, reversible; chains and whole networks.

    python -m bench --quick                     about two minutes on two cores
    python -m bench                             less than ten; renews the report in reports/bench/<device>
    python -m bench -k "depth8 and reversible"  only the cases that the expression selects
    python -m bench.report FILE.json            tables and figures of the measurements, as Markdown and HTML
    python -m bench.gate BASE.json NOW.json     what became worse
    python -m bench.compare COMMIT_A COMMIT_B   two commits side by side

Writes the measurements of pytest-benchmark as JSON into results/bench/<device>, and prints a summary. The report of
figures and tables goes to --report. By default that is reports/bench/<device> after a run of all cases, and a folder
beside the JSON after --quick; a run that -k or --budget narrows writes none.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import pytest
import torch

from bench import folders, report, summary
from bench.result import load
from memcnn import cli
from memcnn.training.options import duration

HERE = Path(__file__).resolve().parent


@cli.command("bench")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suites; return the exit status of pytest."""
    parser = cli.parser_from("bench", __doc__, whole=True)
    parser.add_argument("--quick", action="store_true", help="fewer and smaller cases")
    parser.add_argument("--modes", action="store_true", help="also bfloat16, channels_last, torch.compile on the CPU")
    parser.add_argument(
        "--threads",
        type=cli.threads,
        default=1,
        help="threads of PyTorch on the CPU (default: %(default)s; several "
        "make small kernels a hundred times slower on a machine that is busy)",
    )
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        help="cpu: seconds of this process alone, for a CPU shared with others; with --threads 1 (default: wall)",
    )
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("-k", metavar="EXPRESSION", help="run only the cases that match, as in pytest")
    parser.add_argument("--budget", type=duration, metavar="TIME", help="start no case after so much time: 3m")
    parser.add_argument(
        "--out", type=cli.output_folder, metavar="FOLDER", help="folder of the JSON (results/bench/<device>)"
    )
    parser.add_argument(
        "--report", type=cli.output_folder, metavar="FOLDER", help="folder of figures and tables (see above)"
    )
    args = parser.parse_args(arguments)
    try:
        device = folders.chosen(args.device)
    except ValueError as error:
        parser.error(f"--{error}")
    args.out = args.out or Path("results/bench") / folders.slug(device)

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces every start and stop
    args.out.mkdir(parents=True, exist_ok=True)
    result = args.out / f"{datetime.now():%Y%m%d-%H%M%S}.json"
    options = [f"--benchmark-json={result}", "--benchmark-quiet", "--verbose", "-p", "no:cacheprovider"]
    options += ["-W", "default"]  # in a test a warning is an error; it does not end a measurement
    options += [f"--{name}" for name in ("quick", "modes") if getattr(args, name)]
    passed_on = ("device", "threads", "clock", "budget")
    options += [f"--{name}={value}" for name in passed_on if (value := getattr(args, name)) is not None]
    if args.k:
        options += ["-k", args.k]
    status = pytest.main([*options, str(HERE)])
    if result.is_file() and result.stat().st_size:
        results = load(result)
        print(summary.render(results))
        print(f"\nmeasurements: {result}")
        if target := args.report or _default_report(args, result, device):
            report.write(results, target, f"python -m bench.report FILE.json --out {_shown(target)}")
            print(f"tables and figures: {target / 'summary.md'}, {folders.page_folder(target) / 'page.html'}")
    return int(status)


def _default_report(args: argparse.Namespace, result: Path, device: torch.device) -> Path | None:
    """Return where the report goes by default: only a run of all cases remakes the committed one."""
    if args.k or args.budget is not None:
        return None
    return result.with_suffix("") if args.quick else folders.folder_of(device)


def _shown(folder: Path) -> str:
    """Return the folder as seen from the repository, whose place on this machine concerns nobody."""
    root = HERE.parent
    return str(folder.resolve().relative_to(root) if folder.resolve().is_relative_to(root) else folder)


if __name__ == "__main__":
    sys.exit(main())
