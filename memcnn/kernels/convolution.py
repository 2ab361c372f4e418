"""3x3 convolutions of few channels: PyTorch's forward pass and data gradient, with a weight gradient of our own.

In a profile of ResNet-32 on an H200 (16 channels, 100 images of 32 x 32, bfloat16), cuDNN took 19 us for the forward
pass of such a convolution, 21 us for its data gradient, and 72 us for its weight gradient. Only the last one is
replaced, and only where ``memcnn.kernels.choice`` measured that this pays.

Forward pass and data gradient stay PyTorch operations, so ``torch.compile`` sees and optimises them as usual. The
weight gradient is one opaque operator, ``memcnn::conv3x3_weight_gradient``. It chooses its kernel when it runs, not
when it is compiled.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memcnn.autocast import autocast_dtype
from memcnn.kernels import choice
from memcnn.kernels.devices import KERNEL_DEVICES, MOST_ELEMENTS

CHANNELS = (16, 32, 64)
DTYPES = (torch.bfloat16, torch.float16)  # tensor cores would round float32 to TF32
_ARGUMENTS = [1, 1], [1, 1], [1, 1], False, [0, 0], 1  # stride, padding, dilation, transposed, output_padding, groups


def narrow_conv2d(x: Tensor, weight: Tensor) -> Tensor:
    """Return ``F.conv2d(x, weight, padding=1)``, and let our kernel compute the weight gradient where that is faster.

    Our kernel supports plain CUDA tensors in bfloat16 or float16 (under autocast: after the cast), with ``x`` in
    channels_last, and 16, 32 or 64 channels in and out. It needs Triton. Only the weight gradient can then differ from
    that of ``F.conv2d``, by rounding. For all other tensors, and if no weight gradient is needed, this function is
    ``F.conv2d`` itself, with the same bits. With our kernel, second derivatives are supported; ``torch.func.vmap`` and
    forward-mode derivatives are not, and raise.

    Args:
        x: images, (N, C_in, H, W).
        weight: (C_out, C_in, 3, 3).

    Returns:
        (N, C_out, H, W).
    """
    dtype = x.dtype
    autocast = autocast_dtype(x.device.type)
    if autocast is not None and torch.float64 not in (x.dtype, weight.dtype):
        dtype = autocast
    if not (torch.is_grad_enabled() and weight.requires_grad and _is_supported(x, weight, dtype)):
        return F.conv2d(x, weight, padding=1)
    if autocast is None and weight.dtype != dtype:
        return F.conv2d(x, weight, padding=1)  # raises: the dtypes differ
    # a view, because the compiler cannot trace one tensor as two inputs
    rounded = weight.view_as(weight) if weight.dtype == dtype else weight.to(dtype)
    return _NarrowConv.apply(x.to(dtype), rounded, weight)


class NarrowConv2d(nn.Conv2d):
    """A convolution without bias, kernel 3x3, stride 1 and padding 1, computed by ``narrow_conv2d``."""

    stands_for = nn.Conv2d  # read by memcnn.engine.survey

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution of images (N, C_in, H, W), or (C_in, H, W)."""
        return narrow_conv2d(x, self.weight) if _is_narrow(self) and x.dim() == 4 else super().forward(x)


def use_narrow_convolutions(model: nn.Module, *, enabled: bool = True) -> list[str]:
    """Let the narrow 3x3 convolutions of ``model`` compute their weight gradients by ``narrow_conv2d``.

    The modules change their class, in place, and nothing else: parameters, hooks, state-dict keys, ``deepcopy`` and
    pickle work as before. Call it before the model is compiled, captured, or wrapped by ``fully_shard``. The first
    backward pass of each new shape compiles and times a few kernels, which takes seconds.

    Args:
        model: is changed. Subclasses of ``nn.Conv2d``, and modules with a bias or with other kernel sizes, strides or
            numbers of channels, stay as they are.
        enabled: with ``False``, change back.

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


@torch.library.custom_op("memcnn::conv3x3_weight_gradient", mutates_args=())
def conv3x3_weight_gradient(output_gradient: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weight gradient, (C_out, C_in, 3, 3), of a 3x3 convolution with stride 1 and padding 1.

    Args:
        output_gradient: (N, C_out, H, W), of any strides.
        x: the convolution's input, (N, C_in, H, W), channels_last.
        dtype: of the result. Our kernel rounds its sums, which are float32, to it.
    """
    output_gradient = output_gradient.contiguous(memory_format=torch.channels_last)
    plan = choice.current().plan(output_gradient, x)
    if plan is None:
        return choice.library_weight_gradient(output_gradient, x).to(dtype)
    return choice.planned_weight_gradient(output_gradient, x, plan, dtype)


@conv3x3_weight_gradient.register_fake
def _(output_gradient: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    shape = (output_gradient.shape[1], x.shape[1], 3, 3)
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)


def _save_inputs(ctx: Any, inputs: tuple[Tensor, Tensor, Any], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _second_derivative(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    """Return the derivatives of the weight gradient. It is linear in each input, so both are convolutions."""
    output_gradient, x = ctx.saved_tensors
    weight = gradient.to(x.dtype)
    of_output_gradient = F.conv2d(x, weight, padding=1) if ctx.needs_input_grad[0] else None
    of_input = _input_gradient(output_gradient, x, weight) if ctx.needs_input_grad[1] else None
    return of_output_gradient, of_input, None


conv3x3_weight_gradient.register_autograd(_second_derivative, setup_context=_save_inputs)


class _NarrowConv(torch.autograd.Function):
    """The convolution of x and ``rounded``, which is ``weight`` in the dtype of x.

    It saves the same tensors as PyTorch's, in that order: a reversible block can forget them. The gradient goes to
    ``weight`` at once, in its dtype, so that no kernel has to cast it. Second derivatives also go through ``rounded``.
    """

    @staticmethod
    def forward(x: Tensor, rounded: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, rounded, padding=1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.dtype = inputs[2].dtype

    @staticmethod
    def backward(ctx: Any, output_gradient: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        x, rounded = ctx.saved_tensors
        of_input = _input_gradient(output_gradient, x, rounded) if ctx.needs_input_grad[0] else None
        of_weight = conv3x3_weight_gradient(output_gradient, x, ctx.dtype) if ctx.needs_input_grad[2] else None
        return of_input, None, of_weight


def _input_gradient(output_gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    mask = [True, False, False]
    return torch.ops.aten.convolution_backward(output_gradient, x, weight, None, *_ARGUMENTS, mask)[0]


def _is_supported(x: Tensor, weight: Tensor, dtype: torch.dtype) -> bool:
    return (
        x.device.type in KERNEL_DEVICES
        and x.device == weight.device
        and type(x) in (Tensor, nn.Parameter)
        and type(weight) in (Tensor, nn.Parameter)
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
