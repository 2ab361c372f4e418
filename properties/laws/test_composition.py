"""The law of composition: drawn networks of drawn blocks compute what their plain twins compute, and invert.

Everything is drawn at once: branches (convolutions, linear, attention, normalisations, activations, dropout, nested
blocks), couplings and layers of flows, shapes, splits, layouts in memory, precision, mode, what is frozen, and how the
blocks are wrapped and composed.
"""

import pytest
from hypothesis import example, given
from torch import nn

from memcnn import AdditiveCoupling, InvertibleModuleWrapper
from memcnn.testing import check_gradients, check_inverse
from memcnn.testing.cases import Network
from memcnn.testing.strategies import networks
from properties.support.errors import assert_holds
from properties.support.networks import (
    EXPANDED,
    GAPS_IN_FORWARD,
    INITIALISES_ITSELF,
    MASKS_IN_CHANNELS_LAST,
    NESTED_STATISTICS,
    SPLITS_BY_TURNS,
    SPLITS_THE_BATCH,
    UNDER_AUTOCAST,
    VIEWS_IN_FORWARD,
    run_check,
)
from properties.support.twin import OnlyInvertible, backward, images

everything = networks(autocast=(False, True), frozen=True)


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@given(network=everything)
@example(network=MASKS_IN_CHANNELS_LAST)
@example(network=VIEWS_IN_FORWARD)
@example(network=GAPS_IN_FORWARD)
@example(network=EXPANDED)
@example(network=INITIALISES_ITSELF)
@example(network=SPLITS_BY_TURNS)
@example(network=SPLITS_THE_BATCH)
@example(network=UNDER_AUTOCAST)
@example(network=NESTED_STATISTICS)
def test_a_network_has_the_gradients_of_its_twin(inverse: bool, device: str, network: Network):
    report = run_check(check_gradients, network, device, inverse=inverse, finite_differences=False)
    assert_holds(report, network, "composition, inverse" if inverse else "composition")


@given(networks(autocast=(False, True), scales=(1.0, 0.01, 10.0)))
@example(SPLITS_BY_TURNS)
@example(UNDER_AUTOCAST)
def test_a_network_inverts(device: str, network: Network):
    assert_holds(run_check(check_inverse, network, device, deepest=1), network, "inverse")


def test_a_module_whose_inverse_draws_random_numbers_in_another_order_is_refused():
    """F would get the masks of G, and G those of F, and gradients would be silently wrong."""
    coupling = AdditiveCoupling(nn.Sequential(nn.Conv2d(3, 3, 1), nn.Dropout(0.4))).double()
    with pytest.raises(RuntimeError, match="OnlyInvertible draws random numbers .* use keep_input=True"):
        backward(InvertibleModuleWrapper(OnlyInvertible(coupling)), images())
    backward(InvertibleModuleWrapper(OnlyInvertible(coupling), keep_input=True), images())
    coupling.Gm.eval()  # only F draws now, so the order is the same in both directions
    backward(InvertibleModuleWrapper(OnlyInvertible(coupling)), images())
