"""i-RevNet: the code gives the image back, and gradients are right although padded channels are constant."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from memcnn.models.irevnet import ChannelPadding, IRevNet, irevnet_bijective, irevnet_injective
from memcnn.models.rearrange import SpaceToDepth
from memcnn.testing import check_all
from memcnn.testing.laws.twin import plain_twin, run
from memcnn.testing.tolerances import relative_error, tolerance
from properties.support.reference import FINGERPRINTS, assert_flat_in_depth, assert_laws
from properties.support.twin import assert_like_twin, backward, data

VARIANTS = {
    "bijective": dict(),
    "injective, zeros": dict(width=16),
    "injective, repeat": dict(width=16, padding="repeat"),
}


@settings(max_examples=2)
@given(st.integers(1, 2), st.integers(1, 2), st.integers(0, 2**16))
def test_the_bijective_encoder_meets_the_laws(channels, stages, seed):
    torch.manual_seed(seed)
    net = IRevNet((1,) * stages, image_channels=channels)
    assert_laws(net.encoder, torch.rand(4, channels, 4, 4), seed=seed)


@pytest.mark.parametrize("name", ["injective, zeros", "injective, repeat"])
def test_an_injective_encoder_trains_as_its_twin(name):
    net = IRevNet((1, 1), **VARIANTS[name])
    report = check_all(net.encoder, torch.rand(4, 3, 4, 4), laws=["gradients"], finite_differences=False)
    assert report.passed, str(report)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_whole_network_trains_as_its_twin(name):
    net = IRevNet((1, 1), num_classes=3, **VARIANTS[name]).double()
    outcome = assert_like_twin(net, backward, data(4, 3, 8, 8), depth=8)
    assert outcome.results[0].shape == (4, 3)


@settings(max_examples=3)
@given(st.sampled_from(sorted(VARIANTS)), st.integers(0, 2**16))
def test_an_image_comes_back_from_its_code(name, seed):
    torch.manual_seed(seed)
    net = IRevNet((2, 2), **VARIANTS[name])
    x = torch.rand(4, 3, 8, 8)
    with torch.no_grad():
        back = net.decode(net.encode(x))
    limit = 2.0**-11 if name == "injective, zeros" else tolerance(x.dtype, depth=4)
    assert (back - x).abs().max() <= limit


def test_an_exact_encoder_gives_back_every_bit_of_an_image_on_its_grid():
    net = IRevNet((2, 2), width=16)
    x = torch.randint(256, (4, 3, 8, 8)) / 256
    with torch.no_grad():
        assert torch.equal(net.decode(net.encode(x)), x)


def test_without_exact_mode_zeros_make_gradients_wrong_and_with_it_they_are_the_twins():
    """With a BatchNorm on the zeros, rounding decides the sign that ReLU sees."""
    errors = {}
    for exact in (False, True):
        torch.manual_seed(1)
        net = IRevNet((4,), width=48, exact=exact)
        x = torch.rand(8, 3, 8, 8)
        got, wanted = (run(module, backward, [x]).parameter_gradients for module in (net, plain_twin(net)))
        errors[exact] = max(relative_error(got[name], wanted[name]) for name in wanted)
    assert errors[True] == 0
    assert errors[False] > 0.01


def test_memory_is_flat_in_depth():
    assert_flat_in_depth(lambda depth: IRevNet((depth,)), torch.rand(4, 3, 8, 8))


def test_a_block_of_an_exact_encoder_holds_only_its_fingerprints():
    make = partial(IRevNet, **VARIANTS["injective, zeros"])
    x = torch.rand(4, 3, 8, 8)
    assert_flat_in_depth(lambda depth: make((depth,)), x, bytes_per_block=FINGERPRINTS, depths=(4, 8))


def test_the_code_has_as_many_values_as_the_image_or_as_the_padded_one():
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert irevnet_bijective(units=(1, 1, 1)).encode(x).shape == (2, 192, 4, 4)
        net = irevnet_injective(5, units=(1, 1, 1), padding="repeat", disable=True)
        assert net.encode(x).shape == (2, 512, 4, 4)
        assert net(x).shape == (2, 5)


def test_further_channels_are_zeros_or_copies():
    x = torch.rand(2, 3, 2, 2)
    padded = {padding: ChannelPadding(3, 7, padding)(x) for padding in ("zeros", "repeat")}
    assert torch.equal(padded["zeros"], torch.cat((x, torch.zeros(2, 4, 2, 2)), 1))
    assert torch.equal(padded["repeat"], torch.cat((x, x, x[:, :1]), 1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ChannelPadding(3, 2), "width must be at least the 3 channels that are padded: got 2"),
        (lambda: ChannelPadding(3, 4, "ones"), "padding must be 'zeros' or 'repeat': got 'ones'"),
        (lambda: IRevNet((1,), width=13), "width must be even, since couplings halve it: got 13"),
        (lambda: IRevNet((1,), initial=1), "width must be even, since couplings halve it: got 3"),
        (lambda: IRevNet((1,))(torch.zeros(1, 3, 5, 4)), "space to depth by 2"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_each_half_is_down_sampled_separately():
    """The paper samples x and x~ down, each with its own channels."""
    x1, x2 = torch.rand(2, 2, 4, 4), torch.rand(2, 2, 4, 4)
    S: nn.Module = SpaceToDepth()
    assert torch.equal(S(torch.cat((x1, x2), 1)), torch.cat((S(x1), S(x2)), 1))
