"""Load the objects that a command line names: a module or a function that makes one, and a file of tensors."""

import contextlib
import copy
import importlib
import importlib.util
import io
import sys
import traceback
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from memcnn.cli import Misuse
from memcnn.testing.laws.guard import is_of_library

WANTED = "wanted package.module:factory or path/to/file.py:factory"


class Factory:
    """Makes a new module of the user's at each call. What the user's function prints is shown once.

    Attributes:
        target: ``package.module:name`` or ``path.py:name``.
        is_called: whether the target is a function or a class, not a module.
    """

    def __init__(self, target: str):
        self.target = target
        self._make = load(target)
        self.is_called = not isinstance(self._make, nn.Module)
        self._has_printed = False

    def __call__(self) -> nn.Module:
        """Return a new module.

        Raises:
            Misuse: if the user's function raises an exception, exits, or returns anything else.
        """
        output = io.StringIO()
        try:
            with contextlib.redirect_stdout(output):
                module = self._make() if self.is_called else copy.deepcopy(self._make)
        except (Exception, SystemExit) as error:
            raise Misuse(
                f"target: {self.target}: making the module raised {_described(error)}; wanted a function that needs "
                "no arguments and returns a module: correct it, or name another one"
            ) from error
        if not isinstance(module, nn.Module):
            raise Misuse(
                f"target: got {type(module).__name__} from {self.target}, wanted an nn.Module with forward and "
                "inverse: let the function return it"
            )
        if output.getvalue().strip() and not self._has_printed:
            self._has_printed = True
            print(f"{self.target} printed:\n{output.getvalue().rstrip()}\n", file=sys.stderr)
        return module


def load(target: str) -> Any:
    """Import and return the object that ``package.module:name`` or ``path.py:name`` names.

    Raises:
        Misuse: if there is none, its file cannot be imported, or it is not callable.
    """
    place, colon, name = target.partition(":")
    if not (place and colon and name):
        raise Misuse(f"target: got {target!r}, {WANTED}: add a colon and the name")
    sys.path.insert(0, str(Path.cwd()))
    try:
        found = _from_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except Misuse:
        raise
    except ModuleNotFoundError as error:
        raise Misuse(
            f"{target}: cannot import {error.name}{_where(error)}: is it installed, or are you in another folder?"
        ) from error
    except (Exception, SystemExit) as error:
        raise Misuse(
            f"target: importing {place} raised {_described(error)}; wanted a file that can be imported: correct that "
            f"line, and try python -c 'import {Path(place).stem}'"
        ) from error
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


def _described(error: BaseException) -> str:
    """Return the exception with the file and line of the user's code."""
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error.msg} ({error.filename}, line {error.lineno})"
    words = f"SystemExit({error.code!r})" if isinstance(error, SystemExit) else f"{type(error).__name__}: {error}"
    return words + _where(error)


def _where(error: BaseException) -> str:
    """Return " (file, line n)" of the last line of the user's code that ran; "" if there is none."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not is_of_library(Path(f.filename))]
    return f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""


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
    how = 'write one with torch.save(x, "batch.pt")'
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise Misuse(f"--input: there is no file {path}; {wanted}: check the path") from None
    except OSError as error:
        raise Misuse(f"--input: cannot read {path} ({error.strerror}); {wanted}: {how}") from None
    except Exception:  # torch raises many kinds, whose texts name what this file may be and need not be
        kind = "holds more than tensors" if zipfile.is_zipfile(path) else "was not written by torch.save"
        raise Misuse(f"--input: {path} {kind}; {wanted}: {how}") from None
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
    """Import and return the module in a file; raise ``Misuse`` if Python finds another module of its name."""
    if not path.is_file():
        raise Misuse(f"target: there is no file {path}; {WANTED}: check the path")
    sys.path.insert(0, str(path.absolute().parent))
    module = importlib.import_module(path.stem)
    found = getattr(module, "__file__", None)
    if found is None or not Path(found).samefile(path):
        raise Misuse(
            f"target: got {path}, but Python knows another module of the name {path.stem} ({found or 'built in'}); "
            "wanted a name of its own: rename the file"
        )
    return module
