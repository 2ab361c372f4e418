#!/usr/bin/env python3
"""Train a ResNet or RevNet on CIFAR. Stop it at any time: the same command resumes it.

    ./train.py MODEL DATASET            in this folder, or
    python -m memcnn.train MODEL DATASET
    torchrun --nproc-per-node 2 -m memcnn.train MODEL DATASET      one run in several processes
    python -m memcnn.train --list       lists the runs

Exit status: 0 the run is complete, 3 it was stopped cleanly and can be resumed (Ctrl-C, SIGTERM, budget), 1 it failed,
2 misuse.
"""

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import asdict
from pathlib import Path

STARTED = time.monotonic()  # the budget counts from here, since the imports below take seconds
if __package__ in (None, ""):  # run as a script: this folder's names (data, models ...) must not hide other packages
    here = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != here]
    if str(here.parent) not in sys.path:
        sys.path.insert(0, str(here.parent))

import torch  # noqa: E402

from memcnn import cli  # noqa: E402
from memcnn.data import DATASETS, BadData, DataNotFound  # noqa: E402
from memcnn.migration import absent_names  # noqa: E402
from memcnn.models.resnet import MODELS  # noqa: E402
from memcnn.training.checkpoint import BadCheckpoint  # noqa: E402
from memcnn.training.distributed import ProcessLost, World, is_rank_0_or_alone, launched  # noqa: E402
from memcnn.training.files import FolderBusy  # noqa: E402
from memcnn.training.listing import list_runs  # noqa: E402
from memcnn.training.options import (  # noqa: E402
    add_execution_options,
    add_hyper_parameters,
    execution_of,
    recipe_of,
)
from memcnn.training.preview import preview  # noqa: E402
from memcnn.training.recipe import RECIPES, Recipe  # noqa: E402
from memcnn.training.record import RunRecord  # noqa: E402
from memcnn.training.state import MixedExecution  # noqa: E402
from memcnn.training.trainer import BadArgument, CannotWrite, Job, Place, pick_device, train  # noqa: E402


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = cli.parser_from("memcnn.train", __doc__)
    parser.add_argument("model", nargs="?", type=_model, metavar="MODEL", help=", ".join(MODELS))
    parser.add_argument("dataset", nargs="?", choices=DATASETS, metavar="DATASET", help=", ".join(DATASETS))
    option = parser.add_argument
    option("--recipe", choices=RECIPES, default="published", help="set of hyper-parameters (default: %(default)s)")
    option(
        "--seed",
        type=cli.whole_number,
        default=0,
        help="seed of weights, order and augmentation (default: %(default)s)",
    )
    data = 'folder of the CIFAR files, or the word "generated" for made-up images'
    option("--data", metavar="FOLDER", help=f"{data} (default: $MEMCNN_DATA, else ./data; downloaded when missing)")
    option("--unofficial-data", action="store_true", help="train on files with wrong checksums too; the record says so")
    option(
        "--runs",
        type=_folder_name,
        metavar="FOLDER",
        default="runs",
        help="folder of all runs (default: ./%(default)s)",
    )
    option("--device", help="cpu, cuda, cuda:1 ... (default: cuda where there is one, else cpu)")
    option(
        "--threads", type=cli.threads, help=f"CPU threads (default: {torch.get_num_threads()}, PyTorch's choice here)"
    )
    option("--budget", metavar="TIME", type=cli.duration, help="stop cleanly within this time: 90s, 9m, 1h30m")
    option("--fresh", action="store_true", help="start from the beginning, and move an existing run aside")
    option("--disable", action="store_true", help="train RevNets with plain autograd, with all activations stored")
    add_allow_mixed(option)
    group = parser.add_argument_group("instead of training", "each writes nothing")
    group.add_argument("--list", action="store_true", help="show the runs in the folder of runs, and how far they are")
    group.add_argument("--dry-run", action="store_true", help="show what would run, its memory, arithmetic and time")
    group.add_argument("--config", action="store_true", help="print all settings that affect the result, as JSON")
    add_execution_options(parser)
    add_hyper_parameters(parser)
    return parser


def _folder_name(text: str) -> str:
    """Return the name of a folder that exists or may be created; refuse the name of a file."""
    cli.folder_that_may_be_missing(text)
    return text


def _model(text: str) -> str:
    """Return the name of a network, and say so if a data set stands in its place."""
    if text in DATASETS:
        raise argparse.ArgumentTypeError(f"got the data set {text!r}, wanted a network before it: {', '.join(MODELS)}")
    if text not in MODELS:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted one of {', '.join(MODELS)}")
    return text


def add_allow_mixed(option: Callable) -> None:
    """Add the option ``--allow-mixed``."""
    option("--allow-mixed", action="store_true", help="resume a run in another execution or on another type of device; "
           "the record lists both, and the table marks the run")  # fmt: skip


def job_of(given: argparse.Namespace, recipe: Recipe) -> Job:
    """Return the run that the options ask for."""
    names = ("model", "dataset", "seed", "fresh", "disable", "allow_mixed")
    return Job(recipe=recipe, **{name: getattr(given, name) for name in names})


def place_of(given: argparse.Namespace) -> Place:
    """Return where the options ask to read, write and compute."""
    return Place(**{name: getattr(given, name) for name in ("data", "unofficial_data", "runs", "device")})


def config(given: argparse.Namespace, recipe: Recipe) -> str:
    """Return all settings that affect the result of the run, as JSON."""
    values = {
        "run": job_of(given, recipe).folder(place_of(given), processes=processes()).name,
        "model": given.model,
        "dataset": given.dataset,
        "seed": given.seed,
        "engine": not given.disable,
        "execution": asdict(execution_of(given)),
        "recipe": recipe.to_dict(),
    }
    return json.dumps(values, indent=1)


def dry_run(given: argparse.Namespace, recipe: Recipe) -> str:
    """Return what would run, its memory, arithmetic and time."""
    device = pick_device(given.device, World())
    execution = execution_of(given).on(device)[0]
    return preview(job_of(given, recipe), execution, place_of(given), device)


def processes() -> int:
    """Return how many processes torchrun has started for this run."""
    return int(os.environ["WORLD_SIZE"]) if launched() else 1


def summary(record: RunRecord, folder: Path) -> str:
    """Return one line for the end of a run."""
    if record.test_accuracy is None:
        accuracy = "not evaluated yet"
    else:
        accuracy = f"test accuracy {record.test_accuracy:.2f} % after iteration {record.test_iteration}"
    return (
        f"{record.model} on {record.dataset}{record.mark}: {accuracy}, "
        f"{record.status}, {record.iterations}/{record.recipe.iterations} iterations in {record.train_seconds:.0f} s "
        f"of training, {folder}"
    )


@cli.command("memcnn.train")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status. With several processes, only rank 0 prints and sets the status."""
    try:
        if is_rank_0_or_alone():
            return run(arguments)
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            with suppress(SystemExit):
                run(arguments)
        return cli.DONE
    except ProcessLost as error:  # every process that is still there reports it
        return cli.fail(error)


def run(arguments: Sequence[str] | None) -> int:
    """Do what the command line asks for; return the exit status."""
    parser = build_parser()
    given = parser.parse_args(arguments)
    if given.list:
        if given.runs != parser.get_default("runs") and not Path(given.runs).is_dir():
            parser.error(f"--runs: got {given.runs!r}, which does not exist; wanted a folder of runs: check the path")
        print(list_runs(Path(given.runs)))
        return cli.DONE
    if given.dataset is None:
        missing = f"DATASET after {given.model}" if given.model else f"MODEL, one of {', '.join(MODELS)}, and DATASET"
        parser.error(f"missing {missing}, one of {', '.join(DATASETS)}")
    try:
        recipe, execution = recipe_of(given), execution_of(given)
    except ValueError as error:
        parser.error(str(error))
    cli.use_threads(given.threads)
    again = "the same torchrun command" if launched() else _command_again(arguments)
    try:
        if given.config or given.dry_run:
            print(config(given, recipe) if given.config else dry_run(given, recipe))
            return cli.DONE
        if not os.path.isdir(given.runs):
            cli.output_folder(given.runs)
        budget = None if given.budget is None else given.budget - (time.monotonic() - STARTED)
        record = train(job_of(given, recipe), execution, place_of(given), budget_seconds=budget)
    except argparse.ArgumentTypeError as error:
        parser.error(f"argument --runs: {error}")
    except (BadArgument, BadCheckpoint, MixedExecution) as error:
        parser.error(str(error))
    except (BadData, DataNotFound, FolderBusy, CannotWrite) as error:
        return cli.fail(error)
    except OSError as error:
        return cli.fail(f"memcnn.train: {cli.explain_os_error(error)}")
    except KeyboardInterrupt:
        print(f"Interrupted before training began. Start it with: {again}", file=sys.stderr)
        return cli.STOPPED
    _print_end(record, Path(given.runs) / record.name, again)
    return {"complete": cli.DONE, "failed": cli.FAILED, "partial": cli.STOPPED}[record.status]


def _command_again(arguments: Sequence[str] | None) -> str:
    """Return the command that resumes the run: this one, without ``--fresh``."""
    command = sys.orig_argv if arguments is None else [sys.executable, "-m", "memcnn.train", *arguments]
    return shlex.join(word for word in command if word != "--fresh")


def _print_end(record: RunRecord, folder: Path, again: str) -> None:
    """Print the result of a run and, if it is not complete, the reason and the command that resumes it."""
    print(summary(record, folder), end="" if record.reason else "\n")
    if record.reason:
        verb = "try again from the last good checkpoint" if record.status == "failed" else "resume"
        print(f" ({record.reason}); {verb} with: {again}")


__getattr__ = absent_names(__name__)

if __name__ == "__main__":
    sys.exit(main())
