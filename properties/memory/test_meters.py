"""The memory meters count the bytes of known programs of allocations, and planted leaks."""

import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from memcnn.memory import (
    CUDA_BLOCK_BYTES,
    TensorMeter,
    allocator_peak_bytes,
    allocator_total_bytes,
    in_blocks,
    measure_step_memory,
    tensor_peak_bytes,
)
from properties.devices import needs_cuda


@dataclass(frozen=True)
class Meter:
    """A meter, the device whose memory it measures, and the bytes of the blocks that it counts in."""

    peak_bytes: Callable[[Callable[[], object]], int]
    device: str = "cpu"
    block_bytes: int = 1

    def sum(self, *sizes: int) -> int:
        """Return the bytes that it counts for storages of these sizes."""
        return sum(in_blocks(size, self.block_bytes) for size in sizes)


TENSORS, ALLOCATOR = Meter(tensor_peak_bytes), Meter(allocator_peak_bytes)
CUDA_TENSORS = Meter(tensor_peak_bytes, "cuda")
CUDA_ALLOCATOR = Meter(partial(allocator_peak_bytes, device="cuda"), "cuda", CUDA_BLOCK_BYTES)
both_meters = pytest.mark.parametrize(
    "meter",
    [
        pytest.param(TENSORS, id="tensors"),
        pytest.param(ALLOCATOR, id="allocator"),
        pytest.param(CUDA_TENSORS, id="tensors on cuda", marks=needs_cuda),
        pytest.param(CUDA_ALLOCATOR, id="allocator on cuda", marks=needs_cuda),
    ],
)


def block(size: int, device: str = "cpu") -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8, device=device)


# A program is a list of instructions: a positive number allocates that many bytes, a negative one frees a block.
programs = st.lists(st.one_of(st.integers(1, 10_000), st.integers(-10, -1)), max_size=30)


@both_meters
@given(program=programs)
def test_the_peak_of_a_program_of_allocations_is_its_highest_sum(meter, program):
    sizes, expected = [], 0
    for instruction in program:
        if instruction > 0:
            sizes.append(instruction)
        elif sizes:
            del sizes[instruction % len(sizes)]
        expected = max(expected, meter.sum(*sizes))

    def run():
        held = []
        for instruction in program:
            if instruction > 0:
                held.append(block(instruction, meter.device))
            elif held:
                del held[instruction % len(held)]

    assert meter.peak_bytes(run) == expected


@both_meters
def test_views_and_in_place_operations_count_zero(meter):
    def run():
        x = torch.ones(1000, device=meter.device)
        views = [x.view(10, 100).t(), x[5:], x.expand(3, 1000), x.detach()]
        x.mul_(x).add_(x)
        torch.relu_(x)
        views[1].zero_()

    assert meter.peak_bytes(run) == meter.sum(4000)


@both_meters
def test_a_view_keeps_its_whole_storage_alive(meter):
    def run():
        view = block(5000, meter.device)[:1]
        block(300, meter.device)
        del view

    assert meter.peak_bytes(run) == meter.sum(5000, 300)


def test_a_meter_for_one_type_of_device_counts_only_tensors_on_it():
    with TensorMeter(device_type="meta") as meter:
        held = torch.empty(25, device="meta"), torch.empty(10), torch.empty(5, device="meta")
        meter.count([torch.empty(3)], "other")
    assert (meter.current_bytes, meter.peak["other"]) == (120, 0)
    del held
    assert meter.current_bytes == 0


def test_a_freed_tensor_is_no_longer_counted():
    with TensorMeter() as meter:
        x = block(1000)
        assert meter.current_bytes == 1000
        del x
        assert meter.current_bytes == 0
        y = block(400)
        assert (meter.current_bytes, meter.peak_bytes) == (400, 1000)
    del y
    assert meter.current_bytes == 0


@both_meters
@given(steps=st.integers(1, 10))
def test_a_planted_leak_adds_its_bytes_for_every_step(meter, steps):
    def run(leak):
        for _ in range(steps):
            x = block(1000, meter.device)
            leak.append(x[:0])  # an empty view, which keeps the whole storage alive

    class Sieve(list):
        def append(self, _):
            pass

    assert meter.peak_bytes(lambda: run([])) == meter.sum(*[1000] * steps)
    # the old x is alive while the new one is made
    assert meter.peak_bytes(lambda: run(Sieve())) == meter.sum(*[1000] * min(steps, 2))


@both_meters
def test_tensors_that_exist_at_entry_are_not_counted_even_when_freed(meter):
    held = [block(7000, meter.device)]
    # the profiler of this measurement has seen only the second
    meter.peak_bytes(lambda: held.append(block(6000, meter.device)))

    def run():
        held[0].add_(held[0])
        view = held[0][3:]
        held.clear()
        del view
        block(500, meter.device)

    if meter is CUDA_ALLOCATOR:  # its counters do not tell allocations apart: freed bytes make room for new ones
        assert meter.peak_bytes(run) == 0
    else:
        assert meter.peak_bytes(run) == 500


class WastefulIdentity(torch.autograd.Function):
    """The identity, with two temporaries of 100,000 bytes and their sum in its backward pass."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        total = torch.zeros(25_000, device=gradient.device) + torch.zeros(25_000, device=gradient.device)
        del total
        return gradient


@both_meters
def test_a_peak_inside_the_backward_pass_is_seen(meter):
    x = torch.ones(10, requires_grad=True, device=meter.device)

    def run():
        WastefulIdentity.apply(x).sum().backward()

    x.grad = torch.zeros_like(x)
    assert meter.peak_bytes(run) == meter.sum(*[100_000] * 3, 4, 4)  # the loss and its gradient are one float32 each


@both_meters
def test_a_result_that_grows_is_counted(meter):
    x = torch.ones(1000, device=meter.device)
    assert meter.peak_bytes(lambda: torch.add(x, x, out=torch.empty(0, device=meter.device))) == meter.sum(4000)


@both_meters
def test_tensors_made_from_numbers_are_counted(meter):
    if meter is CUDA_TENSORS:
        pytest.skip("PyTorch puts the numbers into a tensor on the CPU first, which this meter may or may not see")
    assert meter.peak_bytes(lambda: torch.tensor([1.0] * 50, device=meter.device)) == meter.sum(200)


def test_only_the_allocator_sees_a_storage_emptied_by_hand():
    def run():
        x = block(1000)
        x.untyped_storage().resize_(0)
        block(900)

    assert allocator_peak_bytes(run) == 1000
    assert tensor_peak_bytes(run) == 1900


@given(
    operations=st.lists(st.sampled_from(["tanh", "exp", "square", "matmul", "skip"]), min_size=1, max_size=8),
    rows=st.integers(1, 40),
)
def test_both_meters_agree_where_kernels_use_no_scratch(operations, rows):
    weight = torch.full((16, 16), 0.01, requires_grad=True)
    weight.grad = torch.zeros_like(weight)
    x = torch.full((rows, 16), 0.5)

    def step():
        y = x * weight[0]
        for operation in operations:
            if operation == "matmul":
                y = y @ weight
            elif operation == "skip":
                y = y + y.sigmoid() * y  # three gradients of y meet
            else:
                y = getattr(torch, operation)(y)
        (y * y).sum().backward()

    assert tensor_peak_bytes(step) == allocator_peak_bytes(step)


@both_meters
def test_an_exception_passes_through_and_leaves_no_trace(meter):
    model = nn.Linear(3, 3, device=meter.device)

    def step():
        block(1000, meter.device)
        raise KeyError("planted")

    with pytest.raises(KeyError, match="planted"):
        measure_step_memory(model, step, meter=meter.peak_bytes)
    assert model.weight.grad is None
    assert meter.peak_bytes(lambda: block(10, meter.device)) == meter.sum(10)


def test_nested_tensor_meters_each_count_from_their_own_entry():
    with TensorMeter() as outer:
        x = block(1000)
        inner = tensor_peak_bytes(lambda: (x + 1, block(50)))
    assert inner == 1050
    assert outer.peak_bytes == 2050


def test_the_allocator_meter_refuses_a_running_profiler_and_other_devices():
    with pytest.raises(RuntimeError, match="profiler is already running"):
        allocator_peak_bytes(lambda: allocator_peak_bytes(lambda: None))
    with pytest.raises(ValueError, match="no allocator meter for device 'meta'"):
        allocator_peak_bytes(lambda: None, device="meta")
    with pytest.raises(ValueError, match="no allocator meter for device 'meta'"):
        allocator_total_bytes(lambda: None, list, device="meta")


def test_garbage_that_exists_at_entry_does_not_lower_the_count(monkeypatch):
    """CUDA's allocator is simulated. The measured function frees 700 bytes that a reference cycle holds."""
    allocated, peak = 700, 0

    def allocate(size: int) -> None:
        nonlocal allocated, peak
        allocated += size
        peak = max(peak, allocated)

    def reset_peak(device: torch.device) -> None:
        nonlocal peak
        peak = allocated

    class Cycle:
        pass

    garbage = Cycle()
    garbage.itself = garbage
    weakref.finalize(garbage, allocate, -700)
    del garbage
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(synchronize=lambda: None))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset_peak)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: allocated)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peak)
    assert allocator_peak_bytes(lambda: (gc.collect(), allocate(1000)), device="cuda") == 1000
