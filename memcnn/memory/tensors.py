"""The bytes of tensors: a meter that follows every tensor from the operator that returns it to its end."""

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

import torch
from torch.autograd.graph import _engine_run_backward
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .allocator import in_blocks


class TensorMeter(TorchDispatchMode):
    """A context that counts the bytes of all tensors made within it.

    A storage counts once, from the operator that returns it until its last tensor is gone. Views and in-place results
    add nothing. Storages that existed at entry are not counted, even when they are freed inside; ``count`` adds them.
    Sparse tensors are not counted, nor is what other Python threads make. Meters may be nested. After the context has
    ended, ``current_bytes`` still falls when a tensor is freed, so it is the bytes that are still referenced.

    Args:
        block_bytes: size of a block; each storage counts as a whole number of blocks. CUDA's caching allocator hands
            out blocks of 512 bytes.
        device_type: count only tensors on devices of this type, for example "cuda"; None counts all. A checkpoint on
            a GPU, for example, keeps states of random generators in the CPU's memory.

    Attributes:
        current_bytes: bytes of the tensors that exist now.
        peak_bytes: the highest ``current_bytes`` so far.
        current: ``current_bytes`` by label; storages without a label have the label "".
        peak: ``peak_bytes`` by label.
        peak_in_backward: True if the peak was reached in a backward pass.
    """

    only_watches = True
    """This mode changes no result, so the engine can ignore it."""

    def __init__(self, *, block_bytes: int = 1, device_type: str | None = None) -> None:
        super().__init__()
        self.current_bytes = self.peak_bytes = 0
        self.current: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.peak_in_backward = False
        self._block_bytes, self._device_type = block_bytes, device_type
        self._known: dict[int, weakref.ref] = {}  # id of a storage: every storage seen that is still alive
        self._counted: dict[int, int] = {}  # id of a storage: its bytes, if it counts
        self._labels: dict[int, str] = {}  # id of a storage: its label, if it has one

    def count(self, tensors: Iterable[torch.Tensor], label: str) -> None:
        """Label the storages of ``tensors``, and count those that were made before the meter, until they are freed."""
        for storage in storages_of(list(tensors), self._device_type):
            self._meet(storage)
            key = id(storage)
            self.current[self._labels.get(key, "")] -= self._counted.get(key, 0)
            self.current[label] += self._counted.get(key, 0)
            self._labels[key] = label
            self._count(storage)
        self._note_peak()

    def __torch_dispatch__(self, func: Any, types: object, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.ops.aten.lift_fresh.default:  # its argument was just made from Python numbers
            for storage in storages_of((args, kwargs), self._device_type):
                self._meet(storage)
        result = func(*args, **kwargs)
        for storage in storages_of(result, self._device_type):
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
        """Register a storage, so that its end is noticed. Return True if it was not registered before."""
        key = id(storage)
        if key in self._known:
            return False
        self._known[key] = weakref.ref(storage, lambda _: self._forget(key))
        return True

    def _forget(self, key: int) -> None:
        """Stop counting a storage that was freed."""
        del self._known[key]
        size = self._counted.pop(key, 0)
        self.current_bytes -= size
        self.current[self._labels.pop(key, "")] -= size

    def _count(self, storage: torch.UntypedStorage) -> None:
        """Count a new storage, or what a known one has grown by, in bytes."""
        key, size = id(storage), in_blocks(storage.nbytes(), self._block_bytes)
        more = size - self._counted.get(key, 0)
        self.current_bytes += more
        self.current[self._labels.get(key, "")] += more
        self._counted[key] = size


def tensor_peak_bytes(fn: Callable[[], object]) -> int:
    """Return the peak bytes of the tensors that ``fn()`` makes."""
    with TensorMeter() as meter:
        fn()
    return meter.peak_bytes


def storages_of(tree: object, device_type: str | None = None) -> list[torch.UntypedStorage]:
    """Return the storages of the dense tensors in nested tuples, lists and dicts; of all devices, or of one type."""
    return [
        t.untyped_storage()
        for t in tree_leaves(tree)
        if isinstance(t, torch.Tensor) and t.layout is torch.strided and device_type in (None, t.device.type)
    ]


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """Return the bytes of the distinct storages behind ``tensors``."""
    return sum({id(storage): storage.nbytes() for storage in storages_of(list(tensors))}.values())


def _sums_gradients(func: torch._ops.OpOverload) -> bool:
    """Return True if ``func`` is autograd's own sum of two gradients of one tensor, and not an addition of the program.

    Autograd adds in place if it holds the only reference to one of the two, but never within a dispatch mode. There
    the sum is a new tensor. It must not count towards the peak before autograd has freed the gradient that it would
    have overwritten.
    """
    in_backward = torch._C._current_graph_task_id() != -1 and not torch.is_grad_enabled()
    if func is not torch.ops.aten.add.Tensor or not in_backward:
        return False
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not _engine_run_backward.__code__:
        if not frame.f_code.co_filename.startswith((__file__, torch.__path__[0])):
            return False  # a hook, or the backward of a Function
        frame = frame.f_back
    return True
