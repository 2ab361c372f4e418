"""The drift watch: it compares rebuilt activations with those of the forward pass, and warns.

Rounding changes the last bits of a rebuilt value. Where a network amplifies that, gradients become wrong although every
single step is right. Channels that are constantly 0 are an example: rebuilt they are 1e-8, a BatchNorm multiplies them
by 316, and the ReLU behind it passes gradients that it should block. State that changed unnoticed shows here as well.

Each branch is watched in its evaluations number 4, 16, 64 and so on, so that the cost vanishes on average. There the
forward pass notes the norm and the numbers of positive and negative entries of every tensor that autograd saves.
Backward compares them with those of the rebuilt tensor. On a GPU the numbers are read after they have arrived on the
CPU, so that nothing waits for them.

A warning names a branch, each branch at most once. It is left out if the warning before it, in the same backward pass,
named a branch with the same class and the same classes of children.
"""

import warnings
import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from memcnn.engine.capture import is_captured
from memcnn.engine.checksum import has_fingerprint
from memcnn.engine.torch_private import current_backward_pass, has_values

SAMPLED = frozenset(4**k for k in range(1, 16))
"""The evaluations of a branch that are watched, counted from 1. The first three are often not part of training."""


class Evaluations:
    """Counts the evaluations of a branch in forward passes."""

    number = 0


evaluations: "weakref.WeakKeyDictionary[nn.Module, Evaluations]" = weakref.WeakKeyDictionary()
"""The counter of each branch, made by ``setdefault`` on first use."""

LARGEST_NORM_CHANGE = 0.01
"""Largest relative change of a saved tensor's norm that causes no warning."""
LARGEST_SHARE_CHANGE = 0.01
"""Largest change of the share of positive entries that causes no warning.

Only tensors without negative entries are checked, as after a ReLU."""
LARGEST_COUNT_CHANGE = 8
"""Largest change of the number of positive entries that causes no warning, however small the tensor is."""
LEAST_ROOT_MEAN_SQUARE = 1e-3
"""Changes of norm are relative to at least this root mean square, because rebuilt zeros are not exactly zero."""

_covered: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()
"""Branches that need no warning of their own any more: one named them, or a similar branch in the same pass."""
_last_warning = ("", -1)
"""The branch that the last warning named, and the number of its backward pass."""
_GPU = torch.device("cuda")
arriving: list["Arriving"] = []
"""Comparisons on GPUs whose numbers have not arrived on the CPU yet."""


class Comparison(NamedTuple):
    """The indices and the shapes of the saved tensors that are compared."""

    indices: Sequence[int]
    shapes: Sequence[torch.Size]


class Arriving(NamedTuple):
    """A comparison whose numbers are on their way from a GPU to the CPU. ``arrived`` is the event after the copy."""

    drift: "Drift"
    what: Comparison
    numbers: Tensor
    arrived: torch.cuda.Event


class Drift:
    """Compares the tensors that autograd saves in one evaluation of ``module`` with those that are rebuilt."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.backward_pass = -1
        self.then: list[Tensor | None] = []
        self.now: dict[int, tuple[Tensor, torch.Size]] = {}
        read_arrived()

    def note(self, tensor: Tensor) -> None:
        """Note the next tensor that autograd saves in the forward pass."""
        self.then.append(_statistics(tensor))

    def note_rebuilt(self, index: int, tensor: Tensor) -> None:
        """Note the rebuilt tensor number ``index``, counted from 0."""
        if index < len(self.then) and self.then[index] is not None:
            statistics = _statistics(tensor)
            if statistics is not None and statistics.device == self.then[index].device:
                self.now[index] = statistics, tensor.shape

    def compare(self) -> None:
        """Warn if a rebuilt tensor differs, now or when the numbers have arrived from the GPU."""
        self.backward_pass = current_backward_pass()
        now, self.now = self.now, {}
        for device in {statistics.device for statistics, _ in now.values()}:
            indices = [i for i, (statistics, _) in now.items() if statistics.device == device]
            what = Comparison(indices, [now[i][1] for i in indices])
            numbers = torch.stack([self.then[i] for i in indices] + [now[i][0] for i in indices])
            if device.type == "cpu" or not has_values(numbers):
                self.check(what, numbers)
            else:
                host = torch.empty(numbers.shape, dtype=numbers.dtype, device="cpu", pin_memory=True)
                host.copy_(numbers, non_blocking=True)
                arrived = torch.cuda.Event()
                arrived.record(torch.cuda.current_stream(device))
                arriving.append(Arriving(self, what, host, arrived))
        read_arrived()

    def check(self, what: Comparison, numbers: Tensor) -> None:
        """Warn of the first tensor that differs. ``numbers``: statistics of the forward pass, then the rebuilt."""
        then, now = numbers.double().chunk(2)
        if not has_values(then):
            return
        for index, shape, before, after in zip(what.indices, what.shapes, then.tolist(), now.tolist(), strict=True):
            if difference := _difference(before, after, shape.numel()):
                self._warn(index, tuple(shape), difference)
                break

    def _warn(self, index: int, shape: tuple[int, ...], difference: str) -> None:
        global _last_warning
        this = name, _ = _description(self.module), self.backward_pass
        if self.module in _covered:
            return
        _covered.add(self.module)
        if this == _last_warning:
            return
        _last_warning = this
        warnings.warn(
            f"backward does not use what forward computed in the branch {name}: the tensor number {index + 1} that "
            f"autograd saves there, of shape {shape}, has {difference}, so that gradients may be wrong. Rounding is "
            "amplified (channels that are constantly 0 before a BatchNorm and a ReLU do that), or state that PyTorch "
            "does not know changed between forward and backward. Use AdditiveCoupling(..., exact=True), "
            "ReversibleSequential(..., keep_every=1) or keep_input=True, or fill constant channels with values that "
            "vary; memcnn.testing.check_gradients measures the error",
            stacklevel=2,
        )


def drift_of(module: nn.Module) -> Drift | None:
    """Return the watch of an evaluation of the module.

    Return None for a module with ``RReLU`` in training mode: autograd saves its noise before the noise is drawn.
    """
    if any(type(part) is nn.RReLU and part.training for part in module.modules()):
        return None
    return Drift(module)


def read_arrived() -> None:
    """Check the comparisons whose numbers have arrived from the GPU.

    During the capture of a CUDA graph nothing is checked, because asking an event would make the capture fail.
    """
    while arriving and not is_captured(_GPU) and arriving[0].arrived.query():
        drift, what, numbers, _ = arriving.pop(0)
        drift.check(what, numbers)


def _statistics(x: Tensor) -> Tensor | None:
    """Return the norm and the numbers of positive and negative entries of x, shape (3,), on its device.

    Return None for a tensor of one dimension: it is no activation, but a statistic. InstanceNorm, for example, saves
    running means, which are not used and have changed by the time of the recomputation.
    """
    readable = has_fingerprint(x) or not has_values(x)
    if not readable or not x.is_floating_point() or x.dim() < 2 or not x.numel():
        return None
    with torch.no_grad():
        if not has_values(x):  # only the bytes of the operations below count, which are slow on fake tensors
            x.new_empty(max(x.numel() + 16, 24), dtype=torch.uint8)
            return x.new_empty(3, dtype=torch.float32)
        x = x.detach()
        return torch.stack([torch.linalg.vector_norm(x).float(), (x > 0).sum().float(), (x < 0).sum().float()])


def _difference(before: Sequence[float], after: Sequence[float], size: int) -> str:
    """Describe how the statistics differ. Return an empty string if they agree."""
    (norm, positive, negative), (norm_now, positive_now, negative_now) = before, after
    least = LEAST_ROOT_MEAN_SQUARE * size**0.5
    if norm < float("inf") and not abs(norm_now - norm) <= LARGEST_NORM_CHANGE * max(norm, least):  # NaN differs
        return f"a norm of {norm_now:.4g} instead of {norm:.4g}"
    change = abs(positive_now - positive)
    if not negative and not negative_now and change > max(LARGEST_SHARE_CHANGE * size, LARGEST_COUNT_CHANGE):
        return f"{100 * positive_now / size:.1f} % positive entries instead of {100 * positive / size:.1f} %"
    return ""


def _description(module: nn.Module) -> str:
    """Return the class of the module and those of its children."""
    children = [type(child).__name__ for child in module.children()]
    return f"{type(module).__name__}({', '.join(children)})" if children else type(module).__name__
