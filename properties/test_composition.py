"""The law of composition: drawn networks of drawn blocks compute what their plain twins compute, and invert.

Everything is drawn at once: branches (convolutions, linear, attention, normalisations, activations, dropout, nested
blocks), couplings and layers of flows, shapes, splits, layouts in memory, precision, mode, what is frozen, and how the
blocks are wrapped and composed.
"""

import pytest
import torch
from hypothesis import example, given
from torch import nn

from memcnn import AdditiveCoupling, InvertibleModuleWrapper
from memcnn.testing.cases import Block, Branch, Chain, Network, OnlyInvertible, Values
from memcnn.testing.strategies import networks
from properties.laws import (
    assert_network_like_twin,
    differentiated,
    forward_and_backward,
    inverse_and_backward,
)
from properties.test_inversion import assert_inverts
from properties.twin import backward, images

everything = networks(autocast=(False, True), frozen=True)


def network(shape, *layers: str, kind: str = "additive", splits=(1, 1), composition: str = "sequence",
            layout: str = "contiguous", dtype: torch.dtype = torch.float64, **options) -> Network:
    """Couplings of branches of ``layers`` that split along ``splits``; an affine one's branches double that too."""
    blocks = []
    for dim in splits:
        half = tuple(size // 2 if i == dim else size for i, size in enumerate(shape))
        branch = Branch(half, layers, doubled=dim if kind in ("affine sigmoid", "affine exp") else None)
        blocks.append(Block(kind, shape, branch, branch, split_dim=dim))
    return Network(Chain(tuple(blocks), composition), Values(shape, dtype, layout=layout), **options)


# A branch was given views in forward and dense tensors in the recomputation, where autograd saves other tensors
VIEWS_IN_FORWARD = network((2, 4, 3, 4), "group norm", "conv 3", "tanh", layout="transposed", composition="by hand")
GAPS_IN_FORWARD = network((2, 4, 4, 3), "batch norm", "conv 3", layout="sliced", splits=(2, 1), composition="by hand")
# The recomputation could not write a rebuilt half in the place of one that had been expanded
EXPANDED = network((3, 2, 2), "conv 3", "silu in place", kind="affine exp", layout="expanded")
# A layer that initialises itself was refused, or initialised itself again when its branch was recomputed
INITIALISES_ITSELF = network((2, 4, 4, 2), "act norm", "linear", "tanh")
# Halves that one block hands to the next without joining them are other halves where that block splits otherwise
SPLITS_BY_TURNS = network((2, 4, 4), "conv 1", "tanh", "dropout", splits=(1, 1, 2, 1, -3))
# Masks follow the order of memory: drawn networks have dropout where that is the usual one alone
MASKS_IN_CHANNELS_LAST = network((2, 4, 4, 4), "conv 3", "dropout", "conv 1", layout="channels_last")
# Scale and shift lay in channels alone, whatever dimension the coupling halved
SPLITS_THE_BATCH = network((4, 3, 2), "linear", "tanh", kind="affine exp", splits=(0, 2))
# The weight that autocast had rounded was not the one that was inverted
UNDER_AUTOCAST = Network(Chain(tuple(Block(kind, (2, 4, 3, 3)) for kind in ("conv1x1", "actnorm", "conv1x1"))),
                         Values((2, 4, 3, 3)), autocast=True)
# Statistics that a block moves were moved again by the recomputation, also where a block is recomputed within another
NESTED_STATISTICS = network(
    (4, 8, 2), "conv 3", network((4, 4, 2), "batch norm", "linear", "dropout", composition="by hand").chain)


@given(everything)
@example(MASKS_IN_CHANNELS_LAST)
@example(VIEWS_IN_FORWARD)
@example(GAPS_IN_FORWARD)
@example(EXPANDED)
@example(INITIALISES_ITSELF)
@example(SPLITS_BY_TURNS)
@example(SPLITS_THE_BATCH)
@example(UNDER_AUTOCAST)
@example(NESTED_STATISTICS)
def test_a_network_computes_what_its_twin_computes(device: str, network: Network):
    assert_network_like_twin("composition", network, forward_and_backward, device)


@given(everything)
@example(EXPANDED)
@example(SPLITS_BY_TURNS)
@example(NESTED_STATISTICS)
def test_a_network_trained_through_its_inverse_computes_what_its_twin_computes(device: str, network: Network):
    assert_network_like_twin("composition, inverse", network, inverse_and_backward, device, inverse=True)


@given(networks(autocast=(False, True), scales=(1.0, 0.01, 10.0)))
@example(SPLITS_BY_TURNS)
@example(UNDER_AUTOCAST)
def test_a_network_inverts(device: str, network: Network):
    assert_inverts(network, device)


@given(everything)
@example(VIEWS_IN_FORWARD)
@example(EXPANDED)
def test_the_callers_tensors_keep_values_versions_and_storage(device: str, network: Network):
    module, leaf = network.build(device), network.input.leaf(device).requires_grad_()
    x = network.input.laid_out(leaf.sin())
    with network.context(device):
        y = module(x)
    held = {"leaf": leaf, "input": x, "output": y}
    before = {name: (t.detach().clone(), *identity(t)) for name, t in held.items()}
    differentiated(y)
    for name, t in held.items():
        value, *wanted = before[name]
        torch.testing.assert_close(t, value, rtol=0, atol=0, equal_nan=True, msg=f"{name} changed")
        assert [*identity(t)] == wanted, name


def identity(t: torch.Tensor) -> tuple:
    return t._version, t.data_ptr(), t.stride(), t.untyped_storage().nbytes()


def two_steps(network: Network):
    """Two passes under way at once, the first differentiated last, and with a graph that is kept."""
    def program(module: nn.Module, leaf: torch.Tensor) -> list[torch.Tensor]:
        x = network.input.laid_out(leaf)
        with network.context(leaf.device):
            first = module(x)
            torch.manual_seed(1)
            # with a gradient: that of group_norm crashes in torch 2.13 where x in channels_last needs none
            second = module(x.detach().cos().requires_grad_())
        differentiated(second)
        if first.requires_grad:
            first.square().sum().backward(retain_graph=True)
        return [differentiated(first), second]
    return program


@given(everything)
@example(INITIALISES_ITSELF)
@example(NESTED_STATISTICS)
@example(MASKS_IN_CHANNELS_LAST)
def test_steps_under_way_at_once_and_kept_graphs_are_the_twins(device: str, network: Network):
    assert_network_like_twin("composition, two steps", network, two_steps, device, depth=4 * network.depth)


def test_a_module_whose_inverse_draws_random_numbers_in_another_order_is_refused():
    """Its masks would be those of F in G and of G in F, and the gradients wrong without a word."""
    coupling = AdditiveCoupling(nn.Sequential(nn.Conv2d(3, 3, 1), nn.Dropout(0.4))).double()
    with pytest.raises(RuntimeError, match="OnlyInvertible draws random numbers .* use keep_input=True"):
        backward(InvertibleModuleWrapper(OnlyInvertible(coupling)), images())
    backward(InvertibleModuleWrapper(OnlyInvertible(coupling), keep_input=True), images())
    coupling.Gm.eval()  # one branch that draws: in the same order
    backward(InvertibleModuleWrapper(OnlyInvertible(coupling)), images())
