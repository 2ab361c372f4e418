"""Each layer of flows computes and inverts its function, refuses wrong inputs, and adds no memory to a chain."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from memcnn import (
    ActNorm,
    AffineAdapterExp,
    AffineCoupling,
    ChannelPermutation,
    DepthToSpace,
    InvertibleConv1x1,
    InvertibleModuleWrapper,
    ReversibleSequential,
    SpaceToDepth,
)
from memcnn.testing.tolerances import relative_error, tolerance
from properties.support.flows import glow, nice
from properties.support.memory import assert_flat
from properties.support.twin import assert_like_twin, backward, data, images, run

LAYERS = {
    "ActNorm": lambda: ActNorm(6),
    "InvertibleConv1x1": lambda: InvertibleConv1x1(6),
    "ChannelPermutation": lambda: ChannelPermutation([3, 1, 4, 0, 5, 2]),
    "SpaceToDepth": SpaceToDepth,
    "DepthToSpace": DepthToSpace,
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_takes_any_number_of_spatial_dimensions(name):
    for spatial in [(4,), (4, 2), (2, 4, 2), (2, 2, 2, 2)] + [()] * (name not in ("SpaceToDepth", "DepthToSpace")):
        layer = LAYERS[name]()
        x = data(3, 6 if name != "DepthToSpace" else 16, *spatial, dtype=torch.float32)
        with torch.no_grad():
            assert relative_error(layer.inverse(layer(x)), x) <= tolerance(x.dtype)


# The 1x1 convolution


def test_shapes_can_be_computed_on_the_meta_device():
    with torch.device("meta"):
        layer, x = InvertibleConv1x1(4), torch.empty(2, 4, 5, 3)
    assert layer.inverse(layer(x)).shape == x.shape


@given(st.integers(1, 8), st.integers(0, 2**16))
def test_the_weight_starts_orthogonal_and_its_inverse_is_exact_to_rounding(channels, seed):
    torch.manual_seed(seed)
    layer = InvertibleConv1x1(channels).double()
    W, identity = layer.weight(), torch.eye(channels, dtype=torch.float64)
    assert relative_error(W @ W.T, identity) <= tolerance(torch.float32)  # initialisation rounds it to float32
    assert relative_error(layer.inverse_weight() @ W, identity) <= tolerance(torch.float64)


def test_a_1x1_convolution_is_a_convolution():
    layer = InvertibleConv1x1(6).double()
    x = data(2, 6, 5, 4)
    expected = nn.functional.conv2d(x, layer.weight()[..., None, None])
    assert relative_error(layer(x), expected) <= tolerance(x.dtype)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_1x1_convolution_keeps_the_memory_format(memory_format):
    x = images().contiguous(memory_format=memory_format)
    y = InvertibleConv1x1(6).double()(x)
    assert y.is_contiguous(memory_format=memory_format)


def test_under_autocast_the_stream_stays_in_float32():
    x = data(2, 6, 5, 4, dtype=torch.float32)
    chain = glow(2, channels=6)
    with torch.no_grad():
        chain(x)
    for training in (False, True):  # with gradients, and without
        with torch.set_grad_enabled(training), torch.autocast("cpu", torch.bfloat16):
            y = chain(x)
            assert y.dtype == torch.float32
            assert relative_error(chain.inverse(y), x) <= tolerance(x.dtype, depth=6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_keeps_a_stream_in_half_precision(name, dtype):
    x = data(2, 6 if name != "DepthToSpace" else 16, 4, 4).to(dtype)
    with torch.no_grad():
        for module in (LAYERS[name](), LAYERS[name]().to(dtype)):
            y = module(x)
            assert y.dtype == dtype
            assert relative_error(module.inverse(y), x) <= tolerance(dtype) / 100


# Rearrangements


def test_space_to_depth_has_the_order_of_pixel_unshuffle():
    x = data(2, 3, 6, 12)
    for factor in (1, 2, 3):
        assert torch.equal(SpaceToDepth(factor)(x), nn.functional.pixel_unshuffle(x, factor))
        deep = data(2, 2 * factor**2, 3, 5)
        assert torch.equal(DepthToSpace(factor)(deep), nn.functional.pixel_shuffle(deep, factor))


def test_a_permutation_moves_each_channel_to_its_place():
    x = data(2, 6, 3)
    order = [3, 1, 4, 0, 5, 2]
    y = ChannelPermutation(order)(x)
    assert all(torch.equal(y[:, i], x[:, source]) for i, source in enumerate(order))
    assert torch.equal(ChannelPermutation(range(6)[::-1])(x), x.flip(1))
    assert torch.equal(ChannelPermutation(torch.tensor(order)).inverse(y), x)


# Training


@pytest.mark.parametrize("chain", [glow, nice])
def test_a_further_step_costs_less_than_a_hundredth_of_its_activations(chain):
    assert_flat(chain, least_maps=3)


@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_an_empty_batch_initialises_nothing(direction):
    layer = ActNorm(3)
    getattr(layer, direction)(torch.zeros(0, 3, 4, 4))
    assert not layer.initialised and not layer.shift.any()
    getattr(layer, direction)(torch.ones(2, 3, 4, 4))
    assert layer.initialised and layer.shift.all()


def test_a_multi_scale_flow_trains_as_its_twin():
    def coupling(channels):
        F, G = (nn.Conv2d(channels // 2, channels, 3, padding=1) for _ in range(2))
        return AffineCoupling(F, G, AffineAdapterExp)

    flow = ReversibleSequential(
        SpaceToDepth(),
        ActNorm(12),
        InvertibleConv1x1(12),
        coupling(12),
        ChannelPermutation(range(12)[::-1]),
        SpaceToDepth(),
        ActNorm(48),
        InvertibleConv1x1(48),
        coupling(48),
        DepthToSpace(4),
    ).double()
    outcome = assert_like_twin(flow, backward, images(2, 3, 8, 8), depth=2 * len(flow))
    assert outcome.results[0].shape == (2, 3, 8, 8)


def test_layers_are_trained_by_the_same_steps_in_any_composition():
    layers = glow(2, channels=6).double()
    by_hand = nn.Sequential(*(InvertibleModuleWrapper(copy.deepcopy(block._fn)) for block in layers))
    x = images()
    sequential, chained = run(layers, backward, [x]), run(by_hand, backward, [x])
    for (name, got), wanted in zip(chained.gradients.items(), sequential.gradients.values(), strict=True):
        assert torch.equal(got, wanted), name


# Refusals


@pytest.mark.parametrize(
    ("layer", "shape", "message"),
    [
        (ActNorm(6), (2, 5, 4), r"ActNorm of 6 channels takes inputs of shape \(N, 6, ...\): got \(2, 5, 4\)"),
        (
            InvertibleConv1x1(6),
            (6,),
            r"InvertibleConv1x1 of 6 channels takes inputs of shape \(N, 6, ...\): got \(6,\)",
        ),
        (ChannelPermutation([1, 0]), (2, 3), r"ChannelPermutation of 2 channels takes .*: got \(2, 3\)"),
        (SpaceToDepth(), (2, 3, 4, 5), r"space to depth by 2 .*: got \(2, 3, 4, 5\); pad or crop it"),
        (SpaceToDepth(), (2, 3), r"space to depth by 2 .*: got \(2, 3\)"),
        (DepthToSpace(), (2, 6, 4, 5), r"depth to space by 2 .* a C that 2\*\*2 divides: got \(2, 6, 4, 5\)"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_an_input_that_does_not_fit_is_refused(layer, shape, message):
    with pytest.raises(ValueError, match=message):
        layer(torch.zeros(shape))


@pytest.mark.parametrize("order", [[0, 0], [1, 2], [0, 2]])
def test_an_order_that_is_no_permutation_is_refused(order):
    with pytest.raises(ValueError, match="every channel from 0 to 1 once"):
        ChannelPermutation(order)


@pytest.mark.parametrize("factor", [0, -2, 2.0])
def test_a_factor_that_is_no_positive_integer_is_refused(factor):
    with pytest.raises(ValueError, match="factor must be a positive integer"):
        SpaceToDepth(factor)
