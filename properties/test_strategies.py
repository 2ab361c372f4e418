"""What is drawn can be replayed, is varied, and is judged by limits that its conditioning explains."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from memcnn.engine.couple import CoupledBranch
from memcnn.engine.recompute import SecondEvaluation
from memcnn.testing import cases
from memcnn.testing.cases import COMPOSITIONS, KINDS, LAYERS, LAYOUTS, Block, Branch, Chain, Network, Values
from memcnn.testing.strategies import networks, tensors
from memcnn.testing.tolerances import tolerance
from properties.laws import (
    LARGEST,
    assert_network_like_twin,
    condition_number,
    forward_and_backward,
    hold,
    table,
)
from properties.test_inversion import difference_of_ends, there_and_back


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


def of_network(network: Network) -> set[str]:
    """All the names in a network."""
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


def chain_of(kind: str) -> Network:
    shape = (2, 4, 3)
    branch = Branch((2, 2, 3), ("linear", "tanh"), doubled=1 if "affine" in kind else None)
    return Network(Chain((Block(kind, shape, branch, branch),)), Values(shape), training=False)


def test_a_condition_number_is_larger_where_something_is_amplified():
    inverts = there_and_back(False)
    once = condition_number(chain_of("permutation"), inverts, difference=difference_of_ends)
    assert once == pytest.approx(4, abs=1e-3)  # two changes on the way there, and two on the way back
    assert condition_number(chain_of("affine sigmoid"), inverts, difference=difference_of_ends) > 1.05 * once


def test_a_condition_number_counts_the_inverses_of_blocks_within_branches():
    def around(kind: str) -> Network:
        inner = Branch((2, 1, 3), ("linear", "tanh"), doubled=1 if "affine" in kind else None)
        outer = Branch((2, 2, 3), (Chain((Block(kind, (2, 2, 3), inner, inner),), "by hand"), "tanh"))
        return Network(Chain((Block("additive", (2, 4, 3), outer, outer),)), Values((2, 4, 3)), training=False)
    assert (condition_number(around("affine sigmoid"), forward_and_backward)
            > 2 * condition_number(around("additive"), forward_and_backward))  # divides by scales below 1


def test_nothing_can_be_told_where_the_dtype_is_too_small_for_a_value_on_the_way():
    def of(scale: float, dtype: torch.dtype) -> float:
        branch = Branch((2, 2, 3), ("linear",))
        chain = Chain((Block("additive", (2, 4, 3), branch, branch),) * 8)
        return condition_number(Network(chain, Values((2, 4, 3), dtype, scale=scale)), forward_and_backward)
    assert of(1e38, torch.float32) == float("inf")
    assert of(1e38, torch.float64) == pytest.approx(of(1.0, torch.float32), rel=0.5)


def test_nothing_can_be_told_where_an_inverse_divides_by_zero():
    branch = Branch((2, 2, 3), ("linear",), doubled=1)
    network = Network(Chain((Block("affine sigmoid", (2, 4, 3), branch, branch),)), Values((2, 4, 3), scale=1000.0))
    assert condition_number(network, forward_and_backward) == float("inf")


@given(st.just(chain_of("additive")))
def test_a_fault_that_gives_no_numbers_is_no_excuse_for_itself(network: Network):
    recompute = CoupledBranch.recompute

    def spoilt(step: CoupledBranch, second: SecondEvaluation) -> list[torch.Tensor | None]:
        return [value if value is None else value * float("nan") for value in recompute(step, second)]
    with (patch.dict(LARGEST), patch.object(CoupledBranch, "recompute", spoilt),
          pytest.raises(AssertionError, match="relative error nan")):
        assert_network_like_twin("a law", network, forward_and_backward, "cpu")


def test_an_error_beyond_what_rounding_explains_fails_whatever_the_blocks_are():
    network = chain_of("additive")
    limit = tolerance(torch.float32)
    with patch.dict(LARGEST):
        hold("a law", network, 2 * limit, depth=1, condition=lambda _: 2.1)
        with pytest.raises(AssertionError, match=r"a law: relative error .* of buffer 3, limit"):
            hold("a law", network, 2 * limit, depth=1, condition=lambda _: 1.9, of="buffer 3")
        with pytest.raises(AssertionError, match=f"limit {3 * limit:.1e}"):  # of three blocks, of which none amplifies
            hold("a third law", network, 4 * limit, depth=3, condition=lambda _: 1.0)
        for condition in 1.0, float("nan"):
            with pytest.raises(AssertionError):
                hold("another", network, float("nan"), depth=1, condition=lambda _, condition=condition: condition)
        assert any(line.startswith("a law") and "105.26%" in line for line in table())
        assert any(line.startswith("another") and "nan" in line for line in table())


@given(st.booleans())
def test_an_example_of_which_nothing_can_be_told_does_not_count(hopeless: bool):
    if hopeless:
        hold("a law", chain_of("additive"), 0.1, depth=1, condition=lambda _: 1e9)
        pytest.fail("it counted")
