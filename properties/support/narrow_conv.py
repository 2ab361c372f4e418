"""Inputs, exact results and a timer for tests of narrow convolutions on a CPU, under Triton's interpreter."""

import torch
import torch.nn.functional as F
from torch import Tensor

LIMITS = {torch.float32: 1e-6, torch.bfloat16: 2**-7}  # largest error, to the largest value


def images(n: int, channels: int, height: int, width: int, *, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return images in channels_last between two images of NaN in memory, which a read out of bounds would spread."""
    padded = torch.full((n + 2, channels, height, width), torch.nan, dtype=dtype)
    padded = padded.contiguous(memory_format=torch.channels_last)
    padded[1:-1] = torch.randn(n, channels, height, width)
    return padded[1:-1]


def exact_weight_gradient(output_gradient: Tensor, x: Tensor) -> Tensor:
    """Return the weight gradient in float64, by autograd."""
    weight = torch.zeros(output_gradient.shape[1], x.shape[1], 3, 3, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(F.conv2d(x.double(), weight, padding=1), weight, output_gradient.double())
    return gradient


def exact_convolution(images: Tensor, weight: Tensor, *, transposed: bool) -> Tensor:
    """Return the convolution in float64, or the gradient of its input."""
    function = F.conv_transpose2d if transposed else F.conv2d
    return function(images.double(), weight.double(), padding=1)


def error(result: Tensor, expected: Tensor) -> float:
    """Return the largest difference as a share of the largest expected value."""
    return ((result.detach().double() - expected.detach()).abs().max() / expected.detach().abs().max()).item()


def kernel_wins(runs: dict) -> dict[str, float]:
    """Stand in for a timer: each plan is faster than the library, and the last plan is the fastest."""
    return {name: float(len(runs) - index) for index, name in enumerate(runs)}


def conv2d(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x, weight, padding=1)
