"""Options of command lines that train: the hyper-parameters of a recipe, and how steps are executed."""

import argparse
import os
from dataclasses import fields, replace

import torch

from memcnn.cli import count, count_or_all, duration, iterations_list, number, whole_number
from memcnn.training.execution import PRECISIONS, Execution
from memcnn.training.recipe import RECIPES, Recipe, override

__all__ = [
    "HYPERPARAMETERS",
    "add_execution_options",
    "add_hyper_parameters",
    "count",
    "duration",
    "execution_of",
    "explicit_execution",
    "recipe_of",
]

HYPERPARAMETERS = {
    "batch_size": (whole_number, "images of an iteration"),
    "iterations": (whole_number, "number of iterations (updates of the weights)"),
    "learning_rate": (number, "learning rate before the first milestone"),
    "milestones": (iterations_list, "iterations after which DECAY is applied, like 40000,60000"),
    "decay": (number, "factor on the learning rate at a milestone"),
    "momentum": (number, "momentum of SGD"),
    "weight_decay": (number, "L2 penalty, on every parameter"),
    "pad": (whole_number, "pixels of padding before the random crop"),
    "flip": (None, "mirror training images at random"),
    "evaluate_every": (whole_number, "iterations between evaluations, each followed by a checkpoint"),
    "test_images": (count_or_all, "evaluate on the first N test images, or on all"),
}


def add_hyper_parameters(parser: argparse.ArgumentParser) -> None:
    """Add an option for each field of a recipe but its name."""
    group = parser.add_argument_group("hyper-parameters", "replace those of the recipe; the run's name lists them")
    for name, (kind, text) in HYPERPARAMETERS.items():
        defaults = ", ".join(f"{recipe.name} {_spell(getattr(recipe, name))}" for recipe in RECIPES.values())
        how = {"action": argparse.BooleanOptionalAction} if kind is None else {"type": kind}
        group.add_argument(f"--{name.replace('_', '-')}", default=argparse.SUPPRESS, help=f"{text} ({defaults})", **how)


def recipe_of(given: argparse.Namespace) -> Recipe:
    """Return the recipe with the values of the options; raise ValueError if one is out of range."""
    changes = {name: value for name, value in vars(given).items() if name in HYPERPARAMETERS}
    return override(RECIPES[given.recipe], **changes)


CHOSEN_BY_FAST = ("precision", "graph", "compile", "narrow_convolutions")


def add_execution_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that ``execution_of`` reads."""
    group = parser.add_argument_group("execution", "how steps are executed: not a part of the recipe, but recorded")
    option = group.add_argument
    fast = (
        "use the fastest execution measured on this type of device; sets --precision, --graph, --compile and "
        "--narrow-convolutions"
    )
    option("--fast", action=argparse.BooleanOptionalAction, help=fast)
    option("--precision", choices=PRECISIONS, help=f"number format of all layers (default: {Execution().precision})")
    option("--graph", action="store_true", help="capture the whole step as a CUDA graph; no effect on a CPU")
    option("--compile", action="store_true", help="use torch.compile; the first steps take minutes")
    option("--sync-batch-norm", action="store_true", help="under torchrun: statistics of the whole batch (GPUs only)")
    option("--deterministic", action="store_true", help="deterministic kernels, slower on a GPU; CPUs always have them")
    narrow = "our kernels for narrow convolutions, where they are measured to be faster (GPUs, Triton)"
    option("--narrow-convolutions", action="store_true", help=narrow)
    norms = "fewer kernels for BatchNorm, whose statistics the recomputation reuses (GPUs, Triton, --compile)"
    option("--fused-norms", action="store_true", help=f"{norms}; may be added to --fast")
    combine = "let the compiler launch small kernels together (GPUs, --compile); may be added to --fast"
    option("--combine-kernels", action="store_true", help=combine)


def explicit_execution(given: argparse.Namespace) -> list[str]:
    """Return the given options that ``--fast`` chooses itself, such as "--graph"."""
    return [f"--{name.replace('_', '-')}" for name in CHOSEN_BY_FAST if getattr(given, name)]


def execution_of(
    given: argparse.Namespace, device: str | torch.device | None = None, *, processes: int | None = None
) -> Execution:
    """Return the execution that the options of ``add_execution_options`` describe.

    Args:
        given: the options.
        device: the device that trains; it decides what ``--fast`` means. By default that of ``--device``, else a GPU
            if there is one, else the CPU.
        processes: how many processes share each batch; by default the number that torchrun started.
    Raises:
        ValueError: ``--fast`` is given together with an option that it chooses itself.
    """
    explicit = explicit_execution(given)
    if given.fast and explicit:
        raise ValueError(
            f"got --fast and {' and '.join(explicit)}: --fast chooses precision, graph, compile and "
            "narrow-convolutions for the device; leave out the one or the other"
        )
    names = [field.name for field in fields(Execution) if field.name not in CHOSEN_BY_FAST]
    rest = {name: getattr(given, name) for name in names}
    if not given.fast:
        precision = given.precision or Execution().precision
        chosen = {name: getattr(given, name) for name in CHOSEN_BY_FAST if name != "precision"}
        return Execution(precision=precision, **chosen, **rest)
    name = str(device or getattr(given, "device", None) or ("cuda" if torch.cuda.is_available() else "cpu"))
    kind = torch.device("cuda" if name.startswith("cuda") else "cpu")  # pick_device reports a wrong name
    processes = processes or int(os.environ.get("WORLD_SIZE", "1"))
    return replace(Execution.fastest(kind, processes=processes, deterministic=given.deterministic), **rest)


def _spell(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return "all" if value is None else str(value)
