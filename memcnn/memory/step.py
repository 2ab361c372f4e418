"""The memory of one training step: the bytes that it adds to the model, and the kinds of tensors at its peak."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from .allocator import allocator_peak_bytes, allocator_total_bytes
from .tensors import TensorMeter, bytes_of, tensor_peak_bytes


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one forward and backward pass; see ``measure_step_memory``.

    Attributes:
        parameter_bytes: the model's parameters.
        peak_bytes: the model's parameters, buffers and gradients, plus ``activation_bytes``.
        activation_bytes: the most that the step adds to these at one instant.
    """

    parameter_bytes: int
    peak_bytes: int
    activation_bytes: int


@dataclass(frozen=True)
class PeakSplit:
    """The bytes alive at the worst instant of a training step, by kind; see ``measure_peak_split``.

    Attributes:
        parameter_bytes: the model's parameters.
        buffer_bytes: the model's buffers, such as running statistics.
        gradient_bytes: the gradients that are the ``.grad`` of a parameter at that instant.
        optimizer_bytes: the optimiser's state.
        batch_bytes: the inputs and targets.
        activation_bytes: everything else: saved tensors, gradients of activations, results of the running operator.
        peak_bytes: the sum of the above.
        phase: the part of the step with that instant: "forward", "backward" or "update".
        allocated_bytes: the peak as the allocator counts it, kernels' scratch included; None without ``allocator``.
        reserved_bytes: the bytes that CUDA's allocator took from the device; None without ``allocator`` or CUDA.
    """

    parameter_bytes: int
    buffer_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    batch_bytes: int
    activation_bytes: int
    peak_bytes: int
    phase: str
    allocated_bytes: int | None = None
    reserved_bytes: int | None = None


def measure_step_memory(
    model: nn.Module, step: Callable[[], object], *, meter: Callable[[Callable[[], object]], int] | None = None
) -> StepMemory:
    """Measure the memory of one training step.

    Before the step every trainable parameter gets a gradient of zeros, so that gradients do not count as activations;
    after it the parameters have their previous ``.grad`` back. The states of torch's random generators do not change.
    Other changes that the step makes remain, for instance to running statistics: pass a copy of the model where that
    matters.

    Args:
        model: the model that is trained.
        step: runs one forward and backward pass on ``model``.
        meter: returns the peak bytes of a function. The default on CUDA is ``allocator_peak_bytes`` on the model's
            device. Elsewhere it is ``tensor_peak_bytes``, because its result is the same on every machine and because
            it leaves the process's one profiler free; pass ``allocator_peak_bytes`` to include scratch memory. For a
            model on CUDA, ``step`` runs once more beforehand, so that library handles and the choice of kernels do not
            count.

    Returns:
        The bytes of parameters, activations and the peak.
    """
    parameters = list(model.parameters())
    device = parameters[0].device if parameters else torch.device("cpu")
    on_cuda = device.type == "cuda"
    if meter is None:
        meter = partial(allocator_peak_bytes, device=device) if on_cuda else tensor_peak_bytes
    gradients = [parameter.grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        resident_bytes = bytes_of([*parameters, *model.buffers(), *(p.grad for p in parameters if p.grad is not None)])
        with torch.random.fork_rng(devices=[device] if on_cuda else []):
            if on_cuda:
                step()
            activation_bytes = meter(step)
    finally:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
    return StepMemory(bytes_of(parameters), resident_bytes + activation_bytes, activation_bytes)


def measure_peak_split(
    model: nn.Module,
    step: Callable[[], object],
    *,
    optimizer: torch.optim.Optimizer | None = None,
    batch: Iterable[torch.Tensor] = (),
    block_bytes: int = 1,
    allocator: bool = False,
) -> PeakSplit:
    """Measure the bytes of each kind of tensor at the worst instant of a training step.

    ``step`` runs once beforehand, so that gradients and the optimiser's state exist as in the middle of training. The
    changes that it makes remain.

    Args:
        model: the model that is trained, on any device; its tensors may be fake or meta tensors.
        step: trains ``model`` on ``batch`` once.
        optimizer: the optimiser that ``step`` uses, if any.
        batch: the inputs and targets that ``step`` reads.
        block_bytes: see ``TensorMeter``.
        allocator: also ask the allocator of the CPU or of CUDA. ``step`` then runs once more, on the CPU twice more.

    Returns:
        The bytes of each kind of tensor; for a model on a GPU, only of tensors on GPUs. With ``allocator`` it has
        ``allocated_bytes`` and, on CUDA, ``reserved_bytes``, which covers the whole process.
    """
    parameters, batch = list(model.parameters()), list(batch)
    step()
    device = parameters[0].device if parameters else torch.device("cpu")
    of_gpu = "cuda" if device.type == "cuda" else None
    with (
        TensorMeter(block_bytes=block_bytes, device_type=of_gpu) as meter,
        _counting_gradients(meter, parameters),
    ):
        for label, tensors in _resident(model, optimizer, batch).items():
            meter.count(tensors, label)
        with _noting_peaks_before_update(meter, optimizer) as peaks_before_update:
            step()
    in_update = peaks_before_update and meter.peak_bytes > peaks_before_update[-1]
    allocated_bytes = reserved_bytes = None
    if allocator:
        allocated_bytes = allocator_total_bytes(
            step, lambda: tree_leaves(_resident(model, optimizer, batch)), device=device
        )
        reserved_bytes = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None
    return PeakSplit(
        **{f"{label}_bytes": meter.peak[label] for label in ("parameter", "buffer", "gradient", "optimizer", "batch")},
        activation_bytes=meter.peak[""],
        peak_bytes=meter.peak_bytes,
        phase="update" if in_update else "backward" if meter.peak_in_backward else "forward",
        allocated_bytes=allocated_bytes,
        reserved_bytes=reserved_bytes,
    )


def _resident(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, batch: list[torch.Tensor]
) -> dict[str, list[torch.Tensor]]:
    """Return the tensors that exist between two steps, by label."""
    return {
        "parameter": list(model.parameters()),
        "buffer": list(model.buffers()),
        "gradient": [p.grad for p in model.parameters() if p.grad is not None],
        "optimizer": [] if optimizer is None else tree_leaves(list(optimizer.state.values())),
        "batch": batch,
    }


@contextmanager
def _counting_gradients(meter: TensorMeter, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Label the gradient of each parameter as soon as autograd has set it."""

    def count(parameter: nn.Parameter) -> None:
        assert parameter.grad is not None, "autograd calls this hook after it has set the gradient"
        meter.count([parameter.grad], "gradient")

    hooks = [p.register_post_accumulate_grad_hook(count) for p in parameters if p.requires_grad]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _noting_peaks_before_update(meter: TensorMeter, optimizer: torch.optim.Optimizer | None) -> Iterator[list[int]]:
    """Yield a list that gets the meter's peak before each update of the optimiser."""
    peaks: list[int] = []
    hook = None if optimizer is None else optimizer.register_step_pre_hook(lambda *_: peaks.append(meter.peak_bytes))
    try:
        yield peaks
    finally:
        if hook is not None:
            hook.remove()
