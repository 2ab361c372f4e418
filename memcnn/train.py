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

STARTED = time.monotonic()
if __package__ in (None, ""):  # run as a script: this folder's names (data, models ...) must not hide other packages
    here = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != here]
    if str(here.parent) not in sys.path:
        sys.path.insert(0, str(here.parent))

import torch  # noqa: E402

from memcnn.data import DATASETS, DataNotFound  # noqa: E402
from memcnn.models.resnet import MODELS  # noqa: E402
from memcnn.training.recipe import RECIPES, Recipe, override  # noqa: E402
from memcnn.training.record import RunRecord, run_name  # noqa: E402
from memcnn.training.trainer import train  # noqa: E402


def duration(text: str) -> float:
    """Seconds from "90", "90s", "9m", "1h30m"."""
    match = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s?)?", text.strip())
    if not match or not any(match.groups()):
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a time like 90s, 9m or 1h30m")
    hours, minutes, seconds = (float(group or 0) for group in match.groups())
    return 3600 * hours + 60 * minutes + seconds


def iterations_list(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(",") if word)


def count_or_all(text: str) -> int | None:
    return None if text == "all" else int(text)


HYPERPARAMETERS = {
    "batch_size": (int, "images of an iteration"),
    "iterations": (int, "updates in all"),
    "learning_rate": (float, "step size before the first milestone"),
    "milestones": (iterations_list, "iterations after which the learning rate is multiplied by DECAY, like 40000,60000"),
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
    parser.add_argument("--recipe", choices=RECIPES, default="published", help="set of hyper-parameters (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and augmentation (default: %(default)s)")
    parser.add_argument("--data", metavar="FOLDER", help='folder of the CIFAR files, or the word "generated" for made-up '
                        "images (default: $MEMCNN_DATA, else ./data; downloaded when missing)")  # fmt: skip
    parser.add_argument("--runs", default="runs", metavar="FOLDER", help="folder of all runs (default: ./%(default)s)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda where there is one, else cpu)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice, here %d)" % torch.get_num_threads())
    parser.add_argument("--budget", type=duration, metavar="TIME", help="stop cleanly before so much time has passed: 90s, 9m, 1h30m")
    parser.add_argument("--fresh", action="store_true", help="begin anew; a run that is there already is moved aside")
    parser.add_argument("--disable", action="store_true", help="RevNets store their activations, as plain autograd does")
    group = parser.add_argument_group("hyper-parameters", "in place of the recipe's; they become part of the run's name")
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
    again = shlex.join(word for word in sys.orig_argv if word != "--fresh")
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
    except ValueError as error:
        parser.error(str(error))
    except (DataNotFound, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1
    print(summary(record, folder))
    if record.status == "complete":
        return 0
    print(f"{record.reason}; go on with: {again}")
    return 1 if record.status == "failed" else 3


if __name__ == "__main__":
    sys.exit(main())
