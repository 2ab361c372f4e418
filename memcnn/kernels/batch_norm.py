"""BatchNorm and ReLU in front of a convolution, in few kernels; a second evaluation reuses the statistics of the first.

For ``nn.BatchNorm2d`` in training mode, PyTorch's compiler generates two or three reductions for the statistics, and as
many in backward. Here one kernel each computes them (``memcnn.kernels.channel_sums``):

==========  ==========================================================================================================
forward     ``batch_statistics`` reads x once, updates the running statistics, and returns mean and 1 / deviation.
            y = relu(w (x - mean) / deviation + b) is left to the compiler, which also rounds y to autocast's dtype.
recompute   In the second evaluation of a reversible branch, ``batch_statistics`` returns what it returned in the first
            (``memcnn.reuse``). It launches no kernel and changes no running statistics.
backward    ``gradient_sums`` reads x and the gradient of y once. The gradient of x is left to the compiler.
==========  ==========================================================================================================

On a CPU, and without Triton, both operators are plain PyTorch: correct, but not fast. Their time on a GPU is not
measured yet. To measure it, run ``python -m bench.speed --fast --tries``.

Formulas: Ioffe, Szegedy, "Batch Normalization", arXiv:1502.03167, section 3.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from memcnn import reuse
from memcnn.autocast import autocast_dtype
from memcnn.engine.torch_private import is_transformed
from memcnn.kernels.devices import KERNEL_DEVICES, MOST_ELEMENTS, innermost, processors

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_CHANNELS = 1024


class BatchNormReLU2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` and ReLU in front of a convolution. In training under autocast, y has autocast's dtype."""

    stands_for = nn.BatchNorm2d  # read by memcnn.engine.survey

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(batch_norm(x)) for images x (N, C, H, W)."""
        if not _is_supported(self, x):
            return super().forward(x).relu()
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        buffers = self.running_mean, self.running_var, self.num_batches_tracked
        statistics = batch_statistics(x.detach(), *buffers, self.momentum, self.eps)
        dtype = autocast_dtype(x.device.type) or x.dtype
        return _BatchNormReLU.apply(x, statistics, self.weight, self.bias, dtype)


class SkippedReLU(nn.ReLU):
    """Return the input unchanged: the ``BatchNormReLU2d`` before it has applied the ReLU."""

    stands_for = nn.ReLU

    def forward(self, x: Tensor) -> Tensor:
        """Return x."""
        return x


def use_fused_norms(model: nn.Module, *, enabled: bool = True) -> list[str]:
    """Fuse each BatchNorm2d and ReLU in front of a convolution in an ``nn.Sequential`` into one ``BatchNormReLU2d``.

    The modules change their class, in place, and nothing else: parameters, buffers, state-dict keys, ``deepcopy`` and
    pickle work as before. The BatchNorm alone then returns the output of the ReLU, so its layers must run in the order
    of the ``nn.Sequential``, and hooks that are registered later see other values. Call it before the model is
    compiled, captured, or wrapped by ``fully_shard``, and after ``nn.SyncBatchNorm.convert_sync_batchnorm``. It is
    faster only in compiled code. Second derivatives raise an error. In code of TorchInductor, differentiate a graph
    only once, without ``retain_graph``.

    Args:
        model: the model, changed in place. Not changed are a BatchNorm without parameters, running statistics or
            momentum; layers with hooks or a replaced ``forward``; layers that occur in several places; and layers in a
            subclass of ``nn.Sequential`` with its own ``forward``.
        enabled: with ``False``, change back.

    Returns:
        The names of the BatchNorms that were changed.
    """
    if not enabled:
        changed = [name for name, module in model.named_modules() if type(module) is BatchNormReLU2d]
        for module in model.modules():
            if type(module) in _PLAIN:
                module.__class__ = _PLAIN[type(module)]
        return changed
    places = Counter(module for _, module in model.named_modules(remove_duplicate=False))
    changed = []
    for name, module in model.named_modules():
        layers = list(module._modules.items()) if _is_sequence(module) else []
        for (key, norm), (_, relu), (_, convolution) in zip(layers, layers[1:], layers[2:], strict=False):
            if (
                isinstance(convolution, nn.Conv2d)
                and type(relu) is nn.ReLU
                and _is_tracking(norm)
                and all(places[layer] == 1 and not _is_customised(layer) for layer in (norm, relu))
            ):
                norm.__class__, relu.__class__ = BatchNormReLU2d, SkippedReLU
                changed.append(f"{name}.{key}" if name else key)
    return changed


@torch.library.custom_op(
    "memcnn::batch_statistics",
    mutates_args=("running_mean", "running_var", "count"),
    tags=(torch.Tag.cudagraph_unsafe,),
)
def batch_statistics(
    x: Tensor, running_mean: Tensor, running_var: Tensor, count: Tensor, momentum: float, eps: float
) -> Tensor:
    """Return mean and 1 / sqrt(variance + eps) of each channel, float32 of shape (2, C), and update the statistics.

    In the second evaluation of a reversible branch, return what the first evaluation returned, and update nothing.

    Args:
        x: (N, C, H, W), with at least two values a channel.
        running_mean: (C,), float32, updated in place.
        running_var: (C,), float32, updated in place.
        count: number of batches, int64, increased by 1.
        momentum: weight of the new values.
        eps: added to the variance.
    """
    if (result := reuse.take()) is not None:
        return result
    if _has_kernel(x):
        from memcnn.kernels import channel_sums

        copy = x.new_empty((2, x.shape[1]), dtype=torch.float32) if reuse.is_first() else None
        with _launch_options(x) as options:
            result = channel_sums.batch_statistics(
                innermost(x),
                eps=eps,
                momentum=momentum,
                running_mean=running_mean,
                running_var=running_var,
                count=count,
                copy=copy,
                **options,
            )
        reuse.keep(result, copy)
        return result
    variance, mean = torch.var_mean(x.float(), (0, 2, 3), correction=0)
    n = x.numel() // x.shape[1]
    running_mean.lerp_(mean, momentum)
    running_var.lerp_(variance * (n / (n - 1)), momentum)
    count.add_(1)
    result = torch.stack([mean, (variance + eps).rsqrt()])
    reuse.keep(result)
    return result


@batch_statistics.register_fake
def _(x: Tensor, running_mean: Tensor, running_var: Tensor, count: Tensor, momentum: float, eps: float) -> Tensor:
    return x.new_empty((2, x.shape[1]), dtype=torch.float32)


@torch.library.custom_op("memcnn::gradient_sums", mutates_args=())
def gradient_sums(output_gradient: Tensor, x: Tensor, statistics: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return the gradients of bias and weight, float32 of shape (2, C).

    Args:
        output_gradient: the gradient of y, (N, C, H, W).
        x: the input, (N, C, H, W).
        statistics: the result of ``batch_statistics`` for x.
        weight: (C,), float32.
        bias: (C,), float32.
    """
    if _has_kernel(x):
        from memcnn.kernels import channel_sums

        images = innermost(output_gradient), innermost(x)
        with _launch_options(x) as options:
            return channel_sums.gradient_sums(*images, statistics, weight, bias, relu=True, **options)
    return _gradient_sums(output_gradient, x, statistics, weight, bias)


def _gradient_sums(output_gradient: Tensor, x: Tensor, statistics: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``gradient_sums``, computed by PyTorch."""
    normalised, gradient = _before_relu(output_gradient, x, statistics, weight, bias)
    return torch.stack([gradient.sum((0, 2, 3)), (gradient * normalised).sum((0, 2, 3))])


@gradient_sums.register_fake
def _(output_gradient: Tensor, x: Tensor, statistics: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.empty_like(statistics)


class _BatchNormReLU(torch.autograd.Function):
    """y = relu(w n + b) with n = (x - mean) / deviation. Gradients also go through mean and deviation."""

    @staticmethod
    def forward(x: Tensor, statistics: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
        y = (_normalised(x, statistics) * _column(weight) + _column(bias)).relu()
        # with a cast to the same dtype, compiled code of PyTorch 2.11 returns zeros as gradients
        return y if y.dtype == dtype else y.to(dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:4])

    @staticmethod
    def backward(ctx: Any, output_gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, statistics, weight, bias = ctx.saved_tensors
        sums: Callable[..., Tensor] = gradient_sums
        if is_transformed():  # PyTorch would drop forward-mode derivatives of an opaque operator
            if torch.is_grad_enabled():
                raise RuntimeError(
                    "fused norms have no second derivatives; change the model back by use_fused_norms(enabled=False)"
                )
            sums = _gradient_sums
        of_bias, of_weight = sums(output_gradient, x, statistics, weight, bias).unbind()
        n = x.numel() // x.shape[1]
        normalised, gradient = _before_relu(output_gradient, x, statistics, weight, bias)
        centred = gradient - (_column(of_bias) + normalised * _column(of_weight)) / n
        return (_column(weight * statistics[1]) * centred).to(x.dtype), None, of_weight, of_bias, None


def _before_relu(
    output_gradient: Tensor, x: Tensor, statistics: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """Return n and the gradient of w n + b, which is 0 where the ReLU cut off."""
    normalised = _normalised(x, statistics)
    before_relu = (normalised * _column(weight) + _column(bias)).to(output_gradient.dtype)
    return normalised, torch.where(before_relu > 0, output_gradient.float(), 0.0)


def _normalised(x: Tensor, statistics: Tensor) -> Tensor:
    return (x.float() - _column(statistics[0])) * _column(statistics[1])


def _column(values: Tensor) -> Tensor:
    """Return values of shape (C,) as (C, 1, 1), to combine them with images."""
    return values[:, None, None]


def _has_kernel(x: Tensor) -> bool:
    return x.device.type in KERNEL_DEVICES and x.numel() <= MOST_ELEMENTS and x.shape[1] <= MOST_CHANNELS


_counters: dict[tuple[torch.device, int], Tensor] = {}
"""The kernels' counters, by device and stream. The launches of one stream run in turn, so they can share one."""


@contextmanager
def _launch_options(x: Tensor) -> Iterator[dict[str, Any]]:
    """Make the device of x the current one, and yield the options that both kernels have in common."""
    from memcnn.kernels.channel_sums import COUNTERS

    if not x.is_cuda:  # Triton's interpreter
        yield {"counter": torch.zeros(COUNTERS, dtype=torch.int32), "processors": processors(x)}
        return
    with torch.cuda.device(x.device):
        key = x.device, torch.cuda.current_stream().cuda_stream
        if (counter := _counters.get(key)) is None:
            counter = torch.zeros(COUNTERS, dtype=torch.int32, device=x.device)
            # during a capture nothing runs: eager launches could not use these zeros, which each replay writes
            if not torch.cuda.is_current_stream_capturing():
                _counters[key] = counter
        yield {"counter": counter, "processors": processors(x)}


def _is_tracking(module: nn.Module) -> bool:
    """Return whether a module is a BatchNorm2d with parameters and running statistics that move by a fixed momentum."""
    return (
        type(module) is nn.BatchNorm2d and module.affine and module.track_running_stats and module.momentum is not None
    )


def _is_sequence(module: nn.Module) -> bool:
    """Return whether a module calls its children in their order, each with the output of the one before."""
    forward = getattr(vars(type(module)).get("stands_for", type(module)), "forward", None)
    return isinstance(module, nn.Sequential) and forward is nn.Sequential.forward and not _is_customised(module)


def _is_customised(module: nn.Module) -> bool:
    """Return whether a module has hooks, or a forward function of its own."""
    own = vars(module)
    return "forward" in own or any(value for name, value in own.items() if name.endswith("_hooks"))


def _is_supported(norm: BatchNormReLU2d, x: Tensor) -> bool:
    """Return whether the operators support this layer and input. For others, ``nn.BatchNorm2d`` computes or raises."""
    return (
        norm.training
        and not is_transformed()
        and norm.track_running_stats
        and norm.momentum is not None
        and norm.eps > 0
        and norm.running_mean is not None
        and norm.weight is not None
        and norm.weight.dtype == norm.running_mean.dtype == torch.float32
        and type(x) in (Tensor, nn.Parameter)
        and x.dtype in DTYPES
        and x.dim() == 4
        and x.shape[1] == norm.num_features
        and x.device == norm.weight.device
        and x.numel() > x.shape[1]
    )


_PLAIN = {BatchNormReLU2d: nn.BatchNorm2d, SkippedReLU: nn.ReLU}
