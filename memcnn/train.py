#!/usr/bin/env python3
"""Train a ResNet or RevNet on CIFAR; stop it at any time, and the same command goes on from there.

    ./train.py MODEL DATASET            in this folder, or
    python -m memcnn.train MODEL DATASET

Exit status: 0 the run is complete, 3 it was stopped cleanly and can go on (Ctrl-C, SIGTERM, budget), 1 it failed,
2 misuse.
"""

import argparse
import re
import shlex
import sys
import time
from pathlib import Path

STARTED = time.monotonic()  # of the budget, before the imports that take seconds
if __package__ in (None, ""):  # run as a script: this folder's names (data, models ...) must not hide other packages
    here = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != here]
    if str(here.parent) not in sys.path:
        sys.path.insert(0, str(here.parent))

import torch  # noqa: E402

from memcnn.archives import DATASETS, BadData, DataNotFound  # noqa: E402
from memcnn.models.resnet import MODELS  # noqa: E402
from memcnn.training.checkpoint import BadCheckpoint  # noqa: E402
from memcnn.training.files import FolderBusy  # noqa: E402
from memcnn.training.recipe import RECIPES, Recipe, override  # noqa: E402
from memcnn.training.record import RunRecord, run_name  # noqa: E402
from memcnn.training.trainer import BadArgument, train  # noqa: E402


def duration(text: str) -> float:
    """Seconds from "90", "90s", "9m", "1h30m"."""
    match = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s?)?", text.strip())
    if not match or not any(match.groups()):
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a time like 90s, 9m or 1h30m")
    hours, minutes, seconds = (float(group or 0) for group in match.groups())
    return 3600 * hours + 60 * minutes + seconds


def iterations_list(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(",") if word)


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a whole number of at least 1")
    return int(text)


def count_or_all(text: str) -> int | None:
    return None if text == "all" else count(text)


HYPERPARAMETERS = {
    "batch_size": (int, "images of an iteration"),
    "iterations": (int, "updates in all"),
    "learning_rate": (float, "step size before the first milestone"),
    "milestones": (iterations_list, "iterations after which DECAY is applied, like 40000,60000"),
    "decay": (float, "factor on the learning rate at a milestone"),
    "momentum": (float, "momentum of SGD"),
    "weight_decay": (float, "L2 penalty, on every parameter"),
    "pad": (int, "pixels of padding before the random crop"),
    "flip": (None, "mirror training images at random"),
    "evaluate_every": (int, "iterations between evaluations, each followed by a checkpoint"),
    "test_images": (count_or_all, "test images to evaluate on, from the first, or all"),
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="memcnn.train",
        description=__doc__.split("\n\n")[0],
        epilog=__doc__.split("\n\n")[-1],
        allow_abbrev=False,
    )
    parser.add_argument("model", choices=MODELS, metavar="MODEL", help=", ".join(MODELS))
    parser.add_argument("dataset", choices=DATASETS, metavar="DATASET", help=", ".join(DATASETS))
    option = parser.add_argument
    option("--recipe", choices=RECIPES, default="published", help="set of hyper-parameters (default: %(default)s)")
    option("--seed", type=int, default=0, help="of weights, order and augmentation (default: %(default)s)")
    data = 'folder of the CIFAR files, or the word "generated" for made-up images'
    option("--data", metavar="FOLDER", help=f"{data} (default: $MEMCNN_DATA, else ./data; downloaded when missing)")
    option("--runs", metavar="FOLDER", default="runs", help="folder of all runs (default: ./%(default)s)")
    option("--device", help="cpu, cuda, cuda:1 ... (default: cuda where there is one, else cpu)")
    option("--threads", type=count, help=f"CPU threads (default: {torch.get_num_threads()}, PyTorch's choice here)")
    option("--budget", metavar="TIME", type=duration, help="stop cleanly before this is over: 90s, 9m, 1h30m")
    option("--fresh", action="store_true", help="begin anew; a run that is there already is moved aside")
    option("--disable", action="store_true", help="train RevNets by plain autograd, with all activations stored")
    group = parser.add_argument_group("hyper-parameters", "in place of the recipe's; the run's name says so")
    for name, (kind, text) in HYPERPARAMETERS.items():
        defaults = ", ".join(f"{recipe.name} {_spell(getattr(recipe, name))}" for recipe in RECIPES.values())
        how = {"action": argparse.BooleanOptionalAction} if kind is None else {"type": kind}
        group.add_argument(f"--{name.replace('_', '-')}", default=argparse.SUPPRESS, help=f"{text} ({defaults})", **how)
    return parser


def _spell(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return "all" if value is None else str(value)


def summary(record: RunRecord, folder: Path) -> str:
    """One line for the end of a run."""
    if record.test_accuracy is None:
        accuracy = "not evaluated yet"
    else:
        accuracy = f"test accuracy {record.test_accuracy:.2f} % after iteration {record.test_iteration}"
    return (
        f"{record.model} on {record.dataset}{'' if record.data['official'] else ' (generated data)'}: {accuracy}, "
        f"{record.status}, {record.iterations}/{record.recipe.iterations} iterations in {record.train_seconds:.0f} s "
        f"of training, {folder}"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = build_parser()
    given = parser.parse_args(arguments)
    changes = {name: value for name, value in vars(given).items() if name in HYPERPARAMETERS}
    try:
        recipe: Recipe = override(RECIPES[given.recipe], **changes)
    except ValueError as error:
        parser.error(str(error))
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    budget = None if given.budget is None else given.budget - (time.monotonic() - STARTED)
    folder = Path(given.runs) / run_name(given.model, given.dataset, recipe, given.seed)
    command = sys.orig_argv if arguments is None else [sys.executable, "-m", "memcnn.train", *arguments]
    again = shlex.join(word for word in command if word != "--fresh")
    try:
        record = train(
            given.model,
            given.dataset,
            recipe=recipe,
            seed=given.seed,
            data=given.data,
            runs=given.runs,
            device=given.device,
            fresh=given.fresh,
            budget_seconds=budget,
            disable=given.disable,
        )
    except (BadArgument, BadCheckpoint) as error:
        parser.error(str(error))
    except (BadData, DataNotFound, FolderBusy, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"Interrupted before training began. Start it with: {again}", file=sys.stderr)
        return 3
    print(summary(record, folder), end="" if record.reason else "\n")
    if record.reason:
        verb = "try again from the last good checkpoint" if record.status == "failed" else "go on"
        print(f" ({record.reason}); {verb} with: {again}")
    return {"complete": 0, "failed": 1, "partial": 3}[record.status]


if __name__ == "__main__":
    sys.exit(main())
