"""The parts of a peak count each byte once, under the kind of tensor that holds it."""

from dataclasses import asdict

import pytest
import torch
from torch import nn

from memcnn.memory import (
    TensorMeter,
    allocator_total_bytes,
    measure_peak_split,
    predict_step_memory,
    training_step,
)
from properties.support.memory import linear


def test_each_part_is_what_a_count_by_hand_gives():
    size = 4 * (64 * 32 + 32)
    split = predict_step_memory(*linear(), optimizer=torch.optim.Adam)
    assert (split.parameter_bytes, split.gradient_bytes, split.buffer_bytes) == (size, size, 0)
    assert split.optimizer_bytes == 2 * size + 2 * 4  # two moments, and for either parameter a count of steps
    assert split.batch_bytes == 4 * 5 * 64 + 8 * 5
    assert split.phase == "update"
    assert predict_step_memory(*linear(rows=5000)).phase != "update"
    assert predict_step_memory(lambda: nn.BatchNorm1d(64), linear()[1]).buffer_bytes == 2 * 4 * 64 + 8


class Wide(nn.Linear):
    """Needs most memory in its forward pass, and frees it before backward."""

    def forward(self, x):
        return super().forward(x) + x.repeat(1, 99).sum(1, keepdim=True)


def test_gradients_of_the_last_step_are_there_during_the_forward_pass():
    split = predict_step_memory(lambda: Wide(64, 32), linear(rows=50)[1])
    assert split.phase == "forward"
    assert split.gradient_bytes == split.parameter_bytes == 4 * (64 * 32 + 32)
    assert split.activation_bytes >= 4 * 50 * 64 * 99


@pytest.mark.parametrize(("dtype", "size"), [(torch.float64, 8), (torch.float32, 4), (torch.bfloat16, 2)], ids=str)
def test_a_dtype_has_its_size(dtype, size):
    split = predict_step_memory(*linear(dtype))
    assert split.parameter_bytes == split.gradient_bytes == split.optimizer_bytes == size * (64 * 32 + 32)
    assert split.batch_bytes == size * 5 * 64 + 8 * 5


class Leaky(nn.Linear):
    """Keeps every output it ever made."""

    def forward(self, x):
        self.kept = [*getattr(self, "kept", []), super().forward(x).detach().clone()]
        return super().forward(x)


def test_a_leak_shows_among_the_activations():
    batch = linear(rows=500)[1]
    sound, leaky = (predict_step_memory(lambda kind=kind: kind(64, 32), batch) for kind in (nn.Linear, Leaky))
    assert leaky.activation_bytes == sound.activation_bytes + 4 * 500 * 32
    assert {**asdict(leaky), "activation_bytes": 0, "peak_bytes": 0} == {
        **asdict(sound), "activation_bytes": 0, "peak_bytes": 0,
    }  # fmt: skip


def test_a_shared_weight_counts_once():
    def tied():
        first, second = nn.Linear(64, 64), nn.Linear(64, 64)
        second.weight = first.weight
        return nn.Sequential(first, second)

    assert predict_step_memory(tied, linear()[1]).parameter_bytes == 4 * (64 * 64 + 2 * 64)


def test_autocast_stores_activations_in_half():
    def make():
        return nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(8)), nn.Flatten(), nn.Linear(512, 3))

    def batch():
        return torch.ones(400, 8, 8, 8), torch.zeros(400, dtype=torch.int64)

    whole, half = (predict_step_memory(make, batch, autocast=dtype) for dtype in (None, torch.bfloat16))
    assert half.parameter_bytes == whole.parameter_bytes
    assert 0.45 < half.activation_bytes / whole.activation_bytes < 0.7


def test_labels_partition_what_is_counted():
    x = torch.ones(100)
    with TensorMeter() as meter:
        meter.count([x], "x")
        y = x + 1
        assert (meter.current["x"], meter.current[""]) == (400, 400)
        meter.count([y, y[5:]], "y")
        assert (meter.current["x"], meter.current["y"], meter.current[""]) == (400, 400, 0)
        del x, y
        assert meter.current_bytes == sum(meter.current.values()) == 0
    assert (meter.peak_bytes, meter.peak["x"]) == (800, 400)


def test_blocks_round_each_storage_up():
    with TensorMeter(block_bytes=512) as meter:
        held = [torch.empty(size, dtype=torch.uint8) for size in (0, 1, 512, 513)]
        assert meter.current_bytes == 512 + 512 + 1024
    del held


def test_the_allocator_counts_a_model_once_when_its_gradients_are_replaced():
    model = nn.Linear(1000, 1000, bias=False)
    x, weight = torch.ones(1, 1000), 4 * 1000 * 1000

    def step():
        model.zero_grad()
        model(x).sum().backward()

    step()
    total = allocator_total_bytes(step, lambda: [model.weight, model.weight.grad])
    assert 2 * weight <= total < 2.1 * weight
    split = measure_peak_split(model, step, allocator=True)
    assert split.peak_bytes <= split.allocated_bytes < 1.05 * split.peak_bytes
    assert split.reserved_bytes is None

    def accumulate():  # into the gradient that is there
        model(x).sum().backward()

    assert 3 * weight <= allocator_total_bytes(accumulate, lambda: [model.weight, model.weight.grad]) < 3.1 * weight


def test_the_allocator_counts_gradients_of_the_last_step_during_the_forward_pass():
    def batch():
        return torch.ones(100, 1000), torch.zeros(100, dtype=torch.int64)

    model, optimizer, tensors, step = training_step(lambda: Wide(1000, 1000), batch)
    split = measure_peak_split(model, step, optimizer=optimizer, batch=tensors, allocator=True)
    assert split.phase == "forward"
    assert split.peak_bytes <= split.allocated_bytes < 1.1 * split.peak_bytes
