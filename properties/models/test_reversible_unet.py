"""U-Nets for images and volumes: memory does not grow with the blocks of a stage, and one net is invertible."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memcnn.models.reversible_unet import InvertibleUNet, ReversibleUNet
from memcnn.testing.tolerances import relative_error, tolerance
from properties.support.reference import assert_flat_in_depth, assert_laws
from properties.support.twin import assert_like_twin, backward, data


def sizes(dims: int, size: int = 4) -> tuple[int, ...]:
    return (size,) * dims


@settings(max_examples=2)
@given(st.sampled_from([2, 3]), st.integers(1, 2), st.integers(0, 2**16))
def test_the_invertible_net_meets_the_laws(dims, scales, seed):
    torch.manual_seed(seed)
    net = InvertibleUNet(4, scales, 1, dims=dims)
    assert_laws(net, torch.randn(2, 4, *sizes(dims, 2)), laws=("inverse", "gradients"), seed=seed)


def test_the_invertible_net_leaves_state_as_a_plain_step_does():
    assert_laws(InvertibleUNet(4, 2, 1), torch.randn(2, 4, 2, 2), laws=("state",))


@pytest.mark.parametrize("dims", [2, 3])
def test_an_input_comes_back(dims):
    net, x = InvertibleUNet(4, 3, 2, dims=dims), torch.randn(1, 4, *sizes(dims))
    with torch.no_grad():
        y = net(x)
        assert y.shape == x.shape
        assert relative_error(net.inverse(y), x) <= tolerance(x.dtype, depth=14)


@pytest.mark.parametrize("dims", [2, 3])
def test_the_partially_reversible_net_trains_as_its_twin(dims):
    net = ReversibleUNet(1, 3, (4, 8), 2, dims=dims).double()
    outcome = assert_like_twin(net, backward, data(2, 1, *sizes(dims)), depth=8)
    assert outcome.results[0].shape == (2, 3, *sizes(dims))


@pytest.mark.parametrize("kind", ["partially reversible", "invertible"])
def test_memory_is_flat_in_the_blocks_of_a_stage(kind):
    def make(blocks: int):
        if kind == "invertible":
            return InvertibleUNet(4, 2, blocks)
        return ReversibleUNet(4, 3, (4, 4), blocks)

    assert_flat_in_depth(make, torch.randn(2, 4, 8, 8), depths=(8, 32))


def test_each_scale_gets_all_values_that_do_not_skip_it():
    net = InvertibleUNet(4, 3, 0)
    x = torch.randn(2, 4, 4, 4)
    seen = []
    net.inner.inner.left.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        y = net(x)
    assert seen[0].shape == (2, 16, 1, 1)
    assert torch.equal(y[:, :2], x[:, :2]), "half of the channels skip the lower resolutions"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ReversibleUNet(1, 1, dims=4), "dims must be 2, for images, or 3, for volumes: got 4"),
        (lambda: InvertibleUNet(6), r"channels must be multiples of 4, .*: got \[6\]"),
        (lambda: ReversibleUNet(1, 1, ()), r"channels must be multiples of 4, .*: got \[\]"),
        (lambda: ReversibleUNet(1, 1)(torch.zeros(1, 1, 8, 6)), r"multiple of 4: got \(1, 1, 8, 6\); pad or crop it"),
        (lambda: InvertibleUNet(4)(torch.zeros(1, 4, 6, 6)), "space to depth by 2"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
