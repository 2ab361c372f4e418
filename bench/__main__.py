"""Measure time and peak memory of training steps: plain, checkpointed, reversible; chains and whole networks.

    python -m bench --quick                     about two minutes on two cores
    python -m bench                             less than ten minutes; renews the report in reports/bench/<device>
    python -m bench -k "depth8 and reversible"  only the cases that the expression selects
    python -m bench --block mypkg.blocks:make --shape 8,64,32,32   chains of your own block, against depth
    python -m bench.report FILE.json            tables and figures of the measurements, as Markdown and HTML
    python -m bench.gate BASE.json NOW.json     the metrics that became worse
    python -m bench.compare COMMIT_A COMMIT_B   two commits side by side

Writes the measurements of pytest-benchmark as JSON into results/bench/<device>, and prints a summary. The report of
figures and tables goes to --report. By default that is reports/bench/<device> after a run of all cases, and a folder
beside the JSON after --quick or --block. A run with -k or --budget writes no report.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import pytest
import torch

from bench import block, folders, report, summary
from bench.result import load
from memcnn import cli

HERE = Path(__file__).resolve().parent


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = cli.parser_from("bench", __doc__, whole=True)
    add = parser.add_argument
    add("--quick", action="store_true", help="fewer and smaller cases")
    add("--modes", action="store_true", help="also bfloat16, channels_last, torch.compile on the CPU")
    add(
        "--threads",
        type=cli.threads,
        default=1,
        help="threads of PyTorch on the CPU (default: %(default)s; on a busy "
        "machine several threads make small kernels a hundred times slower)",
    )
    add(
        "--clock",
        choices=["wall", "cpu"],
        help="wall: elapsed time (default); cpu: CPU time of this process, for a busy CPU; needs --threads 1",
    )
    add("--device", help="cpu or cuda (default: cuda where there is one)")
    add("-k", metavar="EXPRESSION", help="run only the cases that match, as in pytest")
    add("--budget", type=cli.duration, metavar="TIME", help="start no case after so much time: 3m")
    add("--out", type=cli.output_folder, metavar="FOLDER", help="folder of the JSON (results/bench/<device>)")
    add("--report", type=cli.output_folder, metavar="FOLDER", help="folder of figures and tables (see above)")
    own = parser.add_argument_group("your own block", "in place of the project's own cases")
    own.add_argument("--block", metavar="TARGET", help="function that makes a block: package.module:f or file.py:f")
    own.add_argument("--shape", type=cli.shape, metavar="N,C,...", help="shape of its input, the batch first")
    depths = f"numbers of blocks in a chain (default: {','.join(map(str, block.DEPTHS))})"
    own.add_argument("--depths", type=cli.counts, metavar="A,B,...", help=depths)
    return parser


def check_block(parser: argparse.ArgumentParser, args: argparse.Namespace, device: torch.device) -> None:
    """End the command if the options about a block are incomplete, or the block cannot run."""
    if args.block is None:
        if lone := [f"--{name}" for name in ("shape", "depths") if getattr(args, name) is not None]:
            parser.error(f"got {' and '.join(lone)} without --block; wanted --block {block.WANTED}")
        return
    if args.shape is None:
        parser.error("argument --shape: missing, wanted the shape of the block's input, such as --shape 8,64,32,32")
    if args.modes:
        parser.error("got --block and --modes, which is about the project's own blocks; leave --modes out")
    if args.quick and args.depths is None:
        args.depths = block.DEPTHS[:-1]
    block.check(args.block, args.shape, device)


@cli.command("bench")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suites; return the exit status of pytest, or 2 if no case matches."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    try:
        device = folders.choose_device(args.device)
    except ValueError as error:
        parser.error(f"--{error}")
    if args.clock == "cpu" and (args.threads > 1 or device.type != "cpu"):
        parser.error("argument --clock: got cpu, which counts one CPU thread; wanted also --device cpu and --threads 1")
    check_block(parser, args, device)
    args.out = args.out or Path("results/bench") / folders.slug(device)

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces every start and stop
    args.out.mkdir(parents=True, exist_ok=True)
    result = args.out / f"{datetime.now():%Y%m%d-%H%M%S}.json"
    status = pytest.main([*_pytest_options(args, result), str(HERE)])
    if result.is_file() and not result.stat().st_size:
        result.unlink()  # pytest-benchmark opens it before it knows whether there is a case
    if status in (pytest.ExitCode.NO_TESTS_COLLECTED, pytest.ExitCode.USAGE_ERROR):
        parser.error(
            f"argument -k: got {args.k!r}, which selects no case; wanted words of their names joined by and, or, not: "
            "a series (depth, batch, width, tiny, law, gate, network), a subject (plain, reversible ...) or a network"
        )
    if result.is_file():
        _show(args, result, device)
    return int(status)


def _pytest_options(args: argparse.Namespace, result: Path) -> list[str]:
    """Return the options of pytest for the measurements that the command line asks for."""
    options = [f"--benchmark-json={result}", "--benchmark-quiet", "--verbose", "-p", "no:cacheprovider"]
    options += ["-W", "default"]  # the tests' configuration makes warnings errors; they must not end a measurement
    options += [f"--{name}" for name in ("quick", "modes") if getattr(args, name)]
    passed_on = ("device", "threads", "clock", "budget", "block")
    options += [f"--{name}={value}" for name in passed_on if (value := getattr(args, name)) is not None]
    lists = ("shape", "depths")
    options += [f"--{name}={','.join(map(str, value))}" for name in lists if (value := getattr(args, name)) is not None]
    return [*options, "-k", args.k] if args.k else options


def _show(args: argparse.Namespace, result: Path, device: torch.device) -> None:
    """Print the tables of a result, and write its report if the command line asks for one."""
    results = load(result)
    print(summary.render(results))
    if warning := report.busy_warning(results):
        print(f"\nWarning: {warning}")
    print(f"\nmeasurements: {result}")
    if target := args.report or _default_report(args, result, device):
        command = f"python -m bench.report FILE.json --out {_shown(target)}"
        report.write(results, target, command, results_folder=result.parent)
        print(f"tables and figures: {target / 'summary.md'}, {folders.page_folder(target) / 'page.html'}")


def _default_report(args: argparse.Namespace, result: Path, device: torch.device) -> Path | None:
    """Return the default folder of the report, or None. Only a run of all cases replaces the committed report."""
    if args.k or args.budget is not None:
        return None
    return result.with_suffix("") if args.quick or args.block else folders.folder_of(device)


def _shown(folder: Path) -> str:
    """Return a folder of the repository as a relative path, so that the report shows no path of this machine."""
    root = HERE.parent
    return str(folder.resolve().relative_to(root) if folder.resolve().is_relative_to(root) else folder)


if __name__ == "__main__":
    sys.exit(main())
