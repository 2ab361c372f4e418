"""Two Triton kernels that reduce images to sums for each channel: BatchNorm's statistics and its gradient sums.

The images are (N, C, H, W), dense in channels_last. In memory they are a matrix of N * H * W rows and C columns, and
each result is a sum over the rows. Each function is one kernel launch, with about two programs for each multiprocessor.
A program adds up a part of the rows, for a block of at most 32 neighbouring channels. It reads tiles of ROWS x
CHANNELS. Each thread reads 16 bytes of a tile, and neighbouring threads read neighbouring addresses. Each place of the
tile has a float32 sum of its own, so the threads exchange no sums before the last tile.

*Pipelining.* The loop over the tiles has ``num_stages``: while a tile is added up, the next 4 or 5 are copied to
shared memory (``cp.async``). With plain loads, 8 in a row, ptxas moved each load close to its first use. Only 2 to 5
of the 8 were then in flight at a time.

*Variance.* The difference of two large sums would lose all digits of a channel of mean 1000 and deviation 0.1. Each
place of the tile therefore has a mean and a sum of squared differences from this mean, which are updated row by row
(Welford, 1962). The results of places and programs are merged by the formula of Chan, Golub and LeVeque (1979).

*The last program.* Each program stores its partial results and then adds 1 to the counter of its channel block. The
program that finds that all others have added theirs merges the results and sets the counter back to 0. NVIDIA's CUDA
sample ``threadFenceReduction`` and PyTorch's ``Reduce.cuh`` do the same. The barrier before the atomic addition, which
releases and acquires, makes the stores of all threads visible. Which program is the last one varies, but each of them
merges in the same order. The same division of the rows therefore gives the same bits each time.

*The counter must not be shared by launches that may run at the same time*, such as those on two streams or on two
branches of a CUDA graph. Their programs would add to one number, and a program would merge results that are not yet
stored. The kernels of one stream run one after the other, so they can share a counter.

This file needs Triton. It uses only functions that both Triton 3.6 (PyTorch 2.11) and 3.7 have. Triton compiles a
kernel once for each number of channels and of tiles of a program, which takes about a second.

Estimate for one H100 or H200 (132 multiprocessors). This is arithmetic; nothing is measured on a GPU yet. "Memory" is
the time of the images' bytes at 4 TB/s. "Merge" is what the last program of a block reads from the L2 cache. Add about
3 us to the time for memory: 1 to 2 us to start and to wait for the first bytes, and 1 to 2 us to merge.

=============================  =================  =======  =======  =====  =========  =============
images                         function           bytes    memory   merge  registers  shared memory
=============================  =================  =======  =======  =====  =========  =============
100 x 64 x 32 x 32, float32    batch_statistics   26.2 MB  6.6 us   33 KB  45         20 KiB
the same                       gradient_sums      52.4 MB  13.1 us  33 KB  64         32 KiB
the same, bfloat16 gradient    gradient_sums      39.3 MB  9.8 us   33 KB  87         48 KiB
100 x 16 x 32 x 32, bfloat16   batch_statistics   3.3 MB   0.8 us   33 KB  40         20 KiB
the same                       gradient_sums      6.6 MB   1.6 us   33 KB  76         32 KiB
=============================  =================  =======  =======  =====  =========  =============

The last two columns are of a thread and of a program, compiled for an H100 (``sm_90``) by Triton 3.6. A multiprocessor
has room for at least two programs. Nothing is spilled. All copies of images are 16 bytes wide if C is a multiple of 8
(float32: of 4). Other numbers of channels are correct but slower.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

COUNTERS = 32  # a counter of this many elements is enough for 1,024 channels
WARPS = 8  # of a program
STATISTICS_STAGES = 6  # tiles that are copied or added up at a time
GRADIENT_STAGES = 5
_LOAD_BYTES = 16  # of a thread: the widest load there is
_MOST_CHANNELS = 32  # of a block. The last program reads as many results as there are splits, for each channel.
_MOST_PROGRAMS = 256  # of all blocks. More would keep the last program of a block reading for longer.
_PROGRAMS = 2  # for each multiprocessor


@dataclass(frozen=True)
class Division:
    """The division of the work.

    Args:
        channels: number of channels of a block, a power of two.
        blocks: number of channel blocks.
        rows: number of rows of a tile.
        rows_each: number of rows of a program. The last one may have fewer.
        splits: number of programs that share the rows.
    """

    channels: int
    blocks: int
    rows: int
    rows_each: int
    splits: int

    @property
    def constants(self) -> dict[str, int]:
        """Return the kernels' constants. The last program loads the results of LOADED_SPLITS programs at once."""
        loaded = 32 * WARPS * _LOAD_BYTES // 4 // self.channels
        tiles, loads = triton.cdiv(self.rows_each, self.rows), triton.cdiv(self.splits, loaded)
        return dict(CHANNELS=self.channels, ROWS=self.rows, TILES=tiles, LOADED_SPLITS=loaded, LOADS=loads)


def divide(shape: torch.Size, itemsize: int, processors: int) -> Division:
    """Return the division of the work.

    Args:
        shape: (N, C, H, W) of the images.
        itemsize: bytes of a value; of the smaller one if the images have two dtypes.
        processors: number of multiprocessors of the GPU.
    """
    n, c, height, width = shape
    channels = triton.next_power_of_2(min(c, _MOST_CHANNELS))
    blocks = triton.cdiv(c, channels)
    rows = 32 * WARPS * _LOAD_BYTES // itemsize // channels
    programs = min(_PROGRAMS * processors, _MOST_PROGRAMS)
    rows_each = max(triton.cdiv(n * height * width, max(programs // blocks, 1)), rows)
    rows_each = triton.cdiv(rows_each, 16) * 16  # Triton compiles one kernel for all multiples of 16
    return Division(channels, blocks, rows, rows_each, triton.cdiv(n * height * width, rows_each))


def batch_statistics(
    x: Tensor,
    *,
    eps: float,
    momentum: float,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    count: Tensor | None,
    counter: Tensor,
    processors: int,
    copy: Tensor | None = None,
) -> Tensor:
    """Return the mean and ``1 / sqrt(variance + eps)`` of each channel, and update the running statistics in place.

    The variance is the biased one. The running statistics change as those of ``nn.BatchNorm2d`` do in training, with
    the unbiased variance. ``running_mean``, ``running_var`` and ``count`` may all be None: then there is no update.

    Args:
        x: images, (N, C, H, W), dense in channels_last; bfloat16, float16 or float32.
        eps: is added to the variance.
        momentum: weight of the new values in the running statistics.
        running_mean: (C,), float32.
        running_var: (C,), float32.
        count: number of updates, a scalar int64 tensor.
        counter: zeros, int32, one for each channel block (``COUNTERS`` are enough). It is 0 again after the launch.
            Launches that may run at the same time need different counters.
        processors: number of multiprocessors of the GPU.
        copy: (2, C), float32. If it is given, it receives the values of the result, too.

    Returns:
        (2, C), float32: the means, and the reciprocals of the standard deviations.

    Raises:
        ValueError: if there are running statistics but only one value for each channel, or if ``counter`` is short.
    """
    channels, rows = x.shape[1], x.numel() // x.shape[1]
    if running_mean is not None and rows == 1:
        raise ValueError(f"Expected more than 1 value per channel to update running statistics, got {tuple(x.shape)}")
    division = divide(x.shape, x.element_size(), processors)
    partial, result = _allocate(division, x, counter)
    statistics_kernel[division.splits, division.blocks](
        x,
        partial,
        counter,
        result,
        copy,
        running_mean,
        running_var,
        count,
        rows,
        division.rows_each,
        eps,
        momentum,
        rows / max(rows - 1, 1),
        C=channels,
        STAGES=STATISTICS_STAGES,
        COPY=copy is not None,
        UPDATE=running_mean is not None,
        **division.constants,
        num_warps=WARPS,
    )
    return result


def gradient_sums(
    output_gradient: Tensor,
    x: Tensor,
    statistics: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    relu: bool,
    counter: Tensor,
    processors: int,
) -> Tensor:
    """Return the sums over the rows that the gradients of BatchNorm, or of BatchNorm and ReLU, need.

    With ``xhat = (x - mean) / sqrt(variance + eps)`` they are the sums of ``g`` (the gradient of ``bias``) and of
    ``g * xhat`` (the gradient of ``weight``). Here ``g`` is the output gradient. With ``relu``, it counts as zero where
    ``xhat * weight + bias``, rounded to the dtype of ``output_gradient``, is zero or negative.

    Args:
        output_gradient: (N, C, H, W), dense in channels_last; bfloat16, float16 or float32.
        x: input of the layer, likewise; it may have another dtype.
        statistics: result of ``batch_statistics``, (2, C), float32.
        weight: (C,), float32.
        bias: (C,), float32.
        relu: whether a ReLU follows the layer.
        counter: as in ``batch_statistics``.
        processors: number of multiprocessors of the GPU.

    Returns:
        (2, C), float32: the sums of ``g``, and the sums of ``g * xhat``.

    Raises:
        ValueError: if ``counter`` is short.
    """
    division = divide(x.shape, min(x.element_size(), output_gradient.element_size()), processors)
    partial, result = _allocate(division, x, counter)
    gradient_kernel[division.splits, division.blocks](
        output_gradient,
        x,
        statistics,
        weight,
        bias,
        partial,
        counter,
        result,
        x.numel() // x.shape[1],
        division.rows_each,
        C=x.shape[1],
        STAGES=GRADIENT_STAGES,
        RELU=relu,
        **division.constants,
        num_warps=WARPS,
    )
    return result


def _allocate(division: Division, x: Tensor, counter: Tensor) -> tuple[Tensor, Tensor]:
    """Return memory for the partial results, (splits, 2, C), and for the result, (2, C)."""
    if counter.numel() < division.blocks:
        raise ValueError(f"counter has {counter.numel()} elements, expected at least {division.blocks}")
    partial = torch.empty((division.splits, 2, x.shape[1]), dtype=torch.float32, device=x.device)
    return partial, torch.empty((2, x.shape[1]), dtype=torch.float32, device=x.device)


@triton.jit
def _is_last(counter):
    """Count this program, whose results are stored, and return whether it is the last one of its channel block."""
    tl.debug_barrier()  # all threads have stored their results
    before = tl.atomic_add(counter, 1, sem="acq_rel")
    return before == tl.num_programs(0) - 1


@triton.jit
def statistics_kernel(
    x,
    partial,
    counter,
    result,
    copy,
    running_mean,
    running_var,
    count,
    rows,
    rows_each,
    eps,
    momentum,
    unbiased,
    C: tl.constexpr,
    CHANNELS: tl.constexpr,
    STAGES: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    LOADS: tl.constexpr,
    LOADED_SPLITS: tl.constexpr,
    COPY: tl.constexpr,
    UPDATE: tl.constexpr,
):
    """Write mean and reciprocal deviation of a channel block, (2, C), and update the running statistics."""
    split, block = tl.program_id(0), tl.program_id(1)
    channel = block * CHANNELS + tl.arange(0, CHANNELS)
    exists = channel < C
    start = split * rows_each
    size = tl.minimum(rows_each, rows - start)
    x += start.to(tl.int64) * C
    mean, squares = _program_statistics(x, channel, exists, size, C, CHANNELS, STAGES, TILES, ROWS)
    tl.store(partial + split * 2 * C + channel, mean, mask=exists)
    tl.store(partial + (split * 2 + 1) * C + channel, squares, mask=exists)

    if _is_last(counter + block):
        mean, variance = _merged_statistics(
            partial, channel, exists, rows, rows_each, C, CHANNELS, LOADS, LOADED_SPLITS
        )
        scale = tl.rsqrt(variance + eps)
        tl.store(result + channel, mean, mask=exists)
        tl.store(result + C + channel, scale, mask=exists)
        if COPY:
            tl.store(copy + channel, mean, mask=exists)
            tl.store(copy + C + channel, scale, mask=exists)
        if UPDATE:
            old = tl.load(running_mean + channel, mask=exists)
            tl.store(running_mean + channel, (1 - momentum) * old + momentum * mean, mask=exists)
            old = tl.load(running_var + channel, mask=exists)
            tl.store(running_var + channel, (1 - momentum) * old + momentum * (variance * unbiased), mask=exists)
            if block == 0:
                tl.store(count, tl.load(count) + 1)
        tl.store(counter + block, 0)


@triton.jit
def _program_statistics(
    x,
    channel,
    exists,
    size,
    C: tl.constexpr,
    CHANNELS: tl.constexpr,
    STAGES: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Return the means of ``size`` rows, and the sums of squared differences from them."""
    row = tl.arange(0, ROWS)[:, None]
    offset = row * C + channel[None, :]
    mean = tl.zeros((ROWS, CHANNELS), dtype=tl.float32)
    squares = tl.zeros((ROWS, CHANNELS), dtype=tl.float32)
    for tile in tl.range(TILES, num_stages=STAGES):
        first = tile * ROWS
        inside = first + row < size
        value = tl.load(x + first * C + offset, mask=inside & exists[None, :], other=0.0).to(tl.float32)
        change = tl.where(inside, value - mean, 0.0)
        mean += change * (1.0 / (tile + 1))
        squares += change * (value - mean)
    number = (tl.maximum(size + (ROWS - 1) - row, 0) // ROWS).to(tl.float32)  # of rows at each place
    program_mean = tl.sum(mean * number, axis=0) / size
    change = mean - program_mean[None, :]
    return program_mean, tl.sum(squares + change * change * number, axis=0)


@triton.jit
def _merged_statistics(
    partial,
    channel,
    exists,
    rows,
    rows_each,
    C: tl.constexpr,
    CHANNELS: tl.constexpr,
    LOADS: tl.constexpr,
    LOADED_SPLITS: tl.constexpr,
):
    """Return means and biased variances of all rows, from the results of all programs."""
    first_mean = tl.load(partial + channel, mask=exists, other=0.0, cache_modifier=".cg")
    changes = tl.zeros((LOADED_SPLITS, CHANNELS), dtype=tl.float32)
    squares = tl.zeros((LOADED_SPLITS, CHANNELS), dtype=tl.float32)
    for load in tl.static_range(LOADS):
        split = load * LOADED_SPLITS + tl.arange(0, LOADED_SPLITS)[:, None]
        is_split = split < tl.num_programs(0)
        size = tl.where(is_split, tl.minimum(rows_each, rows - split * rows_each), 0).to(tl.float32)
        inside = is_split & exists[None, :]
        address = partial + split * 2 * C + channel[None, :]
        change = tl.load(address, mask=inside, other=0.0, cache_modifier=".cg") - first_mean[None, :]
        changes += change * size
        squares += tl.load(address + C, mask=inside, other=0.0, cache_modifier=".cg") + change * change * size
    change = tl.sum(changes, axis=0) / rows
    variance = tl.sum(squares, axis=0) / rows - change * change
    variance = tl.where(variance < 0.0, 0.0, variance)  # a maximum would hide NaN
    return first_mean + change, variance


@triton.jit
def gradient_kernel(
    output_gradient,
    x,
    statistics,
    weight,
    bias,
    partial,
    counter,
    result,
    rows,
    rows_each,
    C: tl.constexpr,
    CHANNELS: tl.constexpr,
    STAGES: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    LOADS: tl.constexpr,
    LOADED_SPLITS: tl.constexpr,
    RELU: tl.constexpr,
):
    """Write the sums of ``g`` and of ``g * xhat`` of a channel block, (2, C)."""
    split, block = tl.program_id(0), tl.program_id(1)
    channel = block * CHANNELS + tl.arange(0, CHANNELS)
    exists = channel < C
    row = tl.arange(0, ROWS)[:, None]
    offset = row * C + channel[None, :]
    start = split * rows_each
    size = tl.minimum(rows_each, rows - start)
    x += start.to(tl.int64) * C
    output_gradient += start.to(tl.int64) * C

    mean = tl.load(statistics + channel, mask=exists, other=0.0)[None, :]
    scale = tl.load(statistics + C + channel, mask=exists, other=0.0)[None, :]
    factor = tl.load(weight + channel, mask=exists, other=0.0)[None, :]
    summand = tl.load(bias + channel, mask=exists, other=0.0)[None, :]
    sums = tl.zeros((ROWS, CHANNELS), dtype=tl.float32)
    products = tl.zeros((ROWS, CHANNELS), dtype=tl.float32)
    for tile in tl.range(TILES, num_stages=STAGES):
        first = tile * ROWS
        inside = (first + row < size) & exists[None, :]
        gradient = tl.load(output_gradient + first * C + offset, mask=inside, other=0.0)
        xhat = (tl.load(x + first * C + offset, mask=inside, other=0.0).to(tl.float32) - mean) * scale
        g = gradient.to(tl.float32)
        if RELU:
            z = (xhat * factor + summand).to(gradient.dtype).to(tl.float32)
            g = tl.where(z <= 0.0, 0.0, g)
        sums += g
        products += g * xhat
    tl.store(partial + split * 2 * C + channel, tl.sum(sums, axis=0), mask=exists)
    tl.store(partial + (split * 2 + 1) * C + channel, tl.sum(products, axis=0), mask=exists)

    if _is_last(counter + block):
        sums_of_all, products_of_all = _merged_sums(partial, channel, exists, C, CHANNELS, LOADS, LOADED_SPLITS)
        tl.store(result + channel, sums_of_all, mask=exists)
        tl.store(result + C + channel, products_of_all, mask=exists)
        tl.store(counter + block, 0)


@triton.jit
def _merged_sums(
    partial,
    channel,
    exists,
    C: tl.constexpr,
    CHANNELS: tl.constexpr,
    LOADS: tl.constexpr,
    LOADED_SPLITS: tl.constexpr,
):
    """Return both sums of the results of all programs."""
    sums = tl.zeros((LOADED_SPLITS, CHANNELS), dtype=tl.float32)
    products = tl.zeros((LOADED_SPLITS, CHANNELS), dtype=tl.float32)
    for load in tl.static_range(LOADS):
        split = load * LOADED_SPLITS + tl.arange(0, LOADED_SPLITS)[:, None]
        inside = (split < tl.num_programs(0)) & exists[None, :]
        address = partial + split * 2 * C + channel[None, :]
        sums += tl.load(address, mask=inside, other=0.0, cache_modifier=".cg")
        products += tl.load(address + C, mask=inside, other=0.0, cache_modifier=".cg")
    return tl.sum(sums, axis=0), tl.sum(products, axis=0)
