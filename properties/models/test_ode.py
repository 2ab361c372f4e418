"""Reversible solvers compute the published methods, have second order, and are invertible."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from memcnn.models.ode import Leapfrog, ReversibleHeun
from memcnn.testing.tolerances import relative_error, tolerance
from properties.support.reference import assert_flat_in_depth, assert_laws
from properties.support.twin import assert_like_twin, backward, data

SOLVERS = [ReversibleHeun, Leapfrog]


class Field(nn.Module):
    """A small network of time and state."""

    def __init__(self, width: int = 3):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, 8), nn.Tanh(), nn.Linear(8, width))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.cos(t) * self.net(y)


class Pendulum(nn.Module):
    """The equation x'' = -x, as a system of first order: (x, v)' = (v, -x)."""

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return -y if y.shape[1] == 1 else torch.stack((y[:, 1], -y[:, 0]), 1)


@settings(max_examples=2)
@given(st.sampled_from(SOLVERS), st.integers(1, 3), st.integers(0, 2**16))
def test_the_blocks_meet_the_laws(solver, steps, seed):
    torch.manual_seed(seed)
    assert_laws(solver(Field(), steps).blocks, torch.randn(4, 6), seed=seed)


@pytest.mark.parametrize("solver", SOLVERS)
def test_it_trains_as_its_twin_and_through_the_inverse(solver):
    net = solver(Field(), 5, (1.0, 0.2)).double()

    def backward_in_time(module, y, other):
        first = module.inverse(y, other)
        (first[0].square().sum() + first[1].sum()).backward()
        return first[0]

    def forward(module, y):
        y = module(y)
        y = y[0] if isinstance(y, tuple) else y
        y.square().sum().backward()
        return y

    for program, inputs in ((forward, [data(4, 3)]), (backward_in_time, [data(4, 3), data(4, 3)])):
        net.zero_grad()
        assert_like_twin(net, program, *inputs, depth=12)


@settings(max_examples=5)
@given(st.integers(1, 6), st.floats(-1, 1), st.floats(0.1, 2), st.integers(0, 2**16))
def test_it_computes_the_reversible_heun_method_of_the_paper(steps, start, length, seed):
    torch.manual_seed(seed)
    f, y, h = Field().double(), data(4, 3), length / steps
    with torch.no_grad():
        got = ReversibleHeun(f, steps, (start, start + length)).solve(y)
        y_hat = y
        for n in range(steps):
            t, later = (torch.tensor(start + (n + i) * h, dtype=torch.float64) for i in (0, 1))
            following = 2 * y - y_hat + h * f(t, y_hat)
            y, y_hat = y + h / 2 * (f(t, y_hat) + f(later, following)), following
    for actual, expected in zip(got, (y, y_hat), strict=True):
        assert relative_error(actual, expected) <= tolerance(torch.float64, depth=2 * steps)


@settings(max_examples=5)
@given(st.integers(1, 6), st.integers(0, 2**16))
def test_it_computes_kick_drift_kick(steps, seed):
    torch.manual_seed(seed)
    f, x, v, h = Field().double(), data(4, 3), torch.ones(4, 3, dtype=torch.float64), 1 / steps
    with torch.no_grad():
        got = Leapfrog(f, steps)(x, v)
        for n in range(steps):
            t, later = (torch.tensor((n + i) * h, dtype=torch.float64) for i in (0, 1))
            v = v + h / 2 * f(t, x)
            x = x + h * v
            v = v + h / 2 * f(later, x)
    for actual, expected in zip(got, (x, v), strict=True):
        assert relative_error(actual, expected) <= tolerance(torch.float64, depth=2 * steps)


def error_on_a_pendulum(solver: type, steps: int) -> float:
    """Return the error of the position after one unit of time."""
    x = torch.ones(1, 1, dtype=torch.float64)
    start = x if solver is Leapfrog else torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    with torch.no_grad():
        y = solver(Pendulum(), steps)(start)
    return abs((y[0] if solver is Leapfrog else y).flatten()[0].item() - math.cos(1))


@pytest.mark.parametrize("solver", SOLVERS)
def test_half_the_step_has_a_quarter_of_the_error(solver):
    assert error_on_a_pendulum(solver, 20) / error_on_a_pendulum(solver, 40) == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize("solver", SOLVERS)
def test_many_steps_are_inverted(solver):
    net, y = solver(Field(), 100).double(), data(4, 3)
    with torch.no_grad():
        last = net.solve(y) if solver is ReversibleHeun else net(y)
        first = net.inverse(*last)
    assert relative_error(first[0], y) <= tolerance(torch.float64, depth=100)


def test_f_is_evaluated_once_a_step_and_once_more():
    calls = []
    f = Field()
    f.register_forward_hook(lambda *_: calls.append(1))
    net = ReversibleHeun(f, 7)
    with torch.no_grad():
        net(data(2, 3, dtype=torch.float32))
    assert len(calls) == 8
    assert len(list(net.parameters())) == 4, "all steps share f"


@pytest.mark.parametrize("solver", SOLVERS)
def test_memory_is_flat_in_depth(solver):
    def make(depth: int) -> nn.Module:
        return solver(Field(8), depth).blocks

    assert_flat_in_depth(make, torch.randn(16, 16))


def test_state_can_be_an_image():
    class OfImages(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 3, padding=1)

        def forward(self, t, y):
            return self.conv(y).tanh()

    net = ReversibleHeun(OfImages().double(), 3)
    assert assert_like_twin(net, backward, data(2, 2, 4, 4), depth=8).results[0].shape == (2, 2, 4, 4)


@pytest.mark.parametrize("steps", [0, -1, 2.0])
def test_a_bad_number_of_steps_is_refused(steps):
    with pytest.raises(ValueError, match=f"steps must be a whole number of at least 1: got {steps}"):
        ReversibleHeun(Field(), steps)
