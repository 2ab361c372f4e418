"""Parser, argument types, exit statuses, errors and progress of all command lines.

A command has a ``main`` with the decorator `command`. Bad input then ends it with exit status 2 and one or two lines on
standard error: what it got, what it wanted, and the fix. No usage and no traceback precede them.
"""

import argparse
import difflib
import errno
import functools
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

DONE = 0
"""Exit status: everything that was asked for is done, and everything that was checked holds."""
FAILED = 1
"""Exit status: the command failed, or a check did not hold."""
MISUSE = 2
"""Exit status: the command line is wrong, or asks for the impossible. ``ArgumentParser.error`` exits with it."""
STOPPED = 3
"""Exit status: training was stopped cleanly and can be resumed. ``memcnn.verify`` uses 3 for something else."""
INTERRUPTED = 130
"""Exit status: Ctrl-C ended a command that cannot be resumed, as shells report it."""

LARGEST_COUNT = 2**31 - 1
MOST_THREADS = 1024


class Misuse(ValueError):
    """Raised if a request cannot be carried out; the message says what was wanted, and how to ask for it."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line and a pointer to the help, and which has ``--version``.

    It accepts no abbreviated options, and proposes the option that a misspelt one resembles.

    Args:
        prog: the name of the command, as after ``python -m``.
        **how: arguments of ``argparse.ArgumentParser``.
    """

    def __init__(self, prog: str, **how: Any) -> None:
        super().__init__(prog=prog, allow_abbrev=False, **how)
        self.add_argument("--version", action=_PrintVersion, nargs=0, help="print the versions of memcnn and torch")

    def parse_args(  # type: ignore[override]  # argparse declares an overload for each kind of namespace
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        """Parse all arguments; exit with an error if one is unknown."""
        given, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(self._about_unknown(unknown))
        return given

    def error(self, message: str) -> NoReturn:
        """Print the message, and exit with status ``MISUSE``."""
        self.exit(MISUSE, f"{self.prog}: {message}\nOptions: python -m {self.prog} --help\n")

    def _about_unknown(self, unknown: list[str]) -> str:
        """Return the error for unknown arguments, with the option that the first one resembles."""
        options = [option for option in self._option_string_actions if option.startswith("--")]
        word = unknown[0].partition("=")[0]
        close = difflib.get_close_matches(word, options, n=1)
        hint = f"did you mean {close[0]}?" if close and word.startswith("-") else "leave it out"
        return f"got {' '.join(unknown)!r}, wanted only what the command takes: {hint}"


class _PrintVersion(argparse.Action):
    """Print the versions of memcnn, torch and Python, and exit."""

    def __init__(self, *arguments: Any, **how: Any) -> None:
        super().__init__(*arguments, **{**how, "dest": argparse.SUPPRESS, "default": argparse.SUPPRESS})

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from memcnn import __version__

        print(f"memcnn {__version__}, torch {torch.__version__}, Python {sys.version.split()[0]}")
        parser.exit(DONE)


def parser_from(prog: str, doc: str, *, whole: bool = False, **how: Any) -> Parser:
    """Return a parser that describes a module.

    Args:
        prog: the name of the command.
        doc: the module's docstring. Its first paragraph is shown before the options and its last one after them.
        whole: show all of it before the options, with its line breaks.
        **how: further arguments of the parser.
    """
    if whole:
        return Parser(prog, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, **how)
    first, *_, last = doc.split("\n\n")
    return Parser(prog, description=first, epilog=last, **how)


def command(prog: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Return a decorator for ``main`` that turns bad input, system errors and Ctrl-C into a message and an exit status.

    Args:
        prog: the name of the command, which starts each message.
    """

    def decorate(main: Callable[..., int]) -> Callable[..., int]:
        @functools.wraps(main)
        def guarded(arguments: Sequence[str] | None = None) -> int:
            try:
                return main(arguments)
            except Misuse as error:
                print(f"{prog}: {error}", file=sys.stderr)
                return MISUSE
            except BrokenPipeError:  # the reader of the output, such as ``head``, has ended
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                return FAILED
            except OSError as error:
                print(f"{prog}: {explain_os_error(error)}", file=sys.stderr)
                return MISUSE if _is_bad_path(error) else FAILED
            except KeyboardInterrupt:
                print(f"{prog}: interrupted", file=sys.stderr)
                return INTERRUPTED

        return guarded

    return decorate


_PATH_FIXES: dict[type[OSError], str] = {
    PermissionError: "choose a place that you may read and write",
    FileNotFoundError: "check the path for a spelling mistake",
    FileExistsError: "a file is in the way: choose another path",
    NotADirectoryError: "a part of the path is a file: choose another path",
    IsADirectoryError: "wanted a file: choose another path",
}


def _is_bad_path(error: OSError) -> bool:
    """Return whether another path would be right. Otherwise the system failed, as with a full disk."""
    return type(error) in _PATH_FIXES or error.errno == errno.ENAMETOOLONG


def explain_os_error(error: OSError) -> str:
    """Return what the system refused, and what to do about it."""
    reason = error.strerror or str(error)
    where = f"{error.filename}: " if error.filename is not None else ""
    fix = _PATH_FIXES.get(type(error), "make room or choose another place, and run the command again")
    if error.errno == errno.ENAMETOOLONG:
        fix = "choose a shorter name"
    return f"{where}{reason}; {fix}"


def fail(error: Exception | str) -> int:
    """Print an error on standard error; return the exit status."""
    print(error, file=sys.stderr)
    return FAILED


def progress(text: str) -> None:
    """Replace the line of progress on a terminal; an empty text clears it. Elsewhere nothing is printed."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def use_threads(count: int | None) -> None:
    """Set the number of CPU threads; None leaves PyTorch's choice."""
    if count is not None:
        torch.set_num_threads(count)


def duration(text: str) -> float:
    """Return the seconds in "90", "90s", "9m" or "1h30m"."""
    match = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s?)?", text.strip())
    if not match or not any(match.groups()):
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a time like 90s, 9m or 1h30m")
    hours, minutes, seconds = (float(group or 0) for group in match.groups())
    return 3600 * hours + 60 * minutes + seconds


def iterations_list(text: str) -> tuple[int, ...]:
    """Return the numbers in "40000,60000"; an empty text has none."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not all(word.isdecimal() for word in words):
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted iterations separated by commas, such as 40000,60000")
    return tuple(int(word) for word in words)


def whole_number(text: str) -> int:
    """Return the whole number in ``text``, of either sign."""
    if not re.fullmatch(r"[+-]?\d{1,30}", text.strip()):
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a whole number")
    return int(text)


def number(text: str) -> float:
    """Return the finite number in ``text``."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a number, such as 0.1 or 2e-4")
    return value


def seconds(text: str) -> float:
    """Return the number in ``text``, which must be above 0."""
    value = number(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted seconds above 0")
    return value


def count(text: str, *, most: int = LARGEST_COUNT) -> int:
    """Return the number in ``text``, which must be from 1 to ``most``."""
    if not text.isdecimal() or not 1 <= int(text[:30]) <= most:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a whole number of at least 1 and at most {most:,}")
    return int(text)


def threads(text: str) -> int:
    """Return the number of CPU threads in ``text``."""
    return count(text, most=MOST_THREADS)


def shape(text: str) -> tuple[int, ...]:
    """Return (100, 3, 32, 32) for "100,3,32,32"."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and 1 <= int(word[:30]) <= LARGEST_COUNT for word in words):
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted whole numbers, the batch first, such as 100,3,32,32")
    return tuple(map(int, words))


def counts(text: str) -> tuple[int, ...]:
    """Return the numbers in "1,4,8", each at least 1."""
    return tuple(count(word.strip()) for word in text.split(","))


def names(choices: Sequence[str]) -> Callable[[str], list[str]]:
    """Return an argument type for "a,b": a list of the names in ``choices``, each once, in the order given."""

    def parse(text: str) -> list[str]:
        wanted = list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
        unknown = [word for word in wanted if word not in choices]
        if unknown or not wanted:
            got = ", ".join(unknown) or "nothing"
            raise argparse.ArgumentTypeError(f"got {got}, wanted some of {', '.join(choices)}")
        return wanted

    return parse


def input_folder(text: str) -> Path:
    """Return the path of a folder to read."""
    path = folder_that_may_be_missing(text)
    if not path.exists():
        raise argparse.ArgumentTypeError(f"got {text!r}, which does not exist; wanted a folder: check the path")
    return path


def folder_that_may_be_missing(text: str) -> Path:
    """Return the path of a folder to read, which may be missing."""
    path = _path(text)
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"got {text!r}, which is a file; wanted a folder")
    if path.exists() and not os.access(path, os.R_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"got {text!r}, which cannot be read; wanted a folder that can")
    return path


def output_folder(text: str) -> Path:
    """Return the path of a folder that exists and is writable, or that can be created."""
    path = _path(text)
    _check_writable(path, "a folder")
    return path


def output_file(text: str) -> Path:
    """Return the path of a file that can be written because its folder exists."""
    path = _path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"got {text!r}, which is a folder; wanted a file: add a name to the path")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(
            f"got {text!r}, wanted a file in a folder that exists: create the folder first"
        )
    _check_writable(path.parent, "a file in a folder")
    if path.exists() and not os.access(path, os.W_OK):
        raise argparse.ArgumentTypeError(f"got {text!r}, which cannot be written; choose another file")
    return path


def _path(text: str) -> Path:
    """Return the path in ``text``. An empty one is most often an unset variable of the shell."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a path; a dot stands for this folder")
    return Path(text)


def _check_writable(folder: Path, what: str) -> None:
    """Raise ArgumentTypeError if the folder cannot be created or written to."""
    try:
        there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    except OSError as error:  # such as a name that is too long
        raise argparse.ArgumentTypeError(f"got {str(folder)!r}: {error.strerror}; wanted another path") from None
    if not there.is_dir():
        raise argparse.ArgumentTypeError(f"{there} is a file; wanted {what}: choose another path, or move the file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"{there} cannot be written to; wanted {what} that can: choose another path")


def count_or_all(text: str) -> int | None:
    """Return the number in ``text``, or None for "all"."""
    return None if text == "all" else count(text)


def devices() -> list[str]:
    """Return the names of the available devices, GPUs first."""
    return [*(f"cuda:{index}" for index in range(torch.cuda.device_count())), "cpu"]
