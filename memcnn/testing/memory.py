"""Exact peak memory of a piece of PyTorch code, in bytes.

Two meters, because each sees what the other cannot:

* `tensor_peak_bytes` follows every tensor that an operator returns. It works on any device, and on fake and meta
  tensors, where it predicts the memory of a step without computing it. It does not see memory that a kernel borrows and
  returns within one operator (library scratch), nor a storage that is emptied by hand. Its result does not depend on
  the machine or the number of threads.
* `allocator_peak_bytes` asks the allocator: on the CPU by the events that the profiler records, on CUDA by the counters
  of the caching allocator. It sees scratch too, which is why it is the larger of the two.

`measure_step_memory` tells what one training step adds to parameters and gradients, `measure_peak_split` what the worst
instant of a step consists of.
"""

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.autograd.graph import _engine_run_backward
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from memcnn.testing.allocator import CUDA_BLOCK_BYTES, allocator_peak_bytes, allocator_total_bytes, in_blocks

__all__ = ["CUDA_BLOCK_BYTES", "PeakSplit", "StepMemory", "TensorMeter", "allocator_peak_bytes", "measure_peak_split",
           "measure_step_memory", "tensor_peak_bytes"]  # fmt: skip


@dataclass(frozen=True)
class StepMemory:
    """What one forward and backward pass needs; see `measure_step_memory`."""

    parameter_bytes: int  # the model's parameters
    peak_bytes: int  # parameters, buffers and gradients, and what the step adds at its worst instant
    activation_bytes: int  # what the step adds at its worst instant


@dataclass(frozen=True)
class PeakSplit:
    """What is alive at the worst instant of a training step, in bytes; see `measure_peak_split`."""

    parameter_bytes: int
    buffer_bytes: int  # running statistics and the like
    gradient_bytes: int  # those in place at that instant, as `.grad` of a parameter
    optimizer_bytes: int  # state that the optimiser keeps from step to step
    batch_bytes: int
    activation_bytes: int  # all else: what backward needs, gradients of activations, what an operator is computing
    peak_bytes: int  # the sum of these
    phase: str  # in which that instant lies: "forward", "backward" or "update"
    allocated_bytes: int | None = None  # by the allocator, scratch included: a model's step on the CPU or on CUDA
    reserved_bytes: int | None = None  # what CUDA's allocator took from the device


class TensorMeter(TorchDispatchMode):
    """A context that counts the bytes of all tensors made within it.

    `current_bytes` are alive now, `peak_bytes` were alive at the worst instant so far. A storage counts once, from the
    operator that returns it until its last tensor is gone; views and in-place results add nothing; what existed at
    entry is not counted, not even when it is freed inside, unless it is handed to `count`. Sparse tensors are not
    counted. Meters may be nested. After the end, `current_bytes` still falls as tensors go: what stays is what somebody
    holds.

    `current` and `peak` are the same by label: "" for what nobody has labelled. `peak_in_backward` tells whether the
    worst instant lay in a backward pass. With `block_bytes` each storage counts as a whole number of such blocks: 512
    for the memory that CUDA's caching allocator hands out.
    """

    def __init__(self, *, block_bytes: int = 1) -> None:
        super().__init__()
        self.current_bytes = self.peak_bytes = 0
        self.current: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.peak_in_backward = False
        self._block_bytes = block_bytes
        self._known: dict[int, weakref.ref] = {}  # by id, every storage met that is still alive
        self._counted: dict[int, int] = {}  # bytes of those that count
        self._labels: dict[int, str] = {}

    def count(self, tensors: Iterable[torch.Tensor], label: str) -> None:
        """Count the storages of `tensors` under `label` as long as they live, wherever they were made."""
        for storage in _storages(list(tensors)):
            self._meet(storage)
            key = id(storage)
            self.current[self._labels.get(key, "")] -= self._counted.get(key, 0)
            self.current[label] += self._counted.get(key, 0)
            self._labels[key] = label
            self._count(storage)
        self._note_peak()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not torch.ops.aten.lift_fresh.default:  # its argument was just made from Python numbers
            for storage in _storages((args, kwargs)):
                self._meet(storage)
        result = func(*args, **kwargs)
        for storage in _storages(result):
            if self._meet(storage) or id(storage) in self._counted:
                self._count(storage)
        if self.current_bytes > self.peak_bytes and not _sums_gradients(func):
            self._note_peak()
        return result

    def _note_peak(self) -> None:
        if self.current_bytes > self.peak_bytes:
            self.peak_bytes, self.peak = self.current_bytes, Counter(self.current)
            self.peak_in_backward = torch._C._current_graph_task_id() != -1

    def _meet(self, storage: torch.UntypedStorage) -> bool:
        """Whether the storage is met for the first time; from then on its end is noticed."""
        key = id(storage)
        if key in self._known:
            return False
        self._known[key] = weakref.ref(storage, lambda _: self._forget(key))
        return True

    def _forget(self, key: int) -> None:
        del self._known[key]
        size = self._counted.pop(key, 0)
        self.current_bytes -= size
        self.current[self._labels.pop(key, "")] -= size

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), in_blocks(storage.nbytes(), self._block_bytes)
        more = size - self._counted.get(key, 0)
        self.current_bytes += more
        self.current[self._labels.get(key, "")] += more
        self._counted[key] = size


def tensor_peak_bytes(fn: Callable[[], object]) -> int:
    """The most bytes of tensors made by `fn()` that are alive at one instant."""
    with TensorMeter() as meter:
        fn()
    return meter.peak_bytes


def measure_step_memory(
    model: nn.Module, step: Callable[[], object], *, meter: Callable[[Callable[[], object]], int] | None = None
) -> StepMemory:
    """Memory of one training step of `model`, where `step()` runs one forward and backward pass on it.

    Every trainable parameter has a gradient of zeros in place before the step and its previous `.grad` after it, so
    that gradients do not count as activations; torch's random generators are left as they were. Whatever else the
    step changes (running statistics, for one) stays changed: hand in a copy of the model where that matters.

    `meter` is `tensor_peak_bytes` unless the model is on CUDA, where it is `allocator_peak_bytes` on the model's device
    and `step` runs once more beforehand, so that library handles and the choice of kernels are not counted. The tensor
    meter is the default on the CPU because its result is the same on every machine, and because it does not take the
    process's one profiler; pass `meter=allocator_peak_bytes` to count scratch as well.
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
        resident_bytes = _bytes([*parameters, *model.buffers(), *(p.grad for p in parameters if p.grad is not None)])
        with torch.random.fork_rng(devices=[device] if on_cuda else []):
            if on_cuda:
                step()
            activation_bytes = meter(step)
    finally:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
    return StepMemory(_bytes(parameters), resident_bytes + activation_bytes, activation_bytes)


def measure_peak_split(
    model: nn.Module,
    step: Callable[[], object],
    *,
    optimizer: torch.optim.Optimizer | None = None,
    batch: Iterable[torch.Tensor] = (),
    block_bytes: int = 1,
    allocator: bool = False,
) -> PeakSplit:
    """What the worst instant of `step()` consists of, where `step` trains `model` on `batch` once.

    `step` runs once beforehand, so that gradients and the state of `optimizer` are in place as in the midst of a
    training run. What it changes stays changed. The split is that of the tensors, on any device, fake and meta tensors
    too; `block_bytes` is `TensorMeter`'s. With `allocator`, for the CPU and CUDA, `step` runs again, on the CPU twice,
    to fill `allocated_bytes` and, on CUDA, `reserved_bytes`, which is all that the process has reserved.
    """
    parameters, batch = list(model.parameters()), list(batch)

    def resident() -> dict[str, list[torch.Tensor]]:
        return {
            "parameter": parameters,
            "buffer": list(model.buffers()),
            "gradient": [p.grad for p in parameters if p.grad is not None],
            "optimizer": [] if optimizer is None else tree_leaves(list(optimizer.state.values())),
            "batch": batch,
        }

    step()
    with TensorMeter(block_bytes=block_bytes) as meter, _counting_gradients(meter, parameters):
        for label, tensors in resident().items():
            meter.count(tensors, label)
        peaks_before_update = []
        if optimizer is not None:
            hook = optimizer.register_step_pre_hook(lambda *_: peaks_before_update.append(meter.peak_bytes))
        step()
    if optimizer is not None:
        hook.remove()
    in_update = peaks_before_update and meter.peak_bytes > peaks_before_update[-1]
    allocated_bytes = reserved_bytes = None
    if allocator:
        device = parameters[0].device if parameters else torch.device("cpu")
        allocated_bytes = allocator_total_bytes(step, lambda: tree_leaves(resident()), device=device)
        reserved_bytes = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None
    return PeakSplit(
        **{f"{label}_bytes": meter.peak[label] for label in ("parameter", "buffer", "gradient", "optimizer", "batch")},
        activation_bytes=meter.peak[""],
        peak_bytes=meter.peak_bytes,
        phase="update" if in_update else "backward" if meter.peak_in_backward else "forward",
        allocated_bytes=allocated_bytes,
        reserved_bytes=reserved_bytes,
    )


@contextmanager
def _counting_gradients(meter: TensorMeter, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    def count(parameter: nn.Parameter) -> None:
        meter.count([parameter.grad], "gradient")

    hooks = [p.register_post_accumulate_grad_hook(count) for p in parameters if p.requires_grad]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _sums_gradients(func: torch._ops.OpOverload) -> bool:
    """Whether `func` is the engine of autograd adding up two gradients that meet, rather than somebody's own sum.

    The engine adds in place where nobody else holds one of the two, but never within a dispatch mode: here the sum is a
    new tensor, and may count towards the peak only when the engine has dropped what it would have overwritten.
    """
    in_backward = torch._C._current_graph_task_id() != -1 and not torch.is_grad_enabled()
    if func is not torch.ops.aten.add.Tensor or not in_backward:
        return False
    frame = sys._getframe()
    while frame is not None and frame.f_code is not _engine_run_backward.__code__:
        if not frame.f_code.co_filename.startswith((__file__, torch.__path__[0])):
            return False  # a hook, or the backward of a Function
        frame = frame.f_back
    return True


def _storages(tree: object) -> list[torch.UntypedStorage]:
    """The storages of the dense tensors in nested tuples, lists and dicts."""
    return [t.untyped_storage() for t in tree_leaves(tree) if isinstance(t, torch.Tensor) and t.layout is torch.strided]


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the distinct storages behind `tensors`."""
    return sum({id(storage): storage.nbytes() for storage in _storages(list(tensors))}.values())
