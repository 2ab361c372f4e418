"""Attribute exceptions: one that the tested block causes fails a law, any other is a fault of the verifier."""

import math
import sysconfig
import textwrap
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from memcnn.testing.laws.result import Report, Result

Checked = TypeVar("Checked", Report, Result, list[Result], Result | None)
"""Types that a check returns."""

TESTING = Path(__file__).parents[1]
STANDARD_LIBRARY = Path(sysconfig.get_path("stdlib"))
LONGEST = 400
"""Maximum number of characters of an exception's text to show: those of PyTorch's dispatcher have thousands."""
OWN_MISTAKES = (ArithmeticError, AssertionError, AttributeError, LookupError, NameError, TypeError)
"""Exceptions that the verifier's own code may raise by mistake. Torch raises others for tensors that do not fit."""


def is_ours(error: BaseException) -> bool:
    """Return whether the verifier itself broke: the exception was raised in its code, not in that of the block."""
    frames = traceback.extract_tb(error.__traceback__)
    if getattr(error, "raised_by_block", False) or not frames:
        return False
    return isinstance(error, OWN_MISTAKES) and Path(frames[-1].filename).is_relative_to(TESTING)


def described(error: BaseException) -> str:
    """Return the exception in words, for "... raised X", with the last line of the block's own code that ran."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not is_of_library(Path(f.filename))]
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    text = textwrap.shorten(str(error), LONGEST, placeholder=" ...")
    return f"{type(error).__name__}: {text}{where}"


def is_of_library(path: Path) -> bool:
    """Return whether the file is one of memcnn, torch or Python, as against the user's."""
    own = path.is_relative_to(TESTING.parent) or path.is_relative_to(STANDARD_LIBRARY)
    return own or "site-packages" in path.parts or not path.is_file()


def guarded(law: str, claim: str, check: Callable[..., Checked], *arguments: object) -> Checked | Result:
    """Return ``check(*arguments)``; a failure of ``claim`` where the block raises an exception.

    Raises:
        Exception: one that is the verifier's own fault.
    """
    try:
        return check(*arguments)
    except Exception as error:
        return failure(law, claim, error)


def failure(law: str, claim: str, error: Exception) -> Result:
    """Return a failure of ``claim`` for an exception of the block. Raise the exception if it is the verifier's own."""
    if is_ours(error):
        raise error
    return Result(law, claim, math.inf, 0.0, explanation=f"raised {described(error)}")
