"""Sums over the bits of a tensor. They reveal changes that ``_version`` does not count.

``x.data.mul_(2)``, ``x.numpy()[0] = 1`` and kernels of one's own change values without a new version.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor, nn

from memcnn.engine.capture import is_captured
from memcnn.engine.torch_private import disabled_dispatch, has_values

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PRIME = 2**31 - 1
_SMALL = 2**14
"""Largest tensor, in bytes, that is checked by a hash in Python. Above it, PyTorch adds up the bits faster."""


def fingerprint(x: Tensor) -> Tensor:
    """Return the sum of the bits of x, taken as integers: a tensor on the device of x, without waiting for a GPU."""
    x = torch.view_as_real(x) if x.is_complex() else x
    bits = x.detach().view(_INTEGERS[x.element_size()])
    if bits.dtype is torch.int64:  # values of float64 share zero bits, so that a plain sum soon overflows to 0
        bits = bits % _PRIME
    return bits.sum(dtype=torch.int64)


def differ(then: Tensor, now: Tensor) -> bool:
    """Return whether two fingerprints differ. Those of tensors without values never do."""
    return has_values(now) and not torch.equal(then, now)


def has_fingerprint(x: Any) -> bool:
    """Return whether ``fingerprint`` can read x: an ordinary tensor, outside the capture of a CUDA graph."""
    return (
        type(x) in (Tensor, nn.Parameter)
        and x.device.type in ("cpu", "cuda")
        and x.layout is torch.strided
        and not x.is_quantized
        and not is_captured(x.device)
    )


def checksum(x: Tensor) -> int | None:
    """Return a number that nearly every change of x changes; None if x is no ordinary tensor in the CPU's memory."""
    if type(x) is not Tensor or x.device.type != "cpu" or x.layout is not torch.strided or x.is_quantized:
        return None
    if x.is_contiguous() and x.nbytes <= _SMALL:
        return hash(ctypes.string_at(x.data_ptr(), x.nbytes)) if x.nbytes else 0
    with disabled_dispatch():
        return int(fingerprint(x).item())
