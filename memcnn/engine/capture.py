"""Refuse what a reversible block cannot do during the capture of a CUDA graph, such as reading a value.

No kernel runs during a capture, so no value has been computed yet.

The recomputation itself can be captured. Its kernels become part of the graph, and its Python code runs only during the
capture.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def is_captured(device: torch.device) -> bool:
    """Return whether work for ``device`` is now captured into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def refuse_capture(device: torch.device, what: str, fix: str) -> None:
    """Raise a RuntimeError during a capture, because ``what`` would have to read a value from the GPU."""
    if is_captured(device):
        raise RuntimeError(f"{what}, which is impossible while a CUDA graph is captured: {fix}")


class NoRandomNumbers(TorchDispatchMode):
    """A context in which drawing random numbers raises a RuntimeError.

    The state of a captured generator cannot be restored for the recomputation.

    Args:
        name: the name of the module, for the message.
    """

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def __torch_dispatch__(
        self, function: Any, types: Sequence[type], args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if torch.Tag.nondeterministic_seeded in function.tags:
            raise RuntimeError(
                f"{self.name} draws random numbers ({function}), and the recomputation must draw the "
                "same again, which is impossible while a CUDA graph is captured: capture the block "
                "with disable=True, or with preserve_rng_state=False if other numbers will do"
            )
        return function(*args, **(kwargs or {}))
