"""The three convolutions of a training step. PyTorch (on a GPU: cuDNN) or our kernels compute them.

All are 3x3 convolutions with stride 1 and padding 1. Tensors are dense in channels_last. With x of shape (N, C_in, H,
W), weight (C_out, C_in, 3, 3) and the output's gradient (N, C_out, H, W):

* ``OUTPUT`` computes the output from x and weight;
* ``INPUT_GRADIENT`` computes the gradient of x from the output's gradient and weight;
* ``WEIGHT_GRADIENT`` computes the gradient of weight from the output's gradient and x.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from memcnn.kernels.choice import Operation
from memcnn.kernels.devices import innermost, processors

if TYPE_CHECKING:
    from memcnn.kernels import convolution_kernel, weight_gradient

_ARGUMENTS = [1, 1], [1, 1], [1, 1], False, [0, 0], 1  # stride, padding, dilation, transposed, output_padding, groups


def _library_output(x: Tensor, weight: Tensor) -> Tensor:
    return innermost(torch.ops.aten.convolution(x, weight, None, *_ARGUMENTS))


def _library_input_gradient(output_gradient: Tensor, weight: Tensor) -> Tensor:
    n, _, height, width = output_gradient.shape
    x = _empty(output_gradient, n, weight.shape[1], height, width)  # only its shape and strides count
    mask = [True, False, False]
    return innermost(torch.ops.aten.convolution_backward(output_gradient, x, weight, None, *_ARGUMENTS, mask)[0])


def _library_weight_gradient(output_gradient: Tensor, x: Tensor) -> Tensor:
    weight = _empty(x, output_gradient.shape[1], x.shape[1], 3, 3)  # only its shape and strides count
    mask = [False, True, False]
    return innermost(torch.ops.aten.convolution_backward(output_gradient, x, weight, None, *_ARGUMENTS, mask)[1])


def _planned_convolution(
    images: Tensor, weight: Tensor, plan: "convolution_kernel.Plan", *, transposed: bool
) -> Tensor:
    from memcnn.kernels.convolution_kernel import convolve

    with _on_device(images):
        return convolve(images, weight, plan, transposed=transposed)


def planned_weight_gradient(
    output_gradient: Tensor, x: Tensor, plan: "weight_gradient.Plan", dtype: torch.dtype | None = None
) -> Tensor:
    """Return the weight gradient in ``dtype``, computed by our kernel; see ``memcnn.kernels.weight_gradient``."""
    from memcnn.kernels.weight_gradient import weight_gradient

    with _on_device(x):
        return weight_gradient(output_gradient, x, plan, processors=processors(x), dtype=dtype)


def _convolution_plans(images: torch.Size, weight: torch.Size) -> "tuple[convolution_kernel.Plan, ...]":
    from memcnn.kernels import convolution_kernel

    return convolution_kernel.plans(images[1])


def _weight_gradient_plans(output_gradient: torch.Size, x: torch.Size) -> "tuple[weight_gradient.Plan, ...]":
    from memcnn.kernels import weight_gradient

    return weight_gradient.plans(output_gradient[1], x[1])


OUTPUT = Operation("output", _library_output, partial(_planned_convolution, transposed=False), _convolution_plans)
INPUT_GRADIENT = Operation(
    "input gradient", _library_input_gradient, partial(_planned_convolution, transposed=True), _convolution_plans
)
WEIGHT_GRADIENT = Operation(
    "weight gradient", _library_weight_gradient, planned_weight_gradient, _weight_gradient_plans
)
OPERATIONS = OUTPUT, INPUT_GRADIENT, WEIGHT_GRADIENT


def _empty(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _on_device(x: Tensor) -> AbstractContextManager:
    """Make the device of x the current one: Triton launches kernels there."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
