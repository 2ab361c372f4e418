"""What enters a reversible chain: a stream of full precision, and of the shape that the network was made for."""

from collections.abc import Sequence

import torch
from torch import Tensor

from memcnn.autocast import autocast_dtype

__all__ = ["check_shape", "in_full_precision"]


def in_full_precision(x: Tensor) -> Tensor:
    """Return x in float32 where autocast has made it bfloat16 or float16; else x.

    A chain rebuilds its streams, and a rebuilt bfloat16 stream drifts by percents. The branches still run in the lower
    precision.
    """
    lowered = x.dtype in (torch.bfloat16, torch.float16) and autocast_dtype(x.device.type) is not None
    return x.float() if lowered else x


def check_shape(x: Tensor, wanted: Sequence[int | str]) -> None:
    """Raise a ValueError if x has not the sizes that ``wanted`` has as numbers; words stand for any size."""
    fits = x.dim() == len(wanted) and all(
        size == want for size, want in zip(x.shape, wanted, strict=True) if isinstance(want, int)
    )
    if not fits:
        raise ValueError(
            f"the network takes ({', '.join(map(str, wanted))}): got {tuple(x.shape)}; give it such a tensor, or make "
            "the network for that shape"
        )
