"""The command line of ``bench.reproduce_table``: its options, their checks, and the devices that they select."""

import argparse
import re
from collections.abc import Callable
from pathlib import Path

import torch

import reports
from memcnn import cli
from memcnn.train import add_allow_mixed
from memcnn.training.distributed import World
from memcnn.training.execution import Execution
from memcnn.training.options import add_execution_options, count, duration, execution_of, explicit_execution
from memcnn.training.recipe import RECIPES
from memcnn.training.record import DATASETS
from memcnn.training.trainer import pick_device

MODELS = ("resnet32", "revnet38", "resnet110", "revnet110", "resnet164", "revnet164")
"""The networks in the order of training: quick ones first, and a RevNet after the ResNet of similar size."""
RUNS = Path("runs")
"""Folder of the training output, which a fresh clone does not have yet."""
MOST_SEED = 10_000


def seed_list(text: str) -> list[int]:
    """Return [0, 1, 2, 5] for "0-2,5"."""
    seeds = []
    for word in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", word.strip())
        if not match or (match[2] and int(match[2]) < int(match[1])):
            raise argparse.ArgumentTypeError(f"got {text!r}, wanted seeds like 0-4 or 0,1,2")
        if int(match[2] or match[1]) > MOST_SEED:
            raise argparse.ArgumentTypeError(f"got {text!r}, wanted seeds of at most {MOST_SEED:,}")
        seeds += range(int(match[1]), int(match[2] or match[1]) + 1)
    return sorted(set(seeds))


def device_list(text: str) -> list[str]:
    """Return ["cuda:0", "cuda:1"] for "0,1"; other names stay as they are."""
    names = [word.strip() for word in text.split(",") if word.strip()]
    if not names:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted devices like 0,1 or cpu")
    return [f"cuda:{name}" if name.isdecimal() else name for name in names]


def choice_list(choices: tuple[str, ...]) -> Callable[[str], list[str]]:
    """Return a function that parses "a,b" into the named choices, in the order of ``choices``."""
    return lambda text: sorted(cli.names(choices)(text), key=choices.index)


def build_parser(description: str) -> argparse.ArgumentParser:
    """Return the parser of the command line. Paragraphs of ``description`` after the first follow the options."""
    usage, status = description.split("\n\n", 1)
    parser = cli.parser_from("bench.reproduce_table", usage, whole=True, epilog=status)
    out = Path(reports.__file__).with_name("out")
    folder = {"metavar": "FOLDER"}
    add = parser.add_argument
    add(
        "--runs",
        type=cli.folder_that_may_be_missing,
        default=RUNS,
        **folder,
        help="training output (default: ./%(default)s)",
    )
    add(
        "--records",
        type=cli.input_folder,
        default=reports.RECORDS,
        **folder,
        help="committed records (reports/records)",
    )
    add("--out", type=cli.output_folder, default=out, **folder, help="folder of the tables (default: reports/out)")
    add("--train", action="store_true", help="first train the cells that are not complete")
    add("--plan", action="store_true", help="print how long each missing cell takes on this device; write no file")
    _add_training_options(parser)
    add_execution_options(parser)
    return parser


def _add_training_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of --train and --plan: the cells, the devices that train them, and the data."""
    add, names = parser.add_argument_group("with --train and --plan").add_argument, {"metavar": "A,B,..."}
    add("--models", type=choice_list(MODELS), default=list(MODELS), **names, help=f"some of {','.join(MODELS)}")
    add("--datasets", type=choice_list(DATASETS), default=list(DATASETS), **names, help=f"some of {','.join(DATASETS)}")
    add(
        "--seeds",
        type=seed_list,
        default=[0],
        metavar="LIST",
        help="0-4 or 0,1,2 (default: 0); a verdict needs 3 seeds",
    )
    add("--recipe", choices=RECIPES, default="published", help="set of hyper-parameters (default: %(default)s)")
    add("--device", help="cpu, cuda, cuda:1 ... (default: cuda if there is a GPU, else cpu)")
    add("--devices", type=device_list, **names, help="several devices, each with its own process: 0,1 or cpu")
    add(
        "--jobs-per-device",
        type=count,
        metavar="N",
        help="cells that share a device: on a GPU they take turns in one "
        "process, on a CPU each has a process (default: 1)",
    )
    add(
        "--cluster",
        metavar="ADDRESS",
        help="a Ray cluster whose nodes share the folder of --runs, or: local",
    )
    add(
        "--threads",
        type=cli.threads,
        metavar="N",
        help="CPU threads for each cell (default: as PyTorch; on a cluster 1)",
    )
    add(
        "--budget",
        type=duration,
        metavar="TIME",
        help="finish within this time, such as 90s, 9m or 1h30m: start the "
        "longest cells that can finish, and use the remaining time for one that a later command resumes",
    )
    data = "(default: $MEMCNN_DATA, else ./data; downloaded when missing)"
    add("--data", metavar="FOLDER", help=f'the CIFAR files, or the word "generated" for generated images {data}')
    add("--unofficial-data", action="store_true", help="also train on files with wrong checksums; the table marks them")
    add_allow_mixed(add)


def check_places(given: argparse.Namespace) -> None:
    """Raise ValueError if the places exclude each other, do not exist, or are named twice."""
    if given.train:
        _check_writable(given.runs)
    elif given.runs != RUNS and not given.runs.is_dir():
        raise ValueError(f"--runs: got '{given.runs}', which does not exist; wanted a folder of runs: check the path")
    places = [name for name in ("device", "devices", "cluster") if getattr(given, name)]
    if len(places) > 1:
        raise ValueError(f"got --{' and --'.join(places)}: wanted one of them")
    if given.plan and (given.train or given.cluster):
        raise ValueError(
            f"got --plan and --{'train' if given.train else 'cluster'}: --plan only times cells on this machine"
        )
    option, names = ("devices", given.devices) if given.devices else ("device", [given.device])
    try:
        named = [str(_indexed(pick_device(name, World()))) for name in names if name]
    except ValueError as error:
        raise ValueError(f"--{option}{str(error).removeprefix('device')}") from None
    if twice := sorted({name for name in named if named.count(name) > 1}):
        raise ValueError(
            f"--devices: {', '.join(twice)} is named twice; --jobs-per-device N trains several cells on one device"
        )


def _check_writable(runs: Path) -> None:
    """Raise ValueError if training cannot write to the folder of runs."""
    try:
        cli.output_folder(str(runs))
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"--runs: {error}") from None


def _indexed(device: torch.device) -> torch.device:
    """Return the device with its number, as "cuda:0" for "cuda"."""
    return torch.device(device.type, 0) if device.type == "cuda" and device.index is None else device


def first_device(given: argparse.Namespace) -> torch.device:
    """Return the device that trains, or the first of several."""
    return _indexed(pick_device(given.devices[0] if given.devices else given.device, World()))


def chosen_execution(given: argparse.Namespace) -> Execution:
    """Return the execution that the options ask for. On a GPU, --fast is the default of --train and --plan.

    Raises:
        ValueError: if the options contradict each other.
    """
    if given.cluster or not (given.train or given.plan):
        return execution_of(given)
    device = first_device(given)
    if given.fast is None and device.type == "cuda" and not explicit_execution(given):
        given.fast = True
        print(f"Execution: {execution_of(given, device)} (--fast, the default on a GPU; --no-fast for float32)")
    return execution_of(given, device)
