"""The law of copies: a module that was pickled, copied or loaded from a state dict trains exactly as the original."""

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
def test_a_copy_of_a_trained_network_trains_as_the_original(network: Network):
    other = replace(network, input=replace(network.input, seed=network.input.seed + 1))
    assert_holds(run_check(check_copies, network, make=other.build), network, "copies")
