"""The law of copies: what is pickled, copied or loaded from a state trains on as the original, at any moment."""

from dataclasses import replace

from hypothesis import example, given

from memcnn.testing import check_copies
from memcnn.testing.cases import Network
from memcnn.testing.strategies import networks
from properties.support.errors import assert_holds
from properties.support.networks import INITIALISES_ITSELF, NESTED_STATISTICS, run_check


@given(networks(frozen=True))
@example(INITIALISES_ITSELF)
@example(NESTED_STATISTICS)
def test_a_copy_of_a_network_that_has_trained_trains_on_as_the_network(network: Network):
    other = replace(network, input=replace(network.input, seed=network.input.seed + 1))
    assert_holds(run_check(check_copies, network, make=other.build), network, "copies")
