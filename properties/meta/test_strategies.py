"""Drawn networks can be built again, print as code, and contain every kind of block, layer and layout."""

import torch
from hypothesis import Phase, given, settings

from memcnn.testing import cases
from memcnn.testing.cases import COMPOSITIONS, KINDS, LAYERS, LAYOUTS, Chain, Network, Values
from memcnn.testing.strategies import networks, tensors


@given(networks(autocast=(False, True), frozen=True))
def test_a_network_prints_as_the_code_that_makes_it(network: Network):
    assert eval(repr(network), {**vars(cases), "torch": torch}) == network


@given(networks(frozen=True))
def test_a_description_builds_the_same_values_every_time_and_moves_no_generator(network: Network):
    before = torch.get_rng_state()
    first, x = network.build(), network.input.build()
    torch.rand(3)
    second, again = network.build(), network.input.build()
    torch.set_rng_state(before)
    network.build()
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(x, again) and x.stride() == again.stride()
    assert all(map(torch.equal, first.state_dict().values(), second.state_dict().values()))


@given(tensors())
def test_a_tensor_has_the_shape_and_layout_that_it_is_drawn_with(values: Values):
    x = values.build()
    assert x.shape == values.shape and x.dtype == values.dtype
    gaps = values.layout == "sliced" and x.numel() > 1
    repeats = values.layout == "expanded" and len(x) > 1
    assert torch.ops.aten.is_non_overlapping_and_dense(x) == (not gaps and not repeats)


@given(networks())
def test_inputs_are_of_size_one_and_nothing_is_frozen_by_default(network: Network):
    assert network.input.scale == 1.0 and network.input.build().count_nonzero()
    assert all(p.requires_grad for p in network.build().parameters())


@given(networks(layers=("linear", "tanh"), layouts=["contiguous"], split_batch=False, mix_samples=False))
def test_samples_are_not_mixed_where_they_must_not_be(network: Network):
    module, x = network.build().eval(), network.input.build()
    with torch.no_grad():
        one_by_one = torch.cat([module(sample) for sample in x.split(1)])
        torch.testing.assert_close(module(x), one_by_one)


def of_network(network: Network) -> set[str]:
    """Return all the names in a network."""

    def of_chain(chain: Chain, inside: str = "") -> set[str]:
        names = {inside + chain.composition}
        for block in chain.blocks:
            names.add(inside + block.kind)
            for branch in filter(None, (block.F, block.G)):
                for layer in branch.layers:
                    names |= {layer} if isinstance(layer, str) else {"nested blocks"} | of_chain(layer, "nested ")
        return names

    return of_chain(network.chain) | {network.input.layout}


def test_everything_is_drawn():
    names = set()

    @settings(phases=[Phase.generate], max_examples=300, derandomize=True, database=None, deadline=None)
    @given(networks())
    def draw(network: Network) -> None:
        names.update(of_network(network))

    draw()
    assert names >= {*KINDS, *LAYERS, *LAYOUTS, *COMPOSITIONS, "nested by hand", "nested additive", "nested affine exp"}
