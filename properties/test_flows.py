"""The layers of flows one by one: what each computes, initialises and refuses, and the flat memory of their chains."""

import copy
import io
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from memcnn import (
    ActNorm,
    AdditiveCoupling,
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
from properties.test_memory import step_bytes
from properties.twin import assert_like_twin, backward, conv_branch, images, plain_twin, run, weighted_sum

LAYERS = {"ActNorm": lambda: ActNorm(6), "InvertibleConv1x1": lambda: InvertibleConv1x1(6),
          "ChannelPermutation": lambda: ChannelPermutation([3, 1, 4, 0, 5, 2]), "SpaceToDepth": SpaceToDepth,
          "DepthToSpace": DepthToSpace}


@pytest.fixture(autouse=True)
def weights_from_a_seed():
    torch.manual_seed(0)


def seeded(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return images(*shape, dtype=dtype, requires_grad=False)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_takes_any_number_of_spatial_dimensions(name):
    for spatial in [(4,), (4, 2), (2, 4, 2), (2, 2, 2, 2)] + [()] * (name not in ("SpaceToDepth", "DepthToSpace")):
        layer = LAYERS[name]()
        x = seeded(3, 6 if name != "DepthToSpace" else 16, *spatial, dtype=torch.float32)
        with torch.no_grad():
            assert relative_error(layer.inverse(layer(x)), x) <= tolerance(x.dtype)


# Activation normalisation


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_the_first_pass_in_training_normalises_its_result(wrapped, direction):
    layer = ActNorm(6).double()
    block = InvertibleModuleWrapper(layer) if wrapped else layer
    x = 5 + 3 * seeded(4, 6, 5, 4)
    result = getattr(block, direction)(x)
    assert layer.initialised
    assert relative_error(result.mean((0, 2, 3)), torch.zeros(6), least_scale=1) <= tolerance(x.dtype)
    assert relative_error(result.var((0, 2, 3), correction=0), torch.ones(6)) <= tolerance(x.dtype)
    before = copy.deepcopy(layer.state_dict())
    weighted_sum(getattr(block, direction)(x + 1)).backward()
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} changed after the first pass"


def test_a_recomputation_does_not_initialise_again():
    """Parameters, and gradients, are those of the twin that never recomputes, in the first steps of training."""
    def steps(module, x):
        optimiser = torch.optim.SGD(module.parameters(), 0.1)
        for _ in range(3):
            optimiser.zero_grad()
            weighted_sum(module(x).square()).backward()
            optimiser.step()
        return [p.detach().clone() for p in module.parameters()]

    x = 5 + 3 * seeded(4, 6, 5, 4)
    inside = nn.Sequential(ActNorm(3), nn.Conv2d(3, 3, 1), nn.Tanh())  # a branch may hold one too
    chain = ReversibleSequential(ActNorm(6), AdditiveCoupling(inside), ActNorm(6)).double()
    assert_like_twin(chain, steps, x.requires_grad_(), depth=6)


def test_the_first_pass_may_be_one_without_gradients():
    layer = InvertibleModuleWrapper(ActNorm(6).double())
    with torch.no_grad():
        layer(5 + 3 * seeded(4, 6, 5, 4))
    assert layer._fn.initialised
    assert_like_twin(layer, backward, images(4, 6, 5, 4))


def test_the_first_pass_satisfies_a_check_of_the_inverse():
    layer = InvertibleModuleWrapper(ActNorm(6), check_inverse=tolerance(torch.float64)).double()
    assert_like_twin(layer, backward, (5 + 3 * seeded(4, 6, 5, 4)).requires_grad_())


def test_in_evaluation_nothing_is_initialised():
    layer = ActNorm(6).double().eval()
    x = seeded(4, 6, 5, 4)
    assert torch.equal(layer(x), x) and torch.equal(layer.inverse(x), x)
    assert not layer.initialised


def test_being_initialised_is_part_of_the_state():
    layer = ActNorm(6)
    layer(seeded(4, 6, 5, 4, dtype=torch.float32))
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    restored = ActNorm(6)
    restored.load_state_dict(torch.load(file))
    assert restored.initialised and copy.deepcopy(layer).initialised
    restored(5 + seeded(4, 6, 5, 4, dtype=torch.float32))
    assert torch.equal(restored.shift, layer.shift)


@pytest.mark.parametrize("constant", [0.0, 0.1])
def test_a_constant_channel_keeps_its_scale(constant):
    layer = ActNorm(2)
    x = seeded(4, 2, 5, 4, dtype=torch.float32)
    x[:, 0] = constant
    y = layer(x)
    assert layer.log_scale[0] == 0 and layer.log_scale[1] != 0
    assert relative_error(y[:, 0], torch.zeros(4, 5, 4), least_scale=1) <= tolerance(x.dtype)


def test_a_channel_that_is_constant_but_for_a_rounding_keeps_its_scale():
    layer = ActNorm(2)
    x = seeded(4, 2, 5, 4, dtype=torch.float32)
    x[:, 0] = 1000
    x[0, 0, 0, 0] = torch.nextafter(torch.tensor(1000.0), torch.tensor(2000.0))
    layer(x)
    assert layer.log_scale[0] == 0 and layer.log_scale[1] != 0


def test_statistics_of_inputs_in_half_precision_are_those_of_the_parameters_precision():
    x = (5 + seeded(4, 2, 5, 4, dtype=torch.float32)).bfloat16()
    layer, wanted = ActNorm(2), ActNorm(2)
    layer(x)
    wanted(x.float())
    assert torch.equal(layer.shift, wanted.shift) and torch.equal(layer.log_scale, wanted.log_scale)


def test_shapes_can_be_had_without_computing():
    with torch.device("meta"):
        layer, x = InvertibleConv1x1(4), torch.empty(2, 4, 5, 3)
    assert layer.inverse(layer(x)).shape == x.shape


def test_a_graph_from_before_the_initialisation_is_not_differentiated_wrongly():
    block = InvertibleModuleWrapper(ActNorm(6).double()).eval()
    loss = weighted_sum(block(images(4, 6, 5, 4)))
    block.train()(seeded(4, 6, 5, 4))
    with pytest.raises(RuntimeError, match="'log_scale' of shape .* was modified between forward and backward"):
        loss.backward()


def test_a_module_that_changes_its_parameters_at_every_pass_is_refused():
    class Restless(ActNorm):
        def forward(self, x):
            self.initialised = False
            return super().forward(x)

    block = InvertibleModuleWrapper(Restless(6).double())
    loss = weighted_sum(block(images(4, 6, 5, 4)))
    with pytest.raises(RuntimeError, match="'log_scale' of shape .* modified by its module's every forward pass"):
        loss.backward()


# The 1x1 convolution


@given(st.integers(1, 8), st.integers(0, 2**16))
def test_the_weight_starts_orthogonal_and_its_inverse_is_exact_to_rounding(channels, seed):
    torch.manual_seed(seed)
    layer = InvertibleConv1x1(channels).double()
    W, identity = layer.weight(), torch.eye(channels, dtype=torch.float64)
    assert relative_error(W @ W.T, identity) <= tolerance(torch.float32)  # it was rounded to float32 when it was made
    assert relative_error(layer.inverse_weight() @ W, identity) <= tolerance(torch.float64)


def test_a_1x1_convolution_is_a_convolution():
    layer = InvertibleConv1x1(6).double()
    x = seeded(2, 6, 5, 4)
    expected = nn.functional.conv2d(x, layer.weight()[..., None, None])
    assert relative_error(layer(x), expected) <= tolerance(x.dtype)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_1x1_convolution_keeps_the_memory_format(memory_format):
    x = images().contiguous(memory_format=memory_format)
    y = InvertibleConv1x1(6).double()(x)
    assert y.is_contiguous(memory_format=memory_format)


def test_under_autocast_the_stream_stays_in_float32():
    x = seeded(2, 6, 5, 4, dtype=torch.float32)
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
    x = seeded(2, 6 if name != "DepthToSpace" else 16, 4, 4).to(dtype)
    with torch.no_grad():
        for module in (LAYERS[name](), LAYERS[name]().to(dtype)):
            y = module(x)
            assert y.dtype == dtype
            assert relative_error(module.inverse(y), x) <= tolerance(dtype) / 100


# Rearrangements


def test_space_to_depth_has_the_order_of_pixel_unshuffle():
    x = seeded(2, 3, 6, 12)
    for factor in (1, 2, 3):
        assert torch.equal(SpaceToDepth(factor)(x), nn.functional.pixel_unshuffle(x, factor))
        deep = seeded(2, 2 * factor**2, 3, 5)
        assert torch.equal(DepthToSpace(factor)(deep), nn.functional.pixel_shuffle(deep, factor))


def test_a_permutation_moves_each_channel_to_its_place():
    x = seeded(2, 6, 3)
    order = [3, 1, 4, 0, 5, 2]
    y = ChannelPermutation(order)(x)
    assert all(torch.equal(y[:, i], x[:, source]) for i, source in enumerate(order))
    assert torch.equal(ChannelPermutation(range(6)[::-1])(x), x.flip(1))
    assert torch.equal(ChannelPermutation(torch.tensor(order)).inverse(y), x)


# Training


def glow(depth: int, channels: int = 8) -> ReversibleSequential:
    """Steps of Glow (arXiv:1807.03039), of which any number nearly keeps the size of its input."""
    def branch():
        half = channels // 2
        return nn.Sequential(nn.Conv2d(half, half, 3, padding=1), nn.Tanh(), nn.Conv2d(half, 2 * half, 3, padding=1))

    adapter = partial(AffineAdapterExp, bound=0.1)
    return ReversibleSequential(*(layer for _ in range(depth) for layer in (
        ActNorm(channels), InvertibleConv1x1(channels), AffineCoupling(branch(), branch(), adapter))))


def nice(depth: int, channels: int = 8) -> ReversibleSequential:
    """Additive couplings and permutations, which preserve volume, and a change of resolution there and back."""
    return ReversibleSequential(*(layer for _ in range(depth) for layer in (
        AdditiveCoupling(conv_branch(channels // 2)), ChannelPermutation(torch.randperm(channels)),
        SpaceToDepth(), DepthToSpace())))


@pytest.mark.parametrize("chain", [glow, nice])
def test_a_further_step_costs_less_than_a_hundredth_of_its_activations(chain):
    stored = (step_bytes(plain_twin(chain(6))) - step_bytes(plain_twin(chain(2)))) / 4
    assert stored > 12 * 4 * 8 * 16 * 16, "the twin must store at least twelve maps a step"
    assert (step_bytes(chain(32)) - step_bytes(chain(4))) / 28 < stored / 100


def test_a_multi_scale_flow_trains_as_its_twin():
    def coupling(channels):
        F, G = (nn.Conv2d(channels // 2, channels, 3, padding=1) for _ in range(2))
        return AffineCoupling(F, G, AffineAdapterExp)

    flow = ReversibleSequential(
        SpaceToDepth(), ActNorm(12), InvertibleConv1x1(12), coupling(12), ChannelPermutation(range(12)[::-1]),
        SpaceToDepth(), ActNorm(48), InvertibleConv1x1(48), coupling(48), DepthToSpace(4)).double()
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


@pytest.mark.parametrize("layer, shape, message", [
    (ActNorm(6), (2, 5, 4), r"ActNorm of 6 channels takes inputs of shape \(N, 6, ...\): got \(2, 5, 4\)"),
    (InvertibleConv1x1(6), (6,), r"InvertibleConv1x1 of 6 channels takes inputs of shape \(N, 6, ...\): got \(6,\)"),
    (ChannelPermutation([1, 0]), (2, 3), r"ChannelPermutation of 2 channels takes .*: got \(2, 3\)"),
    (SpaceToDepth(), (2, 3, 4, 5), r"space to depth by 2 .*: got \(2, 3, 4, 5\); pad or crop it"),
    (SpaceToDepth(), (2, 3), r"space to depth by 2 .*: got \(2, 3\)"),
    (DepthToSpace(), (2, 6, 4, 5), r"depth to space by 2 .* a C that 2\*\*2 divides: got \(2, 6, 4, 5\)"),
], ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None)
def test_an_input_that_does_not_fit_is_refused(layer, shape, message):
    with pytest.raises(ValueError, match=message):
        layer(torch.zeros(shape))


@pytest.mark.parametrize("order", [[0, 0], [1, 2], [0, 2]])
def test_what_is_no_permutation_is_refused(order):
    with pytest.raises(ValueError, match="every channel from 0 to 1 once"):
        ChannelPermutation(order)


@pytest.mark.parametrize("factor", [0, -2, 2.0])
def test_what_is_no_factor_is_refused(factor):
    with pytest.raises(ValueError, match="factor must be a positive integer"):
        SpaceToDepth(factor)
