"""The law of copies: what is pickled, copied or loaded from a state trains on as the original, at any moment."""

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given
from torch import nn

from memcnn.testing.cases import Network
from memcnn.testing.strategies import networks
from properties.laws import assume_finite, forward_and_backward, hold, worst
from properties.test_composition import INITIALISES_ITSELF, NESTED_STATISTICS
from properties.twin import differences, run


def pickled(module: nn.Module, network: Network) -> nn.Module:
    return pickle.loads(pickle.dumps(module))


def copied(module: nn.Module, network: Network) -> nn.Module:
    return copy.deepcopy(module)


def state_loaded(module: nn.Module, network: Network) -> nn.Module:
    """The state alone, by way of a file, in a network that started with other values."""
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other = replace(network, input=replace(network.input, seed=network.input.seed + 1)).build()
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


@pytest.mark.parametrize("duplicate", [pickled, copied, state_loaded], ids=lambda duplicate: duplicate.__name__)
@given(network=networks(frozen=True))
@example(network=INITIALISES_ITSELF)
@example(network=NESTED_STATISTICS)
def test_a_duplicate_of_a_network_that_has_trained_trains_on_as_the_network(
        duplicate: Callable[[nn.Module, Network], nn.Module], network: Network):
    module, program = network.build(), forward_and_backward(network)
    run(module, program, [network.input.leaf().requires_grad_()])
    module.zero_grad()
    twin = duplicate(module, network)
    assert not {t.data_ptr() for t in module.parameters()} & {t.data_ptr() for t in twin.parameters()}
    assert [p.requires_grad for p in twin.parameters()] == [p.requires_grad for p in module.parameters()]
    leaf = network.input.leaf().cos().requires_grad_()
    actual, expected = run(twin, program, [leaf]), run(module, program, [leaf])
    assume_finite(expected)
    hold("copies", network, worst(differences(actual, expected).values()), depth=network.depth, condition=lambda _: 1.0)
