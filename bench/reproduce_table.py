"""Rebuild the published table of accuracy and time from records of training runs; --train first runs what is missing.

    python -m bench.reproduce_table                       render what there is
    python -m bench.reproduce_table --train --seeds 0-2   every model on both data sets with three seeds, then render
    python -m bench.reproduce_table --train --devices 0,1 --jobs-per-device 3   six cells at a time on two GPUs
    python -m bench.reproduce_table --train --cluster local                     a Ray task for each cell

Stopped by --budget or Ctrl-C, the same command goes on where it was. Exit status: 0 every wanted cell is complete
(always without --train), 3 some are incomplete, 1 some failed, 2 misuse.
"""

import argparse
import re
import shutil
import sys
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import reports
from bench.placement import Cell, Settings, on_cluster, on_devices, train_cell
from memcnn.data import GENERATED, whereabouts
from memcnn.train import add_execution_options, count, duration, execution_of
from memcnn.training.recipe import RECIPES
from memcnn.training.record import DATASETS, BadRecord, RunRecord, load, run_name
from memcnn.training.text import clean
from reports import cells

# Those of a kind side by side, the quick ones first.
MODELS = ("resnet32", "revnet38", "resnet110", "revnet110", "resnet164", "revnet164")
RESERVED_SECONDS = 10.0  # of the budget, for start-up and rendering


def seed_list(text: str) -> list[int]:
    """[0, 1, 2, 5] from "0-2,5"."""
    seeds = []
    for word in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", word.strip())
        if not match or (match[2] and int(match[2]) < int(match[1])):
            raise argparse.ArgumentTypeError(f"got {text!r}, wanted seeds like 0-4 or 0,1,2")
        seeds += range(int(match[1]), int(match[2] or match[1]) + 1)
    return sorted(set(seeds))


def device_list(text: str) -> list[str]:
    """["cuda:0", "cuda:1"] from "0,1"; other names as they are."""
    names = [word.strip() for word in text.split(",") if word.strip()]
    if not names:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted devices like 0,1 or cpu")
    return [f"cuda:{name}" if name.isdecimal() else name for name in names]


def choice_list(choices: tuple[str, ...]):
    """A parser of "a,b" into those of `choices` that are named, in the order of `choices`."""

    def parse(text: str) -> list[str]:
        wanted = [word.strip() for word in text.split(",") if word.strip()]
        if unknown := [word for word in wanted if word not in choices]:
            raise argparse.ArgumentTypeError(f"unknown {', '.join(unknown)}: choose from {','.join(choices)}")
        if not wanted:
            raise argparse.ArgumentTypeError(f"got nothing: choose from {','.join(choices)}")
        return [choice for choice in choices if choice in wanted]

    return parse


def build_parser() -> argparse.ArgumentParser:
    usage, status = __doc__.split("\n\n", 1)
    parser = argparse.ArgumentParser(
        prog="bench.reproduce_table",
        description=usage,
        epilog=status,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    out = Path(reports.__file__).with_name("out")
    folder, names = {"metavar": "FOLDER"}, {"metavar": "A,B,..."}
    add = parser.add_argument
    add("--runs", default="runs", **folder, help="training output (default: ./%(default)s)")
    add("--records", default=reports.RECORDS, **folder, help="committed records (default: reports/records)")
    add("--out", default=out, **folder, help="where the tables go (default: reports/out)")
    add("--train", action="store_true", help="first run the cells that are not complete")
    add = parser.add_argument_group("with --train").add_argument
    add("--models", type=choice_list(MODELS), default=list(MODELS), **names, help=f"of {','.join(MODELS)}")
    add("--datasets", type=choice_list(DATASETS), default=list(DATASETS), **names, help=f"of {','.join(DATASETS)}")
    add("--seeds", type=seed_list, default=[0], metavar="LIST", help="0-4 or 0,1,2 (default: 0); a verdict needs three")
    add("--recipe", choices=RECIPES, default="published", help="set of hyper-parameters (default: %(default)s)")
    add("--device", help="cpu, cuda, cuda:1 ... (default: cuda where there is one, else cpu)")
    add("--devices", type=device_list, metavar="A,B,...", help="several at once: 0,1 or cpu; a process for each")
    add("--jobs-per-device", type=count, metavar="N", help="cells that share a device (default: 1)")
    add("--cluster", metavar="ADDRESS", help="of a Ray cluster, whose nodes share the folder RUNS, or: local")
    add("--threads", type=count, metavar="N", help="CPU threads of a cell (default: PyTorch's choice; on a cluster 1)")
    add("--budget", type=duration, metavar="TIME", help="be done before so much time is over: 90s, 9m, 1h30m")
    data = "(default: $MEMCNN_DATA, else ./data; downloaded when missing)"
    add("--data", **folder, help=f'the CIFAR files, or the word "generated" for made-up images {data}')
    add("--unofficial-data", action="store_true", help="train on files with wrong checksums too; the table says so")
    add_execution_options(parser)
    return parser


def main(arguments: list[str] | None = None) -> int:
    started = time.monotonic()
    parser = build_parser()
    given = parser.parse_args(arguments)
    places = [name for name in ("device", "devices", "cluster") if getattr(given, name)]
    if len(places) > 1:
        parser.error(f"got --{' and --'.join(places)}: wanted one of them")
    if given.jobs_per_device and not (given.devices or given.cluster):
        parser.error("--jobs-per-device: wanted with --devices or --cluster, which run several cells at once")
    try:
        execution_of(given)
    except ValueError as error:
        parser.error(str(error))
    status = 0
    if given.train:
        seconds = None if given.budget is None else given.budget - RESERVED_SECONDS - (time.monotonic() - started)
        try:
            status = train_cells(given, None if seconds is None else time.time() + seconds)
        except ModuleNotFoundError as error:
            if error.name != "ray":
                raise
            parser.error("--cluster needs Ray: pip install ray; --devices needs nothing")
        except ConnectionError as error:
            parser.error(f"--cluster {given.cluster}: {error}")
    report = reports.build(given.runs, given.records)
    paths = reports.write(report, given.out)
    print(reports.terminal(report, width=min(120, shutil.get_terminal_size((120, 24)).columns)))
    print("\nWritten", *paths, sep="\n  ")
    return status


def train_cells(given: argparse.Namespace, deadline: float | None) -> int:
    """Run every wanted cell that is not complete, a line each; the exit status. `deadline` is a time.time().

    Every cell gets its first seed before any gets its second, and CIFAR-10 comes before CIFAR-100.
    """
    settings = Settings(RECIPES[given.recipe], Path(given.runs).absolute(), given.data, given.threads, deadline,
                        execution_of(given), given.unofficial_data)
    wanted = [Cell(model, dataset, seed) for seed, dataset, model in product(given.seeds, given.datasets, given.models)]
    numbers = {cell: f"[{place:>{len(str(len(wanted)))}}/{len(wanted)}]" for place, cell in enumerate(wanted, 1)}
    complete, failures, stopped = 0, [], None
    for cell, outcome in _outcomes(wanted, settings, given):
        line = f"{numbers[cell]} {cell}  "
        if isinstance(outcome, Exception):
            text = clean(f"{type(outcome).__name__}: {outcome}")
            print(f"{line}failed: {'as above' if text in failures else text}", flush=True)
            failures.append(text)
            continue
        print(line + _told(outcome), flush=True)
        complete += outcome.status == "complete"
        if outcome.status == "failed":
            failures.append(outcome.reason)
        if outcome.status == "partial":
            stopped = outcome.reason
    if not stopped and complete + len(failures) < len(wanted):
        stopped = "budget exhausted" if deadline is not None and time.time() >= deadline else "interrupted"
    said = [f"{complete} of {len(wanted)} cells complete"]
    if failures:
        said.append(f"{len(failures)} failed")
    if stopped:
        said.append(f"stopped ({stopped}); the same command goes on from here")
    print(", ".join(said) + ".\n", flush=True)
    if failures:
        return 1
    return 0 if complete == len(wanted) else 3


def _outcomes(wanted: list[Cell], settings: Settings, given: argparse.Namespace
              ) -> Iterator[tuple[Cell, RunRecord | Exception]]:
    """Each cell that could be begun before a stop, and its record, or whatever ails it: the others go on."""
    missing = []
    for cell in wanted:
        if record := _committed(given, cell):
            yield cell, record
        else:
            missing.append(cell)
    if given.devices:
        yield from on_devices(missing, settings, given.devices, given.jobs_per_device or 1)
    elif given.cluster:
        yield from on_cluster(missing, settings, given.cluster, given.jobs_per_device or 1)
    else:
        yield from _in_turn(missing, settings, given.device)


def _in_turn(cells: list[Cell], settings: Settings, device: str | None) -> Iterator[tuple[Cell, RunRecord | Exception]]:
    for cell in cells:
        remaining_seconds = settings.remaining_seconds()
        if remaining_seconds is not None and remaining_seconds <= 0:
            return
        try:
            record = train_cell(cell, settings, device, progress=sys.stderr.isatty())
        except KeyboardInterrupt:
            return
        except Exception as error:
            yield cell, error
            continue
        yield cell, record
        if record.status == "partial":
            return


def _committed(given: argparse.Namespace, cell: Cell) -> RunRecord | None:
    """The complete run of this cell among the committed records, if there is one on the data that are wanted."""
    try:
        name = run_name(cell.model, cell.dataset, RECIPES[given.recipe], cell.seed)
        record = load(Path(given.records) / name)
    except BadRecord:
        return None
    official = whereabouts(given.data) != GENERATED
    return record if record.status == "complete" and record.engine and record.data["official"] == official else None


def _told(record: RunRecord) -> str:
    """accuracy, time and state of a run, for its line."""
    accuracy = cells.DASH if record.test_accuracy is None else f"{record.test_accuracy:.1f}"
    words = f"accuracy {accuracy:>5} %  {cells.duration(record.train_seconds):>5}  {record.status}{record.mark}"
    if record.status == "complete":
        return words
    return f"{words} at {record.iterations}/{record.recipe.iterations}: {record.reason}"


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")
    sys.exit(main())
