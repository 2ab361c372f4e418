"""The kernels for narrow convolutions, run by Triton's interpreter, against float64.

The variable must be set before Triton is imported, so ``test_narrow_conv.py`` runs this file in a process of its own.
By hand: ``TRITON_INTERPRET=1 pytest properties/kernels/interpreted_kernels.py``.
"""

from dataclasses import replace

import pytest
import torch

from memcnn.kernels import convolution_kernel, weight_gradient
from properties.support.narrow_conv import LIMITS, error, exact_convolution, exact_weight_gradient, images

SHAPES = [  # N, C_in, C_out, H, W
    (2, 16, 16, 8, 8),
    (1, 16, 16, 1, 1),
    (5, 16, 16, 7, 9),
    (3, 32, 16, 5, 3),
    (3, 16, 32, 1, 70),
    (2, 32, 32, 9, 6),
    (1, 64, 64, 2, 3),
]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_convolution_kernel_against_float64(shape, dtype, transposed):
    n, in_channels, out_channels, height, width = shape
    x = images(n, out_channels if transposed else in_channels, height, width, dtype=dtype)
    weight = images(out_channels, in_channels, 3, 3, dtype=dtype)
    plans = convolution_kernel.plans(x.shape[1])
    assert len(plans) >= 2
    for plan in plans if dtype == torch.float32 else plans[:1]:
        first, second = (convolution_kernel.convolve(x, weight, plan, transposed=transposed) for _ in range(2))
        assert (first.dtype, first.shape) == (dtype, (n, in_channels if transposed else out_channels, height, width))
        assert first.is_contiguous(memory_format=torch.channels_last)
        assert error(first, exact_convolution(x, weight, transposed=transposed)) <= LIMITS[dtype], plan
        assert torch.equal(first, second)


@pytest.mark.parametrize("transposed", [False, True])
def test_nan_reaches_the_neighbours_of_its_pixel_only(transposed):
    """Tiles are padded with products by zero, and zero times NaN is NaN."""
    x, weight = images(1, 16, 5, 6), images(16, 16, 3, 3)
    x[0, 0, 2, 2] = torch.nan
    expected = exact_convolution(x, weight, transposed=transposed).isnan()
    for plan in convolution_kernel.plans(16):
        result = convolution_kernel.convolve(x, weight, plan, transposed=transposed)
        assert torch.equal(result.isnan(), expected), plan


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weight_gradient_kernel_against_float64(shape, dtype):
    n, in_channels, out_channels, height, width = shape
    x, gradient = (images(n, c, height, width, dtype=dtype) for c in (in_channels, out_channels))
    plans = weight_gradient.plans(out_channels, in_channels)
    assert len(plans) >= 3
    for plan in plans if dtype == torch.float32 else plans[:1]:
        result = weight_gradient.weight_gradient(gradient, x, plan, processors=1)
        assert (result.dtype, result.shape) == (dtype, (out_channels, in_channels, 3, 3))
        assert result.is_contiguous(memory_format=torch.channels_last)
        assert error(result, exact_weight_gradient(gradient, x)) <= LIMITS[dtype], plan


@pytest.mark.parametrize("processors", [1, 132])
def test_every_split_of_the_pixels_gives_the_same_gradient(processors):
    """The number of programs changes only the rounding, although the last program has fewer pixels."""
    x, gradient = (images(5, 16, 7, 9, dtype=torch.float32) for _ in range(2))
    for pixels in (16, 64):
        plan = replace(weight_gradient.plans(16, 16)[0], pixels=pixels, occupancy=1)
        first, second = (weight_gradient.weight_gradient(gradient, x, plan, processors=processors) for _ in range(2))
        assert error(first, exact_weight_gradient(gradient, x)) <= LIMITS[torch.float32]
        assert torch.equal(first, second)
