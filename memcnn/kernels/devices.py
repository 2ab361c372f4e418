"""The devices that our kernels run on, and the layout and size of the tensors that they take."""

import os
from importlib.util import find_spec

import torch
from torch import Tensor

MOST_ELEMENTS = 2**31 - 1
"""Largest number of values of a tensor: the kernels' addresses are 32-bit integers."""


def has_triton() -> bool:
    """Return whether Triton is installed, as it is with PyTorch for CUDA on Linux. It is not imported."""
    return find_spec("triton") is not None


# Read once: the compiler takes it for a constant. Under Triton's interpreter kernels run on the CPU.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
KERNEL_DEVICES = (("cpu", "cuda") if _INTERPRETED else ("cuda",)) if has_triton() else ()
"""Types of devices on which our kernels run. Empty without Triton."""


def processors(x: Tensor) -> int:
    """Return the number of multiprocessors of a tensor's GPU; 1 on a CPU, for Triton's interpreter."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1


def innermost(x: Tensor) -> Tensor:
    """Return a tensor of four dimensions with its channels innermost in memory (channels_last)."""
    return x.contiguous(memory_format=torch.channels_last)
