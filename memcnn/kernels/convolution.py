"""3x3 convolutions of few channels, computed by kernels of our own where they were measured to be faster.

In a profile of ResNet-32 on an H200 (16 channels, 100 images of 32 x 32, bfloat16), cuDNN with its default algorithms
took 19 us for the forward pass of such a convolution, 21 us for the gradient of its input, and 72 us for its weight
gradient. The bytes alone need about 2 us. Each of the three has a kernel of ours, which ``memcnn.kernels.choice`` uses
only where it pays.

Two opaque operators, ``memcnn::conv3x3`` and ``memcnn::conv3x3_weight_gradient``, choose between cuDNN and our kernels
when they run, not when they are compiled.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight
from torch.utils.flop_counter import register_flop_formula

from memcnn.autocast import autocast_dtype
from memcnn.engine.torch_private import is_transformed
from memcnn.kernels import choice
from memcnn.kernels.devices import KERNEL_DEVICES, MOST_ELEMENTS, innermost
from memcnn.kernels.operations import INPUT_GRADIENT, OUTPUT, WEIGHT_GRADIENT, planned_weight_gradient

CHANNELS = (16, 32, 64)
DTYPES = (torch.bfloat16, torch.float16)  # tensor cores would round float32 to TF32
_TYPES = {Tensor, nn.Parameter}


def narrow_conv2d(x: Tensor, weight: Tensor) -> Tensor:
    """Return ``F.conv2d(x, weight, padding=1)``, computed by our kernels where they are faster.

    Our kernels support plain CUDA tensors in bfloat16 or float16 (under autocast: after its cast), with ``x`` in
    channels_last, and 16, 32 or 64 channels in and out. They need Triton. The output and both gradients can then differ
    from those of ``F.conv2d`` by rounding, and NaN and infinite values can reach more of their entries. Second
    derivatives are supported. For all other tensors, and within ``torch.func`` transforms, forward-mode differentiation
    and ``torch.export``, this function is ``F.conv2d`` itself, with the same bits.

    Args:
        x: images, (N, C_in, H, W).
        weight: (C_out, C_in, 3, 3).

    Returns:
        (N, C_out, H, W).
    """
    if not {type(x), type(weight)} <= _TYPES:  # first: torch.fx cannot trace the conditions below
        return F.conv2d(x, weight, padding=1)
    autocast = autocast_dtype(x.device.type)
    dtype = _dtype_under(autocast, x)
    if dtype != _dtype_under(autocast, weight) or not _is_supported(x, weight, dtype):
        return F.conv2d(x, weight, padding=1)  # which raises if the dtypes differ
    return _NarrowConv.apply(x.to(dtype), None if weight.dtype == dtype else weight.to(dtype), weight)


def _dtype_under(autocast: torch.dtype | None, tensor: Tensor) -> torch.dtype:
    """Return the dtype of a tensor after autocast has cast it for a convolution."""
    if autocast is None or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor.dtype
    return autocast


class NarrowConv2d(nn.Conv2d):
    """A convolution without bias, kernel 3x3, stride 1 and padding 1, computed by ``narrow_conv2d``."""

    stands_for = nn.Conv2d  # read by memcnn.engine.survey

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution of images (N, C_in, H, W), or (C_in, H, W)."""
        return narrow_conv2d(x, self.weight) if _is_narrow(self) else super().forward(x)


def use_narrow_convolutions(model: nn.Module, *, enabled: bool = True) -> list[str]:
    """Let ``narrow_conv2d`` compute the narrow 3x3 convolutions of ``model``.

    The modules change their class, in place, and nothing else: parameters, hooks, state-dict keys, ``deepcopy`` and
    pickle work as before. Call it before the model is compiled, captured, or wrapped by ``fully_shard``. The first
    forward and backward pass of each new shape compile and time a few kernels, which takes seconds.

    Args:
        model: the model, changed in place. Subclasses of ``nn.Conv2d``, and modules with a bias or with other kernel
            sizes, strides or numbers of channels, stay as they are.
        enabled: with ``False``, change back, apart from modules that were parametrized since.

    Returns:
        The names of the modules that were changed.
    """
    old, new = (nn.Conv2d, NarrowConv2d) if enabled else (NarrowConv2d, nn.Conv2d)
    changed = []
    for name, module in model.named_modules():
        if type(module) is old and (_is_narrow(module) or not enabled):
            module.__class__ = new
            changed.append(name)
    return changed


@torch.library.custom_op("memcnn::conv3x3", mutates_args=())
def conv3x3(images: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    """Return a 3x3 convolution with stride 1 and padding 1, or the gradient of its input; channels_last.

    Args:
        images: the input (N, C_in, H, W), or with ``transposed`` the output's gradient (N, C_out, H, W); any strides.
        weight: (C_out, C_in, 3, 3), of any strides.
        transposed: compute the gradient of the input.
    """
    images, weight = innermost(images), innermost(weight)
    operation = INPUT_GRADIENT if transposed else OUTPUT
    plan = choice.current().plan(operation, images, weight)
    return operation.library(images, weight) if plan is None else operation.planned(images, weight, plan)


@conv3x3.register_fake
def _(images: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    shape = (images.shape[0], weight.shape[1 if transposed else 0], *images.shape[2:])
    return torch.empty(shape, dtype=images.dtype, device=images.device, memory_format=torch.channels_last)


@torch.library.custom_op("memcnn::conv3x3_weight_gradient", mutates_args=())
def conv3x3_weight_gradient(output_gradient: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weight gradient, (C_out, C_in, 3, 3), of a 3x3 convolution with stride 1 and padding 1; channels_last.

    Args:
        output_gradient: (N, C_out, H, W), of any strides.
        x: the convolution's input, (N, C_in, H, W), of any strides.
        dtype: dtype of the result. Our kernel rounds its float32 sums to it.
    """
    output_gradient, x = innermost(output_gradient), innermost(x)
    plan = choice.current().plan(WEIGHT_GRADIENT, output_gradient, x)
    if plan is None:
        return WEIGHT_GRADIENT.library(output_gradient, x).to(dtype)
    return planned_weight_gradient(output_gradient, x, plan, dtype)


@conv3x3_weight_gradient.register_fake
def _(output_gradient: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    shape = (output_gradient.shape[1], x.shape[1], 3, 3)
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)


def _save_tensors(ctx: Any, inputs: tuple[Tensor, Tensor, Any], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.option = inputs[2]


def _gradients_of_conv3x3(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    """Return the gradients of ``conv3x3``. It is linear in each input, so both are convolutions."""
    images, weight = ctx.saved_tensors
    transposed = ctx.option
    of_images = _convolution(gradient, weight, transposed=not transposed) if ctx.needs_input_grad[0] else None
    of_weight = None
    if ctx.needs_input_grad[1]:
        output_gradient, x = (images, gradient) if transposed else (gradient, images)
        of_weight = _weight_gradient(output_gradient, x, weight.dtype)
    return of_images, of_weight, None


def _gradients_of_weight_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    """Return the gradients of ``conv3x3_weight_gradient``. It is linear in each input, so both are convolutions."""
    output_gradient, x = ctx.saved_tensors
    weight = gradient.to(x.dtype)
    of_output_gradient = _convolution(x, weight, transposed=False) if ctx.needs_input_grad[0] else None
    of_input = _convolution(output_gradient, weight, transposed=True) if ctx.needs_input_grad[1] else None
    return of_output_gradient, of_input, None


def _convolution(images: Tensor, weight: Tensor, *, transposed: bool) -> Tensor:
    """``conv3x3``. Within transforms by PyTorch, which would drop forward-mode derivatives of an opaque operator."""
    if is_transformed():
        return (F.conv_transpose2d if transposed else F.conv2d)(images, weight, padding=1)
    return conv3x3(images, weight, transposed)


def _weight_gradient(output_gradient: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """``conv3x3_weight_gradient``; within transforms by PyTorch."""
    if is_transformed():
        shape = output_gradient.shape[1], x.shape[1], 3, 3
        return conv2d_weight(x, shape, output_gradient, padding=1).to(dtype)
    return conv3x3_weight_gradient(output_gradient, x, dtype)


conv3x3.register_autograd(_gradients_of_conv3x3, setup_context=_save_tensors)
conv3x3_weight_gradient.register_autograd(_gradients_of_weight_gradient, setup_context=_save_tensors)


@register_flop_formula(torch.ops.memcnn.conv3x3)
def _flops(images: torch.Size, weight: torch.Size, transposed: bool, **_: Any) -> int:
    """Return twice the number of products, as PyTorch's formula for convolutions does."""
    return 2 * images.numel() // images[1] * weight.numel()


@register_flop_formula(torch.ops.memcnn.conv3x3_weight_gradient)
def _flops_of_weight_gradient(output_gradient: torch.Size, x: torch.Size, dtype: torch.dtype, **_: Any) -> int:
    return 2 * output_gradient.numel() * x[1] * 9


class _NarrowConv(torch.autograd.Function):
    """The convolution of x and weight.

    ``rounded`` is the weight in the dtype of x; None if it has this dtype itself. The function saves the same tensors
    as PyTorch's convolution, in that order: a reversible block can forget them. The gradient goes to ``weight`` at
    once, in its dtype, so our kernel rounds it once. Second derivatives also go through ``rounded``.
    """

    @staticmethod
    def forward(x: Tensor, rounded: Tensor | None, weight: Tensor) -> Tensor:
        return conv3x3(x, weight if rounded is None else rounded, False)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor | None, Tensor], output: Tensor) -> None:
        x, rounded, weight = inputs
        ctx.save_for_backward(x, weight if rounded is None else rounded)
        ctx.dtype = weight.dtype

    @staticmethod
    def backward(ctx: Any, output_gradient: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_input = _convolution(output_gradient, weight, transposed=True) if ctx.needs_input_grad[0] else None
        of_weight = _weight_gradient(output_gradient, x, ctx.dtype) if ctx.needs_input_grad[2] else None
        return of_input, None, of_weight


def _is_supported(x: Tensor, weight: Tensor, dtype: torch.dtype) -> bool:
    """Return whether our kernels support the convolution of these tensors in ``dtype``."""
    return (
        x.device.type in KERNEL_DEVICES
        and not is_transformed()
        and x.device == weight.device
        and dtype in DTYPES
        and x.dim() == weight.dim() == 4
        and weight.shape[2:] == (3, 3)
        and weight.shape[0] in CHANNELS
        and weight.shape[1] in CHANNELS
        and x.shape[1] == weight.shape[1]
        and 0 < x.numel() <= MOST_ELEMENTS
        and x.numel() // x.shape[1] * weight.shape[0] <= MOST_ELEMENTS
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def _is_narrow(module: nn.Conv2d) -> bool:
    """Return whether the module is a 3x3 convolution that our kernels can compute."""
    return (
        module.kernel_size == (3, 3)
        and module.stride == module.dilation == (1, 1)
        and module.padding in ((1, 1), "same")
        and module.padding_mode == "zeros"
        and module.groups == 1
        and module.bias is None
        and module.in_channels in CHANNELS
        and module.out_channels in CHANNELS
    )
