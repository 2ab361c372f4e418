"""Argument types, exit statuses, and the printing of errors and progress, shared by all command lines."""

import argparse
import re
import sys

import torch

DONE = 0
"""Exit status: everything that was asked for is done, and everything that was checked holds."""
FAILED = 1
"""Exit status: the command failed, or a check did not hold."""
MISUSE = 2
"""Exit status: the command line is wrong, or asks for the impossible. ``ArgumentParser.error`` exits with it."""
STOPPED = 3
"""Exit status: training was stopped cleanly and can be resumed."""


def parser_from(prog: str, doc: str, *, whole: bool = False) -> argparse.ArgumentParser:
    """Return a parser that describes a module, and accepts no abbreviated options.

    Args:
        prog: the name of the command.
        doc: the module's docstring. Its first paragraph is shown before the options and its last one after them.
        whole: show all of it before the options, with its line breaks.
    """
    if whole:
        formatter = argparse.RawDescriptionHelpFormatter
        return argparse.ArgumentParser(prog=prog, description=doc, formatter_class=formatter, allow_abbrev=False)
    first, *_, last = doc.split("\n\n")
    return argparse.ArgumentParser(prog=prog, description=first, epilog=last, allow_abbrev=False)


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
    """Return the numbers in "40000,60000"."""
    return tuple(int(word) for word in text.split(",") if word)


def count(text: str) -> int:
    """Return the number in ``text``, which must be at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a whole number of at least 1")
    return int(text)


def count_or_all(text: str) -> int | None:
    """Return the number in ``text``, or None for "all"."""
    return None if text == "all" else count(text)


def devices() -> list[str]:
    """Return the names of the devices that there are, the best one first."""
    return [*(f"cuda:{index}" for index in range(torch.cuda.device_count())), "cpu"]
