"""The momentum network: it computes the paper's recursion, and only exact mode inverts it at any depth."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from memcnn.models.momentum import MomentumNet, momentum_resnet
from memcnn.models.resnet import basic_branch
from memcnn.testing import check_all
from memcnn.testing.laws.twin import plain_twin, run
from memcnn.testing.tolerances import relative_error, tolerance
from properties.support.reference import FINGERPRINTS, assert_flat_in_depth, assert_laws
from properties.support.twin import assert_like_twin, backward, data


def branch(width: int = 4) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))


def small(depth: int, width: int = 4, **options) -> MomentumNet:
    return MomentumNet(*(branch(width) for _ in range(depth)), **options)


@settings(max_examples=2)
@given(st.integers(1, 3), st.floats(0.5, 0.95), st.booleans(), st.integers(0, 2**16))
def test_the_blocks_meet_the_laws(depth, gamma, exact, seed):
    torch.manual_seed(seed)
    net = small(depth, gamma=gamma, exact=exact)
    assert_laws(net.blocks, torch.randn(3, 8), seed=seed, finite_differences=not exact)


@settings(max_examples=5)
@given(st.integers(1, 6), st.floats(0.3, 0.99), st.integers(0, 2**16))
def test_it_computes_the_recursion_of_the_paper(depth, gamma, seed):
    torch.manual_seed(seed)
    functions = [branch().double() for _ in range(depth)]
    x, v = data(3, 4), torch.zeros(3, 4, dtype=torch.float64)
    with torch.no_grad():
        got = MomentumNet(*functions, gamma=gamma, exact=False).with_velocity(x)
        for f in functions:
            v = gamma * v + (1 - gamma) * f(x)
            x = x + v
    for actual, expected in zip(got, (x, v), strict=True):
        assert relative_error(actual, expected) <= tolerance(torch.float64, depth=depth)


def test_exact_mode_inverts_every_bit_where_rounding_would_grow_beyond_the_values():
    torch.manual_seed(0)
    functions, x = [branch() for _ in range(60)], torch.randint(-999, 999, (5, 4)) / 1024
    errors = {}
    for exact in (False, True):
        net = MomentumNet(*functions, gamma=0.85, exact=exact)
        streams = torch.cat((torch.zeros_like(x), x), 1)
        with torch.no_grad():
            back = net.blocks.inverse(net.blocks(streams))
        errors[exact] = (back - streams).abs().max().item()
    assert errors[True] == 0
    assert errors[False] > 1e-3  # 0.85**-60 is 17,000


def test_state_and_velocity_come_back():
    net, x = small(4, exact=False).double(), data(2, 4)
    with torch.no_grad():
        first = net.inverse(*net.with_velocity(x, torch.ones_like(x)))
    for actual, expected in zip(first, (x, torch.ones_like(x)), strict=True):
        assert relative_error(actual, expected) <= tolerance(torch.float64, depth=4)


def test_under_autocast_both_directions_keep_state_and_velocity_in_float32():
    net, x = small(4, exact=True), data(2, 4).float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        last, velocity = (values.bfloat16() for values in net.with_velocity(x))
        first = net.inverse(last, velocity)
    assert [values.dtype for values in first] == 2 * [torch.float32]


def test_exact_gradients_are_those_of_stored_activations_and_others_are_not():
    errors = {}
    for exact in (True, False):
        torch.manual_seed(2)
        net, x = small(60, gamma=0.85, exact=exact), torch.randn(5, 4)
        got, wanted = (run(module, backward, [x]).parameter_gradients for module in (net, plain_twin(net)))
        errors[exact] = max(relative_error(got[name], wanted[name]) for name in wanted)
    assert errors[True] == 0
    assert errors[False] > 1e-4


def test_inversion_is_exact_on_every_grid_and_a_finer_grid_is_nearer_to_the_unrounded_network():
    """With smooth functions the error comes from the grid: a grid 16 times as fine has a sixteenth of the error."""

    x = data(64, 4)

    def gradients(exact, kind=lambda net: net, dtype=torch.float32):
        torch.manual_seed(0)
        return run(kind(small(8, exact=exact)).to(dtype), backward, [x.to(dtype)]).parameter_gradients

    unrounded, errors = gradients(False, plain_twin, torch.float64), []
    for step in (2.0**-8, 2.0**-12, 2.0**-16):
        got, stored = gradients(step), gradients(step, plain_twin)
        assert all(torch.equal(got[name], stored[name]) for name in stored), step
        errors.append(max(_norm_of_error(got[name], g) for name, g in unrounded.items()))
    for coarse, fine in pairwise(errors):
        assert 8 < coarse / fine < 32, errors


def test_rounding_to_the_next_multiple_under_other_strides_is_not_called_wrong():
    """The kernel for other strides rounds differently, so a value may be rounded to the next multiple of the grid."""
    torch.manual_seed(2)
    net = MomentumNet(*(basic_branch(8, 8) for _ in range(8)), gamma=0.5)
    report = check_all(net.blocks, torch.randn(2, 16, 8, 8), laws=["inverse"], wrap=False, deepest=0)
    (strides,) = (result for result in report if "strides" in result.claim)
    assert report.passed and strides.error > tolerance(torch.float32, depth=8), str(report)


def _norm_of_error(actual, expected) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


def test_the_whole_network_trains_as_its_twin():
    net = momentum_resnet(3, units=(1, 2)).double()
    outcome = assert_like_twin(net, backward, data(3, 3, 8, 8), depth=6)
    assert outcome.results[0].shape == (3, 3)


def test_memory_is_flat_in_depth():
    x = torch.randn(64, 8)
    assert_flat_in_depth(lambda depth: small(depth, 8, exact=False), x)
    assert_flat_in_depth(lambda depth: small(depth, 8), x, bytes_per_block=FINGERPRINTS, depths=(4, 8))


def test_bad_arguments_are_refused():
    for gamma in (0.0, 1.0, -0.5):
        with pytest.raises(ValueError, match=f"gamma must lie between 0 and 1, .*: got {gamma}"):
            small(1, gamma=gamma)
    with pytest.raises(OverflowError, match="leaves the grid of torch.float32"):
        small(80, gamma=0.8)(torch.ones(2, 4))
