"""Invertible layers that only move entries: permute channels, or turn positions into channels and back."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from memcnn.models.log_det import constant_log_det

__all__ = ["ChannelPermutation", "DepthToSpace", "SpaceToDepth"]


class _Rearrangement(nn.Module):
    """Base class of layers that only move entries. They preserve volume, so their log-determinant is 0."""

    inverse: Callable[[Tensor], Tensor]

    def forward_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return y and log|det dy/dx| for each sample, shape (N,): zeros."""
        return self(x), constant_log_det(x)

    def inverse_log_det(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return x and log|det dx/dy| for each sample, shape (N,): zeros."""
        return self.inverse(y), constant_log_det(y)


class ChannelPermutation(_Rearrangement):
    """y[:, i] = x[:, order[i]], for x of shape (N, C, ...).

    Args:
        order: a permutation of 0 .. C - 1, such as ``torch.randperm(C)`` or ``range(C)[::-1]``.

    Raises:
        ValueError: ``order`` is not a permutation.
    """

    order: Tensor

    def __init__(self, order: Sequence[int] | Tensor):
        super().__init__()
        order = torch.as_tensor(order)
        if sorted(order.tolist()) != list(range(len(order))):
            raise ValueError(f"order must hold every channel from 0 to {len(order) - 1} once: got {order.tolist()}")
        self.register_buffer("order", order)

    def forward(self, x: Tensor) -> Tensor:
        """Return y, same shape as x (N, C, ...)."""
        return self._permuted(x, self.order)

    def inverse(self, y: Tensor) -> Tensor:
        """Return x, same shape as y (N, C, ...)."""
        return self._permuted(y, self.order.argsort())

    def extra_repr(self) -> str:
        return f"{len(self.order)}"

    def _permuted(self, x: Tensor, order: Tensor) -> Tensor:
        if x.dim() < 2 or x.shape[1] != len(order):
            raise ValueError(
                f"ChannelPermutation of {len(order)} channels takes inputs (N, {len(order)}, ...): got {tuple(x.shape)}"
            )
        return x.index_select(1, order)


class _Resampling(_Rearrangement):
    """Base class of layers that change sizes by ``factor``."""

    def __init__(self, factor: int = 2):
        super().__init__()
        if not isinstance(factor, int) or factor < 1:
            raise ValueError(f"factor must be a positive integer, the ratio of the sizes: got {factor!r}")
        self.factor = factor

    def extra_repr(self) -> str:
        return f"factor={self.factor}"


class SpaceToDepth(_Resampling):
    """Turn (N, C, D1, ..., Dk) into (N, C * factor**k, D1 / factor, ..., Dk / factor): the "squeeze" of RealNVP.

    Channels have the order of ``nn.PixelUnshuffle``. Source: Dinh et al., arXiv:1605.08803.

    Args:
        factor: the ratio of the sizes, a positive integer.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return y. ``factor`` must divide every size D1, ..., Dk of x."""
        return space_to_depth(x, self.factor)

    def inverse(self, y: Tensor) -> Tensor:
        """Return x. ``factor**k`` must divide the number of channels of y."""
        return depth_to_space(y, self.factor)


class DepthToSpace(_Resampling):
    """Turn (N, C * factor**k, D1, ..., Dk) into (N, C, D1 * factor, ..., Dk * factor): inverts ``SpaceToDepth``."""

    def forward(self, x: Tensor) -> Tensor:
        """Return y. ``factor**k`` must divide the number of channels of x."""
        return depth_to_space(x, self.factor)

    def inverse(self, y: Tensor) -> Tensor:
        """Return x. ``factor`` must divide every size D1, ..., Dk of y."""
        return space_to_depth(y, self.factor)


def space_to_depth(x: Tensor, factor: int) -> Tensor:
    """Return y of ``SpaceToDepth`` for x (N, C, D1, ..., Dk)."""
    n, channels, *sizes = x.shape
    k = len(sizes)
    if not sizes or any(size % factor for size in sizes):
        raise ValueError(
            f"space to depth by {factor} takes (N, C, D1, ...) with D1, ... that {factor} divides: got "
            f"{tuple(x.shape)}; pad or crop it"
        )
    x = x.reshape(n, channels, *(part for size in sizes for part in (size // factor, factor)))
    x = x.permute(0, 1, *range(3, 3 + 2 * k, 2), *range(2, 2 + 2 * k, 2))
    return x.reshape(n, channels * factor**k, *(size // factor for size in sizes))


def depth_to_space(y: Tensor, factor: int) -> Tensor:
    """Return x of ``SpaceToDepth`` for y (N, C * factor**k, D1, ..., Dk)."""
    n, channels, *sizes = y.shape
    k = len(sizes)
    if not sizes or channels % factor**k:
        raise ValueError(
            f"depth to space by {factor} takes (N, C, D1, ...) with a C that {factor}**{k} divides: got "
            f"{tuple(y.shape)}"
        )
    y = y.reshape(n, channels // factor**k, *[factor] * k, *sizes)
    y = y.permute(0, 1, *(dim for i in range(k) for dim in (2 + k + i, 2 + i)))
    return y.reshape(n, channels // factor**k, *(size * factor for size in sizes))
