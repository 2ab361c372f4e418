"""What the user names on a command line: a module or a function that makes one, and a file of tensors."""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from memcnn.cli import Misuse

WANTED = "wanted package.module:factory or path/to/file.py:factory"


def load(target: str) -> Any:
    """Import and return the object that ``package.module:name`` or ``path.py:name`` names.

    Raises:
        Misuse: if there is none, or it is not callable.
    """
    place, colon, name = target.partition(":")
    if not (place and colon and name):
        raise Misuse(f"target: got {target!r}, {WANTED}: add a colon and the name")
    sys.path.insert(0, str(Path.cwd()))
    try:
        found = _from_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except ModuleNotFoundError as error:
        raise Misuse(f"{target}: cannot import {error.name}: is it installed, or are you in another folder?") from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise Misuse(
                f"target: got {target!r}, but {getattr(found, '__name__', part)!r} has no attribute {part!r}; wanted "
                f"one of its names{_names(found)}"
            )
        found = getattr(found, part)
    if not callable(found):
        raise Misuse(
            f"target: got {target!r}, which is a {type(found).__name__}; wanted a module or a function that makes one: "
            "name such a function"
        )
    return found


def import_lines(target: str) -> list[str]:
    """Return the lines of code that import what ``target`` names."""
    place, _, name = target.partition(":")
    root = name.partition(".")[0]
    if not place.endswith(".py"):
        return [f"from {place} import {root}"]
    folder = str(Path(place).parent)
    path = [] if folder == "." else ["import sys", f"sys.path.insert(0, {folder!r})"]
    return [*path, f"from {Path(place).stem} import {root}"]


def load_tensors(path: Path) -> tuple[Tensor, ...]:
    """Return the tensors that ``torch.save`` wrote: one, or a tuple or list of them, which are the inputs of forward.

    Raises:
        Misuse: if the file holds anything else, or cannot be read.
    """
    wanted = "wanted a file in which torch.save wrote the inputs of forward: a tensor, or a tuple of tensors"
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise Misuse(f"--input: there is no file {path}; {wanted}: check the path") from None
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Misuse(f"--input: cannot read {path} ({reason}); {wanted}") from error
    tensors = tuple(found) if isinstance(found, (tuple, list)) else (found,)
    if not tensors or not all(isinstance(x, Tensor) for x in tensors):
        kinds = ", ".join(type(x).__name__ for x in tensors) or "no tensor"
        raise Misuse(f"--input: got {kinds} in {path}; {wanted}: save these alone")
    return tuple(x.detach() for x in tensors)


def _names(found: Any) -> str:
    """Return the callable names of a module for a message, "" where there are none."""
    names = [name for name, value in vars(found).items() if callable(value) and not name.startswith("_")]
    own = [name for name in names if getattr(vars(found)[name], "__module__", "") == getattr(found, "__name__", None)]
    return f", such as {', '.join(own[:5])}" if own else ""


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise Misuse(f"target: there is no file {path}; {WANTED}: check the path")
    sys.path.insert(0, str(path.absolute().parent))
    return importlib.import_module(path.stem)
