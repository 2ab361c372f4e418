"""Choose the fastest kernel for each shape, by timing: that of the library (PyTorch) or a plan of ours.

A plan is a division of the work of one of our kernels. The rules:

1. A shape is measured the first time that an operation is computed for it on real tensors, unless a CUDA graph is being
   captured on the current stream. Until then the library computes it.
2. A plan is chosen only if it ran, agreed with the library, and took at most ``MOST_OF_LIBRARY`` of its time.
3. If the caller asks for deterministic algorithms, the library computes everything. Each plan is deterministic, but
   the choice between them depends on a clock.
4. Choices are kept for the life of the process. All threads share them, and one thread measures at a time. Other
   threads must not capture a CUDA graph meanwhile: measuring allocates memory and waits for the GPU.
"""

import math
import statistics
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from memcnn.attribution import warn_user

LIBRARY = "library"
MOST_OF_LIBRARY = 0.95  # a smaller gain is within the noise of the measurement
AGREEMENT = 0.01  # largest relative difference to the library's result, as norms; bfloat16 rounds to 0.004
ROUNDS, CALLS = 5, 10
FACTORS = (5**0.5 - 1) / 2, 2**0.5 - 1  # one for each of the two tensors, see _filled
PERIOD = 1_000_003  # values before they repeat; a prime, so that no two images are equal
ALL_PLANS = "all plans"
SLEEP_CYCLES, MOST_SLEEP_CYCLES = 2_000_000, 64_000_000  # 1 and 32 ms on an H100

Timer = Callable[[Mapping[str, Callable[[], object]]], dict[str, float]]


Plan = TypeVar("Plan")  # our kernels' plans; ``str`` gives a plan's name


@dataclass(frozen=True)
class Operation(Generic[Plan]):
    """A function of two tensors, dense in channels_last, that the library and one of our kernels can compute.

    Args:
        name: the name of the result.
        library: computes it by PyTorch; the result is dense in channels_last.
        planned: computes it by our kernel, with a plan.
        plans: returns the plans to measure for two shapes. Raises ImportError where Triton cannot be imported.
    """

    name: str
    library: Callable[[Tensor, Tensor], Tensor]
    planned: Callable[[Tensor, Tensor, Plan], Tensor]
    plans: Callable[[torch.Size, torch.Size], tuple[Plan, ...]]


class Key(NamedTuple):
    """The properties that a choice depends on. Tensors are dense in channels_last, so shapes fix the strides."""

    operation: str
    device: torch.device
    dtype: torch.dtype
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    library_benchmark: bool  # torch.backends.cudnn.benchmark: the library may be faster with it


@dataclass(frozen=True)
class Measurement:
    """The measurements and the choice for one operation and its shapes.

    Args:
        operation: the name of the result: "output", "input gradient" or "weight gradient".
        device: name of the GPU, or ``cpu``.
        dtype: the dtype of the operation's tensors.
        shapes: the shapes of the operation's two tensors.
        library_benchmark: whether cuDNN was free to choose its algorithm by measurement.
        microseconds: time of the operation by the name of the plan; ``library`` is PyTorch's own time.
        rejected: for each plan that failed or disagreed with the library, the reason. The key ``all plans`` means that
            no plan could be tried.
        chosen: the name of the choice by rule 2, which is used from now on.
    """

    operation: str
    device: str
    dtype: str
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    library_benchmark: bool
    microseconds: dict[str, float]
    rejected: dict[str, str] = field(default_factory=dict)
    chosen: str = LIBRARY


class Choices:
    """The choices made so far, for each operation and shape.

    Args:
        timer: returns the microseconds of each function in a dictionary. By default, ``gpu_microseconds``.
    """

    def __init__(self, timer: Timer | None = None) -> None:
        self.timer = timer or gpu_microseconds
        self.lock = threading.Lock()
        self.found: dict[Key, tuple[Any, Measurement]] = {}  # a plan, or None for the library

    def plan(self, operation: Operation[Plan], first: Tensor, second: Tensor) -> Plan | None:
        """Return the plan for tensors like these, or ``None`` for the library. Measure if the rules allow it."""
        if torch.backends.cudnn.deterministic or torch.are_deterministic_algorithms_enabled():
            return None
        shapes = tuple(first.shape), tuple(second.shape)
        key = Key(operation.name, first.device, first.dtype, shapes, torch.backends.cudnn.benchmark)
        if key not in self.found:
            if first.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                return None
            rejected: Mapping[str, str] = {}
            with self.lock:
                if key not in self.found:
                    self.found[key] = self._measure(operation, key)
                    rejected = self.found[key][1].rejected
            if rejected:  # warn after the lock is released: code that handles the warning may need a choice
                warn_user(_rejection_message(key, rejected), RuntimeWarning)
        return self.found[key][0]

    def measured(self) -> list[Measurement]:
        """Return the measurements, in their order."""
        return [measurement for _, measurement in list(self.found.values())]

    def _measure(self, operation: Operation[Plan], key: Key) -> tuple[Plan | None, Measurement]:
        """Check and time the plans for a shape; return the chosen one, None for the library, and the measurement."""
        by_name: dict[str, Plan] = {}
        rejected: dict[str, str] = {}
        microseconds: dict[str, float] = {}
        try:
            first, second = (_filled(shape, key, factor) for shape, factor in zip(key.shapes, FACTORS, strict=True))
            expected = operation.library(first, second)
            runs: dict[str, Callable[[], Tensor]] = {LIBRARY: lambda: operation.library(first, second)}
            for plan in operation.plans(first.shape, second.shape):
                try:
                    _check_agreement(operation.planned(first, second, plan), expected)
                except Exception as error:  # whatever a compiler or a driver raises: the library remains
                    rejected[str(plan)] = f"{type(error).__name__}: {error}"
                    continue
                by_name[str(plan)] = plan
                runs[str(plan)] = partial(operation.planned, first, second, plan)
            with torch.cuda.device(key.device) if key.device.type == "cuda" else nullcontext():
                microseconds = self.timer(runs) if by_name else {}
        except (ImportError, torch.OutOfMemoryError) as error:  # no Triton, or too little memory: the library stays
            by_name, rejected = {}, {ALL_PLANS: f"{type(error).__name__}: {error}"}
        chosen = fastest(microseconds)
        device = torch.cuda.get_device_name(key.device) if key.device.type == "cuda" else str(key.device)
        dtype = str(key.dtype).removeprefix("torch.")
        measurement = Measurement(key.operation, device, dtype, *key[3:], microseconds, rejected, chosen)
        return by_name.get(chosen), measurement


def _filled(shape: tuple[int, ...], key: Key, factor: float) -> Tensor:
    """Return a tensor in channels_last of values between -0.5 and 0.5: the fractions of factor * i * i, repeated.

    Random numbers cannot be drawn while a gradient is batched by vmap.
    """
    n, c, height, width = shape
    index = torch.arange(PERIOD, dtype=torch.float64, device=key.device)
    values = index.square_().mul_(factor).frac_().sub_(0.5).to(key.dtype)
    size = math.prod(shape)
    return values.repeat(-(-size // PERIOD))[:size].view(n, height, width, c).permute(0, 3, 1, 2)


def fastest(microseconds: Mapping[str, float]) -> str:
    """Return the name of the fastest plan if it beats the library by the margin of rule 2, else ``LIBRARY``."""
    ours = {name: time for name, time in microseconds.items() if name != LIBRARY}
    best = min(ours, key=ours.__getitem__, default=LIBRARY)
    return best if ours and ours[best] <= MOST_OF_LIBRARY * microseconds[LIBRARY] else LIBRARY


def gpu_microseconds(runs: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Return the microseconds of each function on the current GPU: the median of rounds in which they take turns.

    The GPU sleeps while the calls are queued, so the time that Python needs to launch a kernel is not measured: a CUDA
    graph does not need it either. Inputs stay in the L2 cache if they fit, for all functions alike.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    if not torch.cuda.is_available():
        raise RuntimeError("gpu_microseconds needs a CUDA device, and there is none: pass Choices a timer of your own")
    for _ in range(ROUNDS):
        for name, run in runs.items():
            times[name].append(_microseconds(run))
    return {name: statistics.median(values) for name, values in times.items()}


def _microseconds(run: Callable[[], object]) -> float:
    """Return the microseconds of a call on the current GPU, as the mean of ``CALLS`` queued calls."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    cycles = SLEEP_CYCLES
    while True:
        torch.cuda._sleep(cycles)  # private, but PyTorch's own tests use it; no public kernel takes a given time
        start.record()
        for _ in range(CALLS):
            run()
        end.record()
        starved = start.query()  # the GPU woke up before the last call was queued
        end.synchronize()
        if not starved or cycles >= MOST_SLEEP_CYCLES:
            return 1e3 * start.elapsed_time(end) / CALLS
        cycles *= 2


def _check_agreement(result: Tensor, expected: Tensor) -> None:
    """Raise an ArithmeticError if the result differs from the library's by more than ``AGREEMENT``."""
    difference, size = (tensor.norm().item() for tensor in (result.float() - expected.float(), expected.float()))
    if not difference <= AGREEMENT * size:
        raise ArithmeticError(f"differs from the library's result by {difference / size:.1e} of its norm")


def _rejection_message(key: Key, rejected: Mapping[str, str]) -> str:
    """Return the warning about plans that failed, or about a kernel that could not be tried."""
    plan, reason = next(iter(rejected.items()))
    about = f"for the {key.operation} of shapes {key.shapes[0]} and {key.shapes[1]}, {key.dtype} on {key.device}"
    if plan == ALL_PLANS:
        return f"Our kernel {about} could not be tried. Training continues with PyTorch's. {reason}"
    return f"{len(rejected)} plans {about} failed. Training continues without them. The first: {plan}: {reason}"


_current = Choices()


def current() -> Choices:
    """Return the choices in use."""
    return _current


def measured() -> list[Measurement]:
    """Return the measurements of this process, one for each operation and shape."""
    return _current.measured()


@contextmanager
def choosing(choices: Choices) -> Iterator[Choices]:
    """Use ``choices`` in all threads within this context. For tests and benchmarks."""
    global _current
    before, _current = _current, choices
    try:
        yield choices
    finally:
        _current = before
