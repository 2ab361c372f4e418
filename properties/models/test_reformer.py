"""The reversible language model is causal, ties its embeddings, and generates with a key-value cache."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from memcnn.models.attention import KeyValueCache
from memcnn.models.reformer import ReversibleLM, reformer_small
from memcnn.testing.laws.memory import step_bytes
from memcnn.testing.laws.twin import plain_twin, run
from memcnn.testing.tolerances import relative_error, tolerance
from properties.support.reference import assert_flat_in_depth, assert_laws
from properties.support.twin import assert_same

TOKENS = torch.randint(11, (3, 6), generator=torch.Generator().manual_seed(0))


def small(depth: int = 2, **options) -> ReversibleLM:
    return ReversibleLM(11, depth, 8, 2, context=12, **options)


class OfEmbeddings(nn.Module):
    """The layers after the embedding, which take floating-point inputs."""

    def __init__(self, model: ReversibleLM):
        super().__init__()
        self.model = model

    def forward(self, x):
        x1, x2 = self.model.blocks(torch.cat((x, x), -1)).chunk(2, -1)
        return self.model.norm((x1 + x2) / 2)


@settings(max_examples=2)
@given(st.integers(1, 2), st.integers(0, 2**16))
def test_the_blocks_meet_the_laws(depth, seed):
    torch.manual_seed(seed)
    x = torch.randn(3, 4, 16)
    assert_laws(small(depth).blocks, x, laws=("inverse", "gradients"), seed=seed, finite_differences=False)


def test_the_whole_network_trains_as_its_twin():
    def program(model, tokens):
        logits = model(tokens)
        nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
        return logits

    model = small(3, drop=0.3).double()
    limit = tolerance(torch.float64, depth=6)
    assert_same(run(model, program, [TOKENS]), run(plain_twin(model), program, [TOKENS]), limit=limit)


def test_memory_is_flat_in_depth():
    assert_flat_in_depth(lambda depth: OfEmbeddings(small(depth)), torch.randn(2, 6, 8))


def test_a_block_with_stochastic_depth_holds_a_generators_state_and_no_activation():
    """The bytes of a further block do not depend on the number of samples."""
    held = [step_bytes(OfEmbeddings(small(depth, drop=0.5)), torch.randn(n, 6, 8)) for n in (2, 8) for depth in (2, 6)]
    assert held[1] - held[0] == held[3] - held[2] <= 4 * 8192


@settings(max_examples=5)
@given(st.integers(1, 5), st.integers(0, 2**16))
def test_a_later_token_changes_no_earlier_prediction(position, seed):
    torch.manual_seed(seed)
    model, other = small(), TOKENS.clone()
    other[:, position:] = (other[:, position:] + 1) % 11
    with torch.no_grad():
        a, b = model(TOKENS), model(other)
    assert torch.equal(a[:, :position], b[:, :position])
    assert not torch.equal(a[:, position:], b[:, position:])


def test_embedding_and_logits_share_their_weight():
    model = small(1)
    assert [name for name, p in model.named_parameters() if 11 in p.shape] == ["embedding.weight"]
    model(TOKENS[:1, :2]).square().sum().backward()
    assert model.embedding.weight.grad.abs().sum(1).all(), "logits give every token a gradient"


@pytest.mark.parametrize("pieces", [[4], [1, 1, 1], [2, 3], [3, 1, 2]])
def test_logits_with_a_cache_equal_those_of_the_whole_text(pieces):
    model = small().double().eval()
    tokens, cache = torch.randint(11, (2, sum(pieces))), KeyValueCache()
    with torch.no_grad():
        parts = [model(piece, cache=cache) for piece in tokens.split(pieces, 1)]
        assert cache.length == sum(pieces)
        error = relative_error(torch.cat(parts, 1), model(tokens))
    assert error <= tolerance(torch.float64, depth=2)


def test_generation_chooses_the_likeliest_token_each_time():
    model, text = small().double(), TOKENS[:, :2]
    generated = model.generate(text, 5, temperature=0)
    assert model.training
    with torch.no_grad():
        for _ in range(5):
            text = torch.cat((text, model.eval()(text)[:, -1].argmax(-1, keepdim=True)), 1)
    assert torch.equal(generated, text)


def test_draws_follow_the_generator_and_the_temperature():
    model = small()
    drawn = [
        model.generate(TOKENS, 6, temperature=t, generator=torch.Generator().manual_seed(seed))
        for t, seed in ((1.0, 0), (1.0, 0), (1.0, 1), (1e-6, 2))
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert torch.equal(drawn[3], model.generate(TOKENS, 6, temperature=0))


def test_bad_arguments_are_refused():
    model = reformer_small(11, depth=1, context=6, disable=True)
    with pytest.raises(ValueError, match="the model has 6 positions: got 7"):
        model(torch.zeros(1, 7, dtype=torch.int64))
    with pytest.raises(ValueError, match="the model has 6 positions: got 7"):
        model.generate(TOKENS, 2)
    with pytest.raises(ValueError, match="temperature must be at least 0: got -1"):
        model.generate(TOKENS, 0, temperature=-1)
    with pytest.raises(RuntimeError, match=r"cache was used while gradients are recorded.*torch.no_grad"):
        model(TOKENS, cache=KeyValueCache())
