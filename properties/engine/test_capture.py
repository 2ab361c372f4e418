"""While a CUDA graph is captured, a reversible block works as ever or says what it cannot do.

The first tests only say that a graph is captured; those at the end capture one on a GPU.
"""

import copy

import pytest
import torch
from torch import nn

from memcnn import AdditiveCoupling, InvertibleModuleWrapper
from memcnn.engine import capture, replay
from properties.devices import needs_cuda, reproducible_kernels
from properties.support.twin import backward, block, conv_branch, images, plain_twin

DROPOUT = nn.Sequential(nn.Dropout(0.5), nn.Conv2d(3, 3, 1))


@pytest.fixture
def capturing(monkeypatch):
    """Every device is one whose work goes into a graph."""
    for module in (capture, replay):
        monkeypatch.setattr(module, "is_captured", lambda device: True)


def test_no_generator_is_asked_in_a_capture_and_gradients_are_the_twins(capturing, monkeypatch):
    def forbidden(*_):
        raise RuntimeError("Cannot call CUDAGeneratorImpl::current_seed during CUDA graph capture")

    monkeypatch.setattr(replay, "rng_state", forbidden)
    module = block(lambda: nn.Sequential(conv_branch(), nn.GELU(approximate="tanh")))
    twin = plain_twin(module)
    for one in (module, twin):
        backward(one, images())
    for p, q in zip(module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_a_branch_that_draws_random_numbers_is_refused_in_a_capture(capturing):
    module = InvertibleModuleWrapper(AdditiveCoupling(DROPOUT, conv_branch())).double()
    with pytest.raises(RuntimeError, match="Sequential draws random numbers .*disable=True"):
        module(images())
    plain_twin(module)(images())
    InvertibleModuleWrapper(AdditiveCoupling(DROPOUT, conv_branch()), preserve_rng_state=False).double()(images())


@pytest.mark.parametrize(
    ("exact", "check_inverse", "fix"), [(True, None, "use exact=False"), (False, 1e-3, "leave it out there")]
)
def test_checks_that_read_values_are_refused_in_a_capture(capturing, exact, check_inverse, fix):
    coupling = AdditiveCoupling(conv_branch(), conv_branch(), exact=exact)
    module = InvertibleModuleWrapper(coupling, check_inverse=check_inverse).double()
    with pytest.raises(RuntimeError, match=f"impossible while a CUDA graph is captured: {fix}"):
        backward(module, images())


def step(module: nn.Module, x: torch.Tensor) -> None:
    """Run a training step that copies nothing to the GPU, which a capture forbids."""
    module(x).sin().square().sum().backward()


def captured_step(module: nn.Module, x: torch.Tensor) -> torch.cuda.CUDAGraph:
    """Capture a training step of ``module`` on ``x``, after three warm-up steps on a stream of their own."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(module, x)
    torch.cuda.current_stream().wait_stream(stream)
    module.zero_grad()
    x.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(module, x)
    return graph


@needs_cuda
@pytest.mark.parametrize("seed", [0, 1])
def test_a_graph_captured_on_a_gpu_computes_the_twins_gradients_of_any_input(seed):
    module = nn.Sequential(block(), block()).cuda()
    twin = plain_twin(module)
    x = images(requires_grad=False).cuda().requires_grad_()
    other = images(seed=seed, requires_grad=False).cuda().requires_grad_()
    with reproducible_kernels():
        graph = captured_step(module, x)
        with torch.no_grad():
            x.copy_(other)
        graph.replay()
        step(twin, other)
    torch.testing.assert_close(x.grad, other.grad)
    for p, q in zip(module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@needs_cuda
def test_dropout_is_refused_when_a_gpu_captures():
    dropout = copy.deepcopy(DROPOUT)
    module = InvertibleModuleWrapper(AdditiveCoupling(conv_branch(), dropout)).double().cuda()
    x = images(requires_grad=False).cuda().requires_grad_()
    with pytest.raises(RuntimeError, match="Sequential draws random numbers .*disable=True"):
        captured_step(module, x)
    step(module, x)
    assert x.grad.isfinite().all()
