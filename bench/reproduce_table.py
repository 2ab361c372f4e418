"""Rebuild the published table of accuracy and time from records of training runs; --train first runs what is missing.

    python -m bench.reproduce_table                       render what there is
    python -m bench.reproduce_table --train --seeds 0-2   every model on both data sets with three seeds, then render
    python -m bench.reproduce_table --plan --budget 13m   how long each missing cell takes here, and which ones fit
    python -m bench.reproduce_table --train --budget 13m  the longest cells that can finish, and the rest for one
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
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch
from tqdm import tqdm

import reports
from bench import planning
from bench.placement import Cell, Outcome, Settings, in_turns, on_cluster, on_devices, train_cell
from bench.planning import Needs
from memcnn.data import GENERATED, whereabouts
from memcnn.train import add_allow_mixed
from memcnn.training.distributed import World
from memcnn.training.environment import device_info
from memcnn.training.execution import Execution
from memcnn.training.options import add_execution_options, count, duration, execution_of, explicit_execution
from memcnn.training.recipe import RECIPES
from memcnn.training.record import DATASETS, BadRecord, RunRecord, load, run_name
from memcnn.training.text import clean
from memcnn.training.trainer import pick_device
from reports import cells

# Those of a kind side by side, the quick ones first.
MODELS = ("resnet32", "revnet38", "resnet110", "revnet110", "resnet164", "revnet164")
RESERVED_SECONDS = 10.0  # of the budget, for start-up and rendering
TIMING_SHARE = 0.25  # of the budget, after which no further network is timed


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
    add("--plan", action="store_true", help="print how long each missing cell takes on this device; writes nothing")
    add = parser.add_argument_group("with --train and --plan").add_argument
    add("--models", type=choice_list(MODELS), default=list(MODELS), **names, help=f"of {','.join(MODELS)}")
    add("--datasets", type=choice_list(DATASETS), default=list(DATASETS), **names, help=f"of {','.join(DATASETS)}")
    add("--seeds", type=seed_list, default=[0], metavar="LIST", help="0-4 or 0,1,2 (default: 0); a verdict needs three")
    add("--recipe", choices=RECIPES, default="published", help="set of hyper-parameters (default: %(default)s)")
    add("--device", help="cpu, cuda, cuda:1 ... (default: cuda where there is one, else cpu)")
    add("--devices", type=device_list, metavar="A,B,...", help="several at once: 0,1 or cpu; a process for each")
    add("--jobs-per-device", type=count, metavar="N", help="cells that share a device: on a GPU they take turns in one "
        "process, on a CPU each has a process (default: 1)")
    add("--cluster", metavar="ADDRESS", help="of a Ray cluster, whose nodes share the folder RUNS, or: local")
    add("--threads", type=count, metavar="N", help="CPU threads of a cell (default: PyTorch's choice; on a cluster 1)")
    add("--budget", type=duration, metavar="TIME", help="be done before so much time is over: 90s, 9m, 1h30m; begins "
        "the longest cells that can finish, and gives the rest of the time to one that can be resumed")
    data = "(default: $MEMCNN_DATA, else ./data; downloaded when missing)"
    add("--data", **folder, help=f'the CIFAR files, or the word "generated" for made-up images {data}')
    add("--unofficial-data", action="store_true", help="train on files with wrong checksums too; the table says so")
    add_allow_mixed(add)
    add_execution_options(parser)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Do what the command line asks for; return the exit status."""
    started = time.monotonic()
    parser = build_parser()
    given = parser.parse_args(arguments)
    try:
        check_places(given)
        execution = chosen_execution(given)
    except ValueError as error:
        parser.error(str(error))
    seconds = None if given.budget is None else given.budget - RESERVED_SECONDS - (time.monotonic() - started)
    settings = Settings(
        RECIPES[given.recipe],
        Path(given.runs).absolute(),
        given.data,
        given.threads,
        None if seconds is None else time.time() + seconds,
        execution,
        given.unofficial_data,
        given.allow_mixed,
    )
    if given.plan:
        print(plan(given, settings))
        return 0
    status = 0
    if given.train:
        try:
            status = train_cells(given, settings)
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


def check_places(given: argparse.Namespace) -> None:
    """Raise ValueError where the places exclude each other, do not exist, or are named twice."""
    places = [name for name in ("device", "devices", "cluster") if getattr(given, name)]
    if len(places) > 1:
        raise ValueError(f"got --{' and --'.join(places)}: wanted one of them")
    if given.plan and (given.train or given.cluster):
        raise ValueError(f"got --plan and --{'train' if given.train else 'cluster'}: --plan only looks at this machine")
    option, names = ("devices", given.devices) if given.devices else ("device", [given.device])
    try:
        named = [str(_indexed(pick_device(name, World()))) for name in names if name]
    except ValueError as error:
        raise ValueError(f"--{option}{str(error).removeprefix('device')}") from None
    if twice := sorted({name for name in named if named.count(name) > 1}):
        raise ValueError(
            f"--devices: {', '.join(twice)} is named twice; --jobs-per-device N trains several cells on one device"
        )


def _indexed(device: torch.device) -> torch.device:
    """Return the device with its number, as "cuda:0" for "cuda"."""
    return torch.device(device.type, 0) if device.type == "cuda" and device.index is None else device


def first_device(given: argparse.Namespace) -> torch.device:
    """Return the device that trains, or the first of several."""
    return _indexed(pick_device(given.devices[0] if given.devices else given.device, World()))


def chosen_execution(given: argparse.Namespace) -> Execution:
    """Return the execution that the options ask for; on a GPU --fast is the default of --train and --plan.

    Raises:
        ValueError: when the options contradict each other.
    """
    if given.cluster or not (given.train or given.plan):
        return execution_of(given)
    device = first_device(given)
    if given.fast is None and device.type == "cuda" and not explicit_execution(given):
        given.fast = True
        print(f"Execution: {execution_of(given, device)} (--fast, the default on a GPU; --no-fast for float32)")
    return execution_of(given, device)


def plan(given: argparse.Namespace, settings: Settings) -> str:
    """Return what the missing cells need on this device, and which fit into the budget. Writes nothing."""
    device, at_once = first_device(given), given.jobs_per_device or 1
    settings = replace(settings, execution=settings.execution.on(device)[0])
    missing = [cell for cell in wanted_cells(given) if not (_committed(given, cell) or _is_complete(settings, cell))]
    if not missing:
        return "No cell is missing."
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    needs, found = Needs(settings, device, at_once, use_records=False), []
    for cell in missing:
        if cell.model not in {need.cell.model for need in found}:
            print(f"Timing {cell.model} ...", file=sys.stderr, flush=True)
        found.append(needs.of(cell))
    budget = None if given.budget is None else max(0.0, given.budget - RESERVED_SECONDS)
    lanes = at_once * len(given.devices or [device])
    title = f"{device_info(device)['name']}, {settings.execution}, {settings.recipe.name} recipe"
    return f"{title}\n\n{planning.table(found, budget, at_once, lanes)}"


def wanted_cells(given: argparse.Namespace) -> list[Cell]:
    """Return the cells: every cell's first seed before any second one, and CIFAR-10 before CIFAR-100."""
    return [Cell(model, dataset, seed) for seed, dataset, model in product(given.seeds, given.datasets, given.models)]


def train_cells(given: argparse.Namespace, settings: Settings) -> int:
    """Train every wanted cell that is not complete, and print a line for each; return the exit status."""
    wanted = wanted_cells(given)
    numbers = {cell: f"[{place:>{len(str(len(wanted)))}}/{len(wanted)}]" for place, cell in enumerate(wanted, 1)}
    complete, failures, stopped, left_out = 0, [], None, []
    for cell, outcome in _outcomes(wanted, settings, given, left_out):
        line = f"{numbers[cell]} {cell}  "
        if isinstance(outcome, Exception):
            text = clean(f"{type(outcome).__name__}: {outcome}")
            _print(f"{line}failed: {'as above' if text in failures else text}")
            failures.append(text)
            continue
        _print(line + _told(outcome))
        complete += outcome.status == "complete"
        if outcome.status == "failed":
            failures.append(outcome.reason)
        if outcome.status == "partial":
            stopped = outcome.reason
    if not stopped and complete + len(failures) + len(left_out) < len(wanted):
        used_up = settings.deadline is not None and settings.remaining_seconds() <= 0
        stopped = "budget exhausted" if used_up else "interrupted"
    said = [f"{complete} of {len(wanted)} cells complete"]
    if failures:
        said.append(f"{len(failures)} failed")
    if left_out:
        said.append(f"{len(left_out)} not begun for lack of time")
    if stopped:
        said.append(f"stopped ({stopped}); the same command goes on from here")
    _print(", ".join(said) + ".\n")
    if failures:
        return 1
    return 0 if complete == len(wanted) else 3


def _print(text: str) -> None:
    """Print a line above the bars of the runs that are under way."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


def _outcomes(
    wanted: list[Cell], settings: Settings, given: argparse.Namespace, left_out: list[Cell]
) -> Iterator[Outcome]:
    """Yield each cell that is begun before a stop, with its record or its error: the others go on.

    Cells that do not fit into the budget are added to `left_out`.
    """
    missing = []
    for cell in wanted:
        if record := _committed(given, cell):
            yield cell, record
        else:
            missing.append(cell)
    at_once, cells = given.jobs_per_device or 1, iter(missing)
    if settings.deadline is not None and not given.cluster:
        cells = _fitting(missing, settings, given, left_out)
    if given.cluster:
        yield from on_cluster(missing, settings, given.cluster, at_once)
    elif given.devices:
        yield from on_devices(cells, settings, given.devices, at_once)
    elif at_once == 1:
        yield from _in_turn(cells, settings, given.device)
    elif first_device(given).type == "cuda":
        yield from in_turns(cells, settings, str(first_device(given)), at_once, progress=sys.stderr.isatty())
    else:
        yield from on_devices(cells, settings, ["cpu"], at_once)


def _fitting(
    missing: list[Cell], settings: Settings, given: argparse.Namespace, left_out: list[Cell]
) -> Iterator[Cell]:
    """Yield the cells to train within the budget, each when there is room for it; first those that are complete."""
    pending = []
    for cell in missing:
        if _is_complete(settings, cell):
            yield cell
        else:
            pending.append(cell)
    device = first_device(given)
    if settings.remaining_seconds() <= 0 or not pending:
        return
    settings = replace(settings, execution=settings.execution.on(device)[0])
    needs, found = Needs(settings, device, given.jobs_per_device or 1, use_records=True), []
    last = settings.deadline - (1 - TIMING_SHARE) * settings.remaining_seconds()
    for cell in pending:
        if needs.knows(cell) or time.time() < last:
            found.append(needs.of(cell))
        else:
            left_out.append(cell)
            _print(f"{cell}  not begun: a quarter of the budget is used up for timing other networks")
    for cell in planning.within(found, settings.remaining_seconds, _print):
        found = [need for need in found if need.cell != cell]
        yield cell
    left_out += [need.cell for need in found]


def _is_complete(settings: Settings, cell: Cell) -> bool:
    try:
        return settings.record_of(cell).status == "complete"
    except BadRecord:
        return False


def _in_turn(cells: Iterable[Cell], settings: Settings, device: str | None) -> Iterator[Outcome]:
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
    """Return the cell's complete run among the committed records, if there is one on the data that are wanted."""
    try:
        kind = GENERATED if whereabouts(given.data) == GENERATED else "official"
        name = run_name(cell.model, cell.dataset, RECIPES[given.recipe], cell.seed, data=kind)
        record = load(Path(given.records) / name)
    except BadRecord:
        return None
    official = kind == "official"
    return record if record.status == "complete" and record.engine and record.data["official"] == official else None


def _told(record: RunRecord) -> str:
    """Return accuracy, time and state of a run, for its line."""
    accuracy = cells.DASH if record.test_accuracy is None else f"{record.test_accuracy:.1f}"
    words = f"accuracy {accuracy:>5} %  {cells.duration(record.train_seconds):>5}  {record.status}{record.mark}"
    if record.status == "complete":
        return words
    return f"{words} at {record.iterations}/{record.recipe.iterations}: {record.reason}"


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")
    sys.exit(main())
