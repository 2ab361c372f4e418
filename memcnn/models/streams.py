"""Functions that the networks of this package share: make a chain, and check or cast the tensor that enters it."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from memcnn.autocast import autocast_dtype
from memcnn.models.revop import InvertibleModuleWrapper, ReversibleSequential

__all__ = ["check_shape", "in_full_precision", "reversible_chain"]


def reversible_chain(modules: Iterable[nn.Module], disable: bool) -> ReversibleSequential:
    """Return a chain of wrapped modules. With ``disable`` each stores its activations, as plain autograd does."""
    return ReversibleSequential(*(InvertibleModuleWrapper(module, disable=disable) for module in modules))


def in_full_precision(x: Tensor) -> Tensor:
    """Return x in float32 if autocast is on and x is bfloat16 or float16; else x.

    A chain rebuilds its streams, and rebuilding in bfloat16 has errors of several percent. The branches still run in
    the lower precision.
    """
    lowered = x.dtype in (torch.bfloat16, torch.float16) and autocast_dtype(x.device.type) is not None
    return x.float() if lowered else x


def check_shape(x: Tensor, wanted: Sequence[int | str]) -> None:
    """Raise a ValueError if the shape of x is not ``wanted``, in which a word such as "N" stands for any size."""
    fits = x.dim() == len(wanted) and all(
        size == want for size, want in zip(x.shape, wanted, strict=True) if isinstance(want, int)
    )
    if not fits:
        raise ValueError(
            f"the network takes ({', '.join(map(str, wanted))}): got {tuple(x.shape)}; give it such a tensor, or make "
            "the network for that shape"
        )
