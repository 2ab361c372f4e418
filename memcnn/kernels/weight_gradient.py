"""A Triton kernel for the weight gradient of narrow 3x3 convolutions, stride 1, padding 1, channels_last.

The gradient of ``weight[o, i, a, b]`` is the sum over all pixels (n, r, c) of the input of

    output_gradient[n, o, r + 1 - a, c] * input[n, i, r, c + b - 1]

where pixels outside of the map count as zero. That is one matrix product, summed over the pixels:

    [rows (a, o) x pixels] @ [pixels x columns (b, i)]

The left matrix is the output gradient, shifted by one image row for each ``a``. The right matrix is the input, shifted
by one pixel for each ``b``. Neither is stored: the kernel reads each tile of them at shifted addresses. The products
are long and thin (102,400 pixels for a result of 48 x 48), so the pixels are shared out among many programs. Each
program writes its sum in float32, and a second kernel adds the sums up in a fixed order. There are no atomic
operations, so the same plan gives the same bits each time.

The numbers of rows and columns of a tile are powers of two. A plan therefore chooses, for the kernel's rows
(``row_taps``) and for its columns (``column_taps``), between 4 and 1. With 4, a tile holds all three taps and is padded
to four: each value is read three times, and a quarter of the rows or columns is zero. With 1, a program computes one
tap: nothing is padded, but three times as many programs read the same values.

This file needs Triton. It uses only functions that both Triton 3.6 (PyTorch 2.11) and 3.7 have.

Estimate for one H100 (132 multiprocessors, 3.3 TB/s), batch 100, 32 x 32, 16 channels, bfloat16. This is arithmetic,
not a measurement; ``python -m bench.narrow_conv`` measures.

=====================  ==============================================================================================
bytes from memory      6.6 MB (input and output gradient, 3.3 MB each): 2 us; less where they are still in the L2 cache
operations             0.47 GFLOP, 0.84 with padding: 1 to 2 us at half of the tensor cores' rate
reads of shifted tiles 20 MB through the L1 caches: 1 us, or 4 us where each of them goes to the L2 cache
partial sums           400 programs (3 a multiprocessor) x 9.2 KB = 3.7 MB, written and read in the L2 cache: 1 to 2 us
latency                4 tiles of 64 pixels a program, one after the other: 2 to 4 us; two kernels: 2 us to start
=====================  ==============================================================================================

These overlap in part. The expected sum is 6 to 10 us; 9.3 us was measured on an H200 (memcnn/kernels/__init__.py).
There cuDNN takes 72 us with its default algorithm, and 35 us with the one that it chooses by timing. Compiled for an
H100 (``sm_90``), the first plan uses 63 registers a thread and 48 KiB of shared memory, so 4 programs fit on a
multiprocessor at once. All loads are 16 bytes wide, the products are ``wgmma``, and nothing is spilled.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

_MOST_SUMS = 16384  # float32 sums of a program, one register each: 64 for each thread of 8 warps, of at most 255
_LEAST_SUMS = 1024  # fewer leave most of a program's warps without work of their own
_TRIED = (
    (4, 4, 3, 4),
    (4, 4, 1, 4),
    (4, 4, 3, 2),
    (1, 4, 3, 2),
    (1, 1, 3, 4),
    (1, 1, 3, 2),
)  # row_taps, column_taps, stages, occupancy


@dataclass(frozen=True)
class Plan:
    """The division of the kernel's work.

    Args:
        row_taps: kernel rows a program computes: 4 (all three, padded) or 1.
        column_taps: kernel columns a program computes: 4 (all three, padded) or 1.
        pixels: number of pixels of a tile.
        warps: number of warps of a program.
        stages: number of tiles that are being loaded or multiplied at a time.
        occupancy: number of programs for each multiprocessor of the GPU.
    """

    row_taps: int
    column_taps: int
    pixels: int = 64
    warps: int = 4
    stages: int = 2
    occupancy: int = 4

    def __str__(self) -> str:
        """Return a short name, for tables."""
        taps = f"{min(self.row_taps, 3)}x{min(self.column_taps, 3)} taps"
        return f"{taps}, {self.pixels} pixels, {self.warps} warps, {self.stages} stages, x{self.occupancy}"

    @property
    def groups(self) -> tuple[int, int]:
        """Return the numbers of programs that share the kernel's rows and its columns, for the same pixels."""
        return (1 if self.row_taps == 4 else 3), (1 if self.column_taps == 4 else 3)

    def splits(self, pixels: int, processors: int) -> tuple[int, int]:
        """Return the number of programs that share the pixels, and the number of tiles that each of them adds up.

        Args:
            pixels: number of pixels of all images, at least 1.
            processors: number of multiprocessors of the GPU.
        """
        tiles = triton.cdiv(pixels, self.pixels)
        wanted = max(1, self.occupancy * processors // math.prod(self.groups))
        tiles_each = triton.cdiv(tiles, min(wanted, tiles))
        return triton.cdiv(tiles, tiles_each), tiles_each


def plans(out_channels: int, in_channels: int) -> tuple[Plan, ...]:
    """Return the three or four plans that are worth measuring for a convolution of these numbers of channels."""
    found = []
    for row_taps, column_taps, stages, occupancy in _TRIED:
        sums = row_taps * out_channels * column_taps * in_channels
        large = sums > _MOST_SUMS // 2
        if _LEAST_SUMS <= sums <= _MOST_SUMS and not (large and occupancy > 2):
            found.append(Plan(row_taps, column_taps, warps=8 if large else 4, stages=stages, occupancy=occupancy))
    return tuple(found)


def weight_gradient(
    output_gradient: Tensor, x: Tensor, plan: Plan, *, processors: int, dtype: torch.dtype | None = None
) -> Tensor:
    """Return the weight gradient of a 3x3 convolution with stride 1 and padding 1.

    Args:
        output_gradient: (N, C_out, H, W), dense in channels_last; C_out a power of two, at least 16.
        x: input of the convolution, (N, C_in, H, W), likewise and of the same dtype.
        plan: division of the work. It changes the result only by rounding.
        processors: number of multiprocessors of the GPU.
        dtype: dtype of the result; by default that of ``x``. Sums are float32, and rounded once.

    Returns:
        (C_out, C_in, 3, 3), channels_last.
    """
    n, out_channels, height, width = output_gradient.shape
    in_channels, pixels = x.shape[1], n * height * width
    result = torch.empty(
        (out_channels, in_channels, 3, 3), dtype=dtype or x.dtype, device=x.device, memory_format=torch.channels_last
    )
    interpreted = not isinstance(partial_sums, triton.JITFunction)
    splits, tiles = plan.splits(pixels, processors)
    partial = torch.empty((splits, result.numel()), dtype=torch.float32, device=x.device)
    programs = splits, *plan.groups
    partial_sums[programs](
        output_gradient,
        x,
        partial,
        pixels,
        TILES=tiles,
        HEIGHT=height,
        WIDTH=width,
        C_OUT=out_channels,
        C_IN=in_channels,
        ROW_TAPS=plan.row_taps,
        COLUMN_TAPS=plan.column_taps,
        PIXELS=plan.pixels,
        INTERPRETED=interpreted,
        num_warps=plan.warps,
        num_stages=plan.stages,
    )
    size = result.numel()
    sums, results = (256, 16) if size <= 4096 else (32, 128)  # a tile has 4,096 values; each thread adds up 32
    if interpreted:
        sums, results = 32, 1024  # the interpreter's time is proportional to the number of programs
    add_up[(triton.cdiv(size, results),)](
        partial, result, SPLITS=splits, SIZE=size, SUMS=sums, RESULTS=results, num_warps=4
    )
    return result


@triton.jit
def partial_sums(
    output_gradient,
    x,
    partial,
    pixels,
    TILES: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    C_OUT: tl.constexpr,
    C_IN: tl.constexpr,
    ROW_TAPS: tl.constexpr,
    COLUMN_TAPS: tl.constexpr,
    PIXELS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Add up ``TILES`` tiles of pixels and write this program's taps of (C_out, 3, 3, C_in) in float32."""
    split = tl.program_id(0)
    row = tl.arange(0, ROW_TAPS * C_OUT)
    column = tl.arange(0, COLUMN_TAPS * C_IN)
    a, o = tl.program_id(1) + row // C_OUT, row % C_OUT
    b, i = tl.program_id(2) + column // C_IN, column % C_IN
    sums = tl.zeros((ROW_TAPS * C_OUT, COLUMN_TAPS * C_IN), dtype=tl.float32)
    for tile in range(TILES):
        pixel = (split * TILES + tile) * PIXELS + tl.arange(0, PIXELS)
        r, c = pixel // WIDTH % HEIGHT, pixel % WIDTH

        gradient_row = r[:, None] + 1 - a[None, :]
        inside = (pixel < pixels)[:, None] & (a < 3)[None, :] & (gradient_row >= 0) & (gradient_row < HEIGHT)
        offset = (pixel[:, None] + (1 - a[None, :]) * WIDTH) * C_OUT + o[None, :]
        gradient = tl.load(output_gradient + offset, mask=inside, other=0.0)

        input_column = c[:, None] + b[None, :] - 1
        inside = (pixel < pixels)[:, None] & (b < 3)[None, :] & (input_column >= 0) & (input_column < WIDTH)
        offset = (pixel[:, None] + b[None, :] - 1) * C_IN + i[None, :]
        value = tl.load(x + offset, mask=inside, other=0.0)

        if INTERPRETED:  # Triton's interpreter multiplies the bits of bfloat16 as if they were integers
            gradient, value = gradient.to(tl.float32), value.to(tl.float32)
        sums = tl.dot(tl.trans(gradient), value, sums)
    offset = ((split * C_OUT + o[:, None]) * 9 + a[:, None] * 3 + b[None, :]) * C_IN + i[None, :]
    tl.store(partial + offset, sums, mask=(a < 3)[:, None] & (b < 3)[None, :])


@triton.jit
def add_up(partial, result, SPLITS: tl.constexpr, SIZE: tl.constexpr, SUMS: tl.constexpr, RESULTS: tl.constexpr):
    """Write ``result[e]``, the sum of ``partial[:, e]``, for the elements of this program."""
    element = tl.program_id(0) * RESULTS + tl.arange(0, RESULTS)
    sums = tl.zeros((SUMS, RESULTS), dtype=tl.float32)
    for first in range(0, SPLITS, SUMS):
        split = first + tl.arange(0, SUMS)
        inside = (split < SPLITS)[:, None] & (element < SIZE)[None, :]
        sums += tl.load(partial + split[:, None] * SIZE + element[None, :], mask=inside, other=0.0)
    tl.store(result + element, tl.sum(sums, axis=0).to(result.dtype.element_ty), mask=element < SIZE)
