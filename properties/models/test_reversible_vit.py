"""The reversible vision transformer: masks and stochastic depth in F and G, and the fusion of the streams."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memcnn.models.attention import Attention, KeyValueCache, StochasticDepth
from memcnn.models.reversible_vit import ReversibleViT, reversible_vit_tiny
from properties.support.reference import assert_flat_in_depth, assert_laws
from properties.support.twin import assert_like_twin, backward, data


def small(depth: int = 2, **options) -> ReversibleViT:
    return ReversibleViT(depth, 8, 2, image_size=8, num_classes=3, **options)


@settings(max_examples=2)
@given(st.integers(1, 2), st.integers(0, 2**16))
def test_the_blocks_meet_the_laws(depth, seed):
    torch.manual_seed(seed)
    assert_laws(small(depth).blocks, torch.randn(3, 4, 16), seed=seed)


def test_stochastic_depth_is_replayed():
    """A later ``inverse`` draws other samples to drop, so the law of the inverse does not apply."""
    blocks = small(2, drop_path=0.5).blocks
    assert_laws(blocks, torch.randn(6, 4, 16), laws=("gradients", "state"), finite_differences=False)


@pytest.mark.parametrize("fusion", ["concat", "mean"])
def test_the_whole_network_trains_as_its_twin(fusion):
    mask = torch.ones(4, 4, dtype=torch.bool).tril()

    def program(net, x):
        y = net(x, attention_mask=mask)
        y.square().sum().backward()
        return y

    net = small(3, drop_path=0.6, fusion=fusion).double()
    outcome = assert_like_twin(net, program, data(5, 3, 8, 8), depth=6)
    assert outcome.results[0].shape == (5, 3)


def test_with_exact_streams_gradients_are_the_twins_bit_for_bit():
    net = small(3, exact=True)
    outcome = assert_like_twin(net, backward, data(2, 3, 8, 8, dtype=torch.float32), depth=0)
    assert outcome.results[0].shape == (2, 3)


def test_a_mask_keeps_tokens_apart():
    """If token 0 attends only to itself in every block, the other tokens cannot change it."""
    blocks, x = small(2).blocks, torch.randn(2, 4, 16)
    other = torch.cat((x[:, :1], torch.randn(2, 3, 16)), 1)
    mask = torch.eye(4, dtype=torch.bool)
    with torch.no_grad():
        assert torch.equal(blocks(x, attention_mask=mask)[:, 0], blocks(other, attention_mask=mask)[:, 0])
        assert not torch.equal(blocks(x)[:, 0], blocks(other)[:, 0])


@pytest.mark.parametrize("causal", [None, False, True])
def test_a_token_attends_to_later_ones_unless_it_must_not(causal):
    layer = Attention(8, 2) if causal is None else Attention(8, 2, causal=causal)
    x = torch.randn(1, 3, 8)
    changed = torch.cat((x[:, :2], torch.randn(1, 1, 8)), 1)
    assert torch.equal(layer(x)[:, :2], layer(changed)[:, :2]) is bool(causal)


@pytest.mark.parametrize("cached", [False, True])
def test_causal_attention_takes_no_other_mask(cached):
    layer, x = Attention(8, 2, causal=True), torch.randn(1, 3, 8)
    cache = KeyValueCache() if cached else None
    with torch.no_grad(), pytest.raises(ValueError, match="got an attention_mask for causal attention"):
        layer(x, attention_mask=torch.eye(3, dtype=torch.bool), cache=cache)


def test_memory_is_flat_in_depth():
    assert_flat_in_depth(small, torch.rand(2, 3, 8, 8))


def test_stochastic_depth_drops_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    layer, x = StochasticDepth(0.25), torch.ones(4000, 3)
    y = layer(x)
    assert set(y.unique().tolist()) == {0.0, (x[0, 0] / 0.75).item()}
    assert (y == y[:, :1]).all()
    assert y.mean().item() == pytest.approx(1, abs=0.05)
    assert layer.eval()(x) is x


def test_the_published_sizes():
    net = reversible_vit_tiny(7, disable=True)
    assert len(net.blocks) == 12
    with torch.no_grad():
        assert net(torch.rand(1, 3, 32, 32)).shape == (1, 7)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ReversibleViT(1, 8, 3), "the width of a token must be a multiple of the 3 heads: got 8"),
        (
            lambda: ReversibleViT(1, 8, 2, patch=5),
            "image_size must be a multiple of patch: got 32 and 5",
        ),
        (lambda: small(fusion="max"), "fusion must be 'concat' or 'mean': got 'max'"),
        (
            lambda: small()(torch.zeros(1, 3, 12, 8)),
            r"must be 8 x 8 pixels, the network's image_size: got \(1, 3, 12, 8",
        ),
        (lambda: small()(torch.zeros(1, 3, 4, 16)), r"must be 8 x 8 pixels, .*got \(1, 3, 4, 16\)"),  # as many patches
        (lambda: small()(torch.zeros(1, 3, 9, 8)), r"must be 8 x 8 pixels, .*got \(1, 3, 9, 8\)"),  # a row is left over
        (lambda: small(drop_path=1.0), "must be at least 0 and less than 1: got 1.0"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_an_attention_layer_takes_masks_and_a_feed_forward_network_takes_none():
    coupling = small(1).blocks[0]._fn
    assert isinstance(coupling.Fm, Attention)
    assert coupling.keywords_taken(["attention_mask"]) == {"attention_mask"}
    with pytest.raises(TypeError, match="no branch whose forward takes the keyword argument 'mask'"):
        coupling(torch.zeros(1, 4, 16), mask=None)
