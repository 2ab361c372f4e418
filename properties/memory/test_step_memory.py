"""The memory of a training step equals a count by hand, separates activations, and is measured without side effects."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._subclasses import FakeTensorMode

from memcnn.memory import CUDA_BLOCK_BYTES, allocator_peak_bytes, measure_step_memory, tensor_peak_bytes
from properties.devices import needs_cuda, rng_state


@given(depth=st.integers(1, 5), width=st.integers(1, 6), side=st.integers(4, 12))
def test_a_plain_convolution_chain_needs_the_bytes_counted_by_hand(device, depth, width, side):
    model = nn.Sequential(*(nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(depth))).to(device)
    x = torch.ones(2, width, side, side, device=device)
    activation, weight = x.nbytes, model[0].weight.nbytes
    # The worst instant is the backward pass of the last layer (of the first, if it is the only one: its input needs no
    # gradient). It holds the outputs of all layers but the last, the gradient of its input, the gradient of its weight,
    # and the loss with its gradient; or else it is the end of the forward pass: all outputs, and the loss.
    backward = depth * activation + weight + 8 if depth > 1 else weight + 8
    expected = max(backward, depth * activation + 4)

    memory = measure_step_memory(model, lambda: model(x).sum().backward(), meter=tensor_peak_bytes)

    assert memory.activation_bytes == expected
    assert memory.parameter_bytes == depth * weight
    assert memory.peak_bytes == 2 * depth * weight + expected


def network() -> nn.Module:
    branch = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5))
    return nn.Sequential(branch, nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8 * 4 * 4, 5))


def network_memory(device: str):
    model = network().to(device) if device == "meta" else network()
    x = torch.ones(4, 3, 8, 8, device=device)
    return measure_step_memory(model, lambda: model(x).square().mean().backward())


def test_meta_and_fake_tensors_predict_the_bytes_of_real_ones():
    real = network_memory("cpu")
    assert network_memory("meta") == real
    with FakeTensorMode():
        assert network_memory("cpu") == real


def test_gradients_and_buffers_count_as_resident_not_as_activations(device):
    model = nn.BatchNorm2d(3, device=device)  # weight, bias; two statistics and an int64 counter
    model.bias.requires_grad_(False)
    memory = measure_step_memory(model, lambda: None)
    assert (memory.parameter_bytes, memory.activation_bytes) == (2 * 3 * 4, 0)
    assert memory.peak_bytes == memory.parameter_bytes + 3 * 4 + (2 * 3 * 4 + 8)


def test_the_allocator_counts_at_least_the_tensors_of_a_step(device):
    model = network().to(device)
    x = torch.ones(4, 3, 8, 8, device=device)

    def step():
        model(x).square().mean().backward()

    tensors = measure_step_memory(model, step, meter=tensor_peak_bytes)
    allocated = measure_step_memory(model, step, meter=partial(allocator_peak_bytes, device=device))
    assert allocated.activation_bytes >= tensors.activation_bytes
    assert allocated.peak_bytes - allocated.activation_bytes == tensors.peak_bytes - tensors.activation_bytes


@pytest.mark.usefixtures("on_device")
def test_measuring_a_step_leaves_gradients_and_random_numbers_as_they_were(device):
    model = network()
    gradient = torch.ones_like(model[3].bias)
    model[3].bias.grad = gradient
    model[3].weight.requires_grad_(False)
    seen = []

    def step():
        seen.append([p.grad is None for p in model.parameters()])
        model(torch.ones(4, 3, 8, 8)).sum().backward()

    state = rng_state()
    measure_step_memory(model, step)
    assert torch.equal(rng_state(), state)
    runs = 2 if device == "cuda" else 1  # the first makes the libraries' handles and workspaces
    assert seen == [[not p.requires_grad for p in model.parameters()]] * runs
    assert model[3].bias.grad is gradient and torch.equal(gradient, torch.ones(5))
    assert all(p.grad is None for p in model.parameters() if p is not model[3].bias)


@needs_cuda
@pytest.mark.parametrize("rows", [64, 640])
def test_on_cuda_a_steps_allocated_bytes_are_those_of_its_tensors(rows):
    model = nn.Linear(256, 256, device="cuda")
    x = torch.ones(rows, 256, device="cuda")

    def step():
        model(x).square().sum().backward()

    tensors = measure_step_memory(model, step, meter=tensor_peak_bytes)
    allocated = measure_step_memory(model, step)
    slack = 64 * CUDA_BLOCK_BYTES  # less than the smallest map
    assert tensors.activation_bytes <= allocated.activation_bytes <= tensors.activation_bytes + slack
    assert allocated.parameter_bytes == tensors.parameter_bytes == 4 * (256 * 256 + 256)


@needs_cuda
def test_on_cuda_the_allocator_counts_what_a_product_copies():
    """The gradient of a sum repeats one number with a stride of 0, which cuBLAS does not take."""
    model = nn.Linear(256, 256, device="cuda")
    x = torch.ones(64, 256, device="cuda")
    memory = measure_step_memory(model, lambda: model(x).sum().backward())
    copy, gradient, loss = 4 * 64 * 256, 4 * 256 * 256, 512
    assert copy + gradient <= memory.activation_bytes <= copy + gradient + 64 * loss
