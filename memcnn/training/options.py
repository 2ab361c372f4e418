"""Options of command lines that train: their types, the hyper-parameters of a recipe, and how steps are executed."""

import argparse
import re
from dataclasses import fields

from memcnn.training.execution import PRECISIONS, Execution
from memcnn.training.recipe import RECIPES, Recipe, override


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


def add_hyper_parameters(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("hyper-parameters", "in place of the recipe's; the run's name says so")
    for name, (kind, text) in HYPERPARAMETERS.items():
        defaults = ", ".join(f"{recipe.name} {_spell(getattr(recipe, name))}" for recipe in RECIPES.values())
        how = {"action": argparse.BooleanOptionalAction} if kind is None else {"type": kind}
        group.add_argument(f"--{name.replace('_', '-')}", default=argparse.SUPPRESS, help=f"{text} ({defaults})", **how)


def recipe_of(given: argparse.Namespace) -> Recipe:
    """The recipe that is asked for; ValueError when a value is out of range."""
    changes = {name: value for name, value in vars(given).items() if name in HYPERPARAMETERS}
    return override(RECIPES[given.recipe], **changes)


def add_execution_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("execution", "how steps are run: no part of the recipe, but recorded")
    option = group.add_argument
    option("--precision", choices=PRECISIONS, default="float32", help="of F, G and all layers (default: %(default)s)")
    option("--graph", action="store_true", help="capture the whole step as a CUDA graph; no effect on a CPU")
    option("--compile", action="store_true", help="through torch.compile; the first steps take minutes")
    option("--sync-batch-norm", action="store_true", help="under torchrun: statistics of the whole batch (GPUs only)")


def execution_of(given: argparse.Namespace) -> Execution:
    """What the options of `add_execution_options` ask for."""
    return Execution(**{field.name: getattr(given, field.name) for field in fields(Execution)})


def _spell(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return "all" if value is None else str(value)
