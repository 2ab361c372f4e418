"""Warnings that point to the user's line, however many calls of memcnn and PyTorch lie in between."""

import sys
import warnings
from pathlib import Path
from types import FrameType

import torch

__all__ = ["warn_user"]

_LIBRARIES = tuple(f"{Path(file).parent}/" for file in (__file__, torch.__file__))


def warn_user(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the innermost line that is neither in memcnn nor in PyTorch.

    If there is no such line, as in a thread of autograd, warn at the line that calls this function.

    Args:
        message: what happened, and what to do.
        category: the class of the warning.
    """
    frame: FrameType | None = sys._getframe(1)
    level = 2
    while frame is not None and frame.f_code.co_filename.startswith(_LIBRARIES):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level if frame is not None else 2)
