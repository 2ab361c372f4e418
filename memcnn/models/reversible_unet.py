"""U-Nets whose stages are reversible, for images (two spatial dimensions) and volumes (three).

* ``ReversibleUNet``: Brügger, Baumgartner, Konukoglu, "A Partially Reversible U-Net for Memory-Efficient Volumetric
  Image Segmentation", arXiv:1906.06148, section 2. Each stage of encoder and decoder is a chain of reversible blocks,
  which stores only its output; the changes of resolution between them are ordinary layers.
* ``InvertibleUNet``: Etmann, Ke, Schönlieb, "iUNets: Fully invertible U-Nets with Learnable Up- and Downsampling",
  arXiv:2005.05220, section 3. Half of the channels skip the lower resolutions, the others are down-sampled by a
  bijection. The paper learns an orthogonal one; here it is ``SpaceToDepth``, then a learned ``InvertibleConv1x1`` of
  the channels, which starts as an orthogonal matrix.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from memcnn.models.additive import AdditiveCoupling
from memcnn.models.flows import InvertibleConv1x1
from memcnn.models.rearrange import DepthToSpace, SpaceToDepth
from memcnn.models.revop import ReversibleSequential
from memcnn.models.streams import check_shape, in_full_precision, reversible_chain

__all__ = ["InvertibleUNet", "ReversibleUNet"]

_CONVOLUTIONS = {2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


class ReversibleUNet(nn.Module):
    """Stem, reversible stages at falling and then rising resolution with sums as skip connections, 1x1 convolution.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output, such as the number of classes.
        widths: channels of each resolution, multiples of 4. Sizes halve between them.
        blocks: number of couplings in each of the ``2 * len(widths) - 1`` stages.
        dims: 2 for images, 3 for volumes.
        disable: keep the weights, but store every activation.

    Raises:
        ValueError: ``dims`` is neither 2 nor 3, or a width is not a multiple of 4.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        widths: Sequence[int] = (16, 32, 64),
        blocks: int = 2,
        *,
        dims: int = 2,
        disable: bool = False,
    ):
        super().__init__()
        _check(dims, widths)
        conv, transposed = _CONVOLUTIONS[dims], _TRANSPOSED[dims]
        self.factor = 2 ** (len(widths) - 1)
        self.stem = conv(in_channels, widths[0], 3, padding=1)
        self.encoder = nn.ModuleList(_stage(width, blocks, dims, disable) for width in widths)
        pairs = list(pairwise(widths))
        self.down = nn.ModuleList(conv(fine, coarse, 2, stride=2) for fine, coarse in pairs)
        self.up = nn.ModuleList(transposed(coarse, fine, 2, stride=2) for fine, coarse in pairs)
        self.decoder = nn.ModuleList(_stage(width, blocks, dims, disable) for width in widths[:-1])
        self.head = conv(widths[0], out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, out_channels, D1, ...) for x (N, in_channels, D1, ...).

        Raises:
            ValueError: x has other channels or dimensions, or a size is not a multiple of ``2**(len(widths) - 1)``.
        """
        check_shape(x, ("N", self.stem.in_channels, *("D1", "D2", "D3")[: len(self.stem.kernel_size)]))
        if any(size % self.factor for size in x.shape[2:]):
            raise ValueError(f"every size must be a multiple of {self.factor}: got {tuple(x.shape)}; pad or crop it")
        x, skips = self.stem(x), []
        for i, stage in enumerate(self.encoder):
            x = stage(in_full_precision(x))
            if i < len(self.down):
                skips.append(x)
                x = self.down[i](x)
        for up, stage in zip(reversed(self.up), reversed(self.decoder), strict=True):
            x = stage(in_full_precision(up(x)) + skips.pop())
        return self.head(x)


class InvertibleUNet(nn.Module):
    """A bijection of (N, channels, D1, ...) to the same shape.

    Args:
        channels: a multiple of 4. At each lower resolution there are ``2**(dims - 1)`` times as many.
        scales: number of resolutions.
        blocks: number of couplings in each of the ``2 * scales - 1`` stages.
        dims: 2 for images, 3 for volumes.
        disable: keep the weights, but store every activation.

    Raises:
        ValueError: ``dims`` is neither 2 nor 3, or ``channels`` is not a multiple of 4.
    """

    def __init__(self, channels: int, scales: int = 3, blocks: int = 2, *, dims: int = 2, disable: bool = False):
        super().__init__()
        _check(dims, [channels])
        self.channels, self.dims = channels, dims
        self.left = _stage(channels, blocks, dims, disable)
        self.inner: InvertibleUNet | None = None
        if scales > 1:
            below = channels // 2 * 2**dims
            self.inner = InvertibleUNet(below, scales - 1, blocks, dims=dims, disable=disable)
            self.down = reversible_chain([SpaceToDepth(), InvertibleConv1x1(below)], disable)
            self.up = reversible_chain([InvertibleConv1x1(below), DepthToSpace()], disable)
            self.right = _stage(channels, blocks, dims, disable)

    def forward(self, x: Tensor) -> Tensor:
        """Return y, of the shape of x (N, channels, D1, ...); ``2**(scales - 1)`` must divide D1, ...

        Raises:
            ValueError: x has other channels or dimensions, or sizes that do not divide.
        """
        check_shape(x, ("N", self.channels, *("D1", "D2", "D3")[: self.dims]))
        x = self.left(x)
        if self.inner is None:
            return x
        skipped, x = x.chunk(2, 1)
        return self.right(torch.cat((skipped, self.up(self.inner(self.down(x)))), 1))

    def inverse(self, y: Tensor) -> Tensor:
        """Return x, of the shape of y, with ``self(x) = y``."""
        if self.inner is not None:
            skipped, y = self.right.inverse(y).chunk(2, 1)
            y = torch.cat((skipped, self.down.inverse(self.inner.inverse(self.up.inverse(y)))), 1)
        return self.left.inverse(y)


def _check(dims: int, widths: Sequence[int]) -> None:
    if dims not in _CONVOLUTIONS:
        raise ValueError(f"dims must be 2, for images, or 3, for volumes: got {dims!r}")
    if not widths or any(width < 4 or width % 4 for width in widths):
        raise ValueError(f"channels must be multiples of 4, so that halves are even for GroupNorm: got {list(widths)}")


def _stage(width: int, blocks: int, dims: int, disable: bool) -> ReversibleSequential:
    halves = width // 2
    couplings = (AdditiveCoupling(_branch(halves, dims), _branch(halves, dims)) for _ in range(blocks))
    return reversible_chain(couplings, disable)


def _branch(channels: int, dims: int) -> nn.Module:
    """Return GroupNorm, LeakyReLU, convolution of width 3 that keeps the channels."""
    return nn.Sequential(
        nn.GroupNorm(math.gcd(channels // 2, 8), channels),
        nn.LeakyReLU(),
        _CONVOLUTIONS[dims](channels, channels, 3, padding=1),
    )
