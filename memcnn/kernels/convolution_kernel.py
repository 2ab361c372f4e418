"""A Triton kernel for narrow 3x3 convolutions, stride 1, padding 1, channels_last: forward pass and input gradient.

The output of ``weight`` for images x is

    output[n, o, r, c] = sum over a, b, i of x[n, i, r + a - 1, c + b - 1] * weight[o, i, a, b]

where pixels outside of the image count as zero. The gradient of x is the same sum over the output gradient, with the
taps of the weight in reverse and its first two axes exchanged: weight[i, o, 2 - a, 2 - b]. One kernel computes both.

Each program computes all channels of a few neighbouring pixels, as a sum of matrix products, one for each tap:

    [pixels x channels i], shifted by the tap, @ [channels i x channels o]

The shifted matrices are not stored: the kernel reads each at its address. The number of columns of a tile is a power of
two. A plan therefore chooses between the three taps of a kernel row in one tile, padded to four (``taps=4``: a quarter
of the tile is zero), and one tap in a tile (``taps=1``: nothing is padded, but there are three times as many products).
Nothing is divided among programs, so all plans add in nearly the same order, and each gives the same bits each time.

This file needs Triton. It uses only functions that both Triton 3.6 (PyTorch 2.11) and 3.7 have.

Estimate for one H100 (132 multiprocessors, 3.3 TB/s), batch 100, 32 x 32, 16 channels, bfloat16. This is arithmetic,
not a measurement; ``python -m bench.narrow_conv`` measures.

=====================  ==============================================================================================
bytes from memory      6.6 MB (input and output, 3.3 MB each): 2 us; less where they are still in the L2 cache
operations             0.47 GFLOP, 0.63 with padding: 1 to 2 us at half of the tensor cores' rate
reads of shifted tiles 30 MB through the L1 caches: 2 us, or 6 us where each of them goes to the L2 cache
latency                800 programs, 6 or 7 a multiprocessor, 3 or 9 products each, one after the other: 2 to 4 us
=====================  ==============================================================================================

These overlap in part. The expected sum is 5 to 9 us, against 19 us (forward) and 21 us (input gradient) that cuDNN was
measured to take on an H200 with its default algorithms.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

_MOST_VALUES = 8192  # of a tile: with larger ones, a multiprocessor has room for only one program
_TRIED = ((4, 128, 4, 3), (4, 64, 4, 3), (1, 128, 4, 4), (1, 64, 4, 4))  # taps, pixels, warps, stages


@dataclass(frozen=True)
class Plan:
    """The division of the kernel's work.

    Args:
        taps: kernel columns in one tile: 4 (all three, padded) or 1.
        pixels: number of pixels of a program.
        warps: number of warps of a program.
        stages: number of tiles that are being loaded or multiplied at a time.
    """

    taps: int
    pixels: int = 128
    warps: int = 4
    stages: int = 3

    def __str__(self) -> str:
        """Return a short name, for tables."""
        return f"{min(self.taps, 3)} taps, {self.pixels} pixels, {self.warps} warps, {self.stages} stages"


def plans(in_channels: int) -> tuple[Plan, ...]:
    """Return the two to four plans that are worth measuring for images of this number of channels."""
    found = (Plan(*values) for values in _TRIED)
    return tuple(plan for plan in found if plan.taps * plan.pixels * in_channels <= _MOST_VALUES)


def convolve(images: Tensor, weight: Tensor, plan: Plan, *, transposed: bool) -> Tensor:
    """Return a 3x3 convolution with stride 1 and padding 1, or the gradient of its input.

    Args:
        images: the input (N, C_in, H, W), or with ``transposed`` the output gradient (N, C_out, H, W); dense in
            channels_last. Numbers of channels are powers of two, at least 16.
        weight: (C_out, C_in, 3, 3), likewise and of the same dtype.
        plan: division of the work. It changes the result only by rounding.
        transposed: compute the gradient of the input.

    Returns:
        The output (N, C_out, H, W), or the gradient of the input (N, C_in, H, W); channels_last, of the same dtype.
        Sums are float32, and rounded once.
    """
    n, channels, height, width = images.shape
    out_channels = weight.shape[1 if transposed else 0]
    shape, pixels = (n, out_channels, height, width), n * height * width
    result = torch.empty(shape, dtype=images.dtype, device=images.device, memory_format=torch.channels_last)
    convolution_kernel[(triton.cdiv(pixels, plan.pixels),)](
        images,
        weight,
        result,
        pixels,
        HEIGHT=height,
        WIDTH=width,
        C_IN=channels,
        C_OUT=out_channels,
        TAPS=plan.taps,
        PIXELS=plan.pixels,
        TRANSPOSED=transposed,
        INTERPRETED=not isinstance(convolution_kernel, triton.JITFunction),
        num_warps=plan.warps,
        num_stages=plan.stages,
    )
    return result


@triton.jit
def convolution_kernel(
    images,
    weight,
    result,
    pixels,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    TAPS: tl.constexpr,
    PIXELS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Write all channels of ``PIXELS`` pixels. Here C_IN and C_OUT are the channels of ``images`` and ``result``."""
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    r, c = pixel // WIDTH % HEIGHT, pixel % WIDTH
    column = tl.arange(0, TAPS * C_IN)
    i, o = column % C_IN, tl.arange(0, C_OUT)
    tiles: tl.constexpr = 1 if TAPS == 4 else 3  # of a kernel row
    sums = tl.zeros((PIXELS, C_OUT), dtype=tl.float32)
    for tile in range(3 * tiles):
        a, b = tile // tiles, tile % tiles + column // C_IN
        image_row, image_column = r + a - 1, c[:, None] + b[None, :] - 1
        inside = ((pixel < pixels) & (image_row >= 0) & (image_row < HEIGHT))[:, None] & (b < 3)[None, :]
        inside = inside & (image_column >= 0) & (image_column < WIDTH)
        offset = (pixel[:, None] + (a - 1) * WIDTH + b[None, :] - 1) * C_IN + i[None, :]
        value = tl.load(images + offset, mask=inside, other=0.0)
        if TRANSPOSED:
            offset = ((i[:, None] * 3 + 2 - a) * 3 + 2 - b[:, None]) * C_OUT + o[None, :]
        else:
            offset = ((o[None, :] * 3 + a) * 3 + b[:, None]) * C_IN + i[:, None]
        factor = tl.load(weight + offset, mask=(b < 3)[:, None], other=0.0)
        if INTERPRETED:  # Triton's interpreter multiplies the bits of bfloat16 as if they were integers
            value, factor = value.to(tl.float32), factor.to(tl.float32)
        sums = tl.dot(value, factor, sums)
    offset = pixel[:, None] * C_OUT + o[None, :]
    tl.store(result + offset, sums.to(result.dtype.element_ty), mask=(pixel < pixels)[:, None])
