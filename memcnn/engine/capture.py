"""What a reversible block cannot do while a CUDA graph is captured: nothing runs then, so that nothing can be read.

Capturing itself needs no care: what the recomputation does on the GPU is captured with the rest, and what it does in
Python is over when the graph is replayed.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def is_captured(device: torch.device) -> bool:
    """Whether work for `device` now goes into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def refuse_capture(device: torch.device, what: str, fix: str) -> None:
    """RuntimeError while a graph is captured: `what` would have to read from the GPU."""
    if is_captured(device):
        raise RuntimeError(f"{what}, which is impossible while a CUDA graph is captured: {fix}")


class NoRandomNumbers(TorchDispatchMode):
    """Within it random numbers are a RuntimeError: a captured generator cannot be set back for the recomputation."""

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
