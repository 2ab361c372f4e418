"""The law of training: after any number of optimiser steps a network and its plain twin are still the same."""

from collections.abc import Callable
from functools import partial

import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn

from memcnn.testing.cases import KINDS, Network
from memcnn.testing.strategies import networks
from properties.laws import assert_network_like_twin, differentiated
from properties.test_composition import INITIALISES_ITSELF, NESTED_STATISTICS, SPLITS_BY_TURNS
from properties.twin import weighted_sum

OPTIMISERS = {
    "SGD": partial(torch.optim.SGD, lr=1e-2, momentum=0.9, weight_decay=1e-3),
    # Adam divides by the size of a gradient plus eps: that of one which is rounding alone must stay below eps
    "Adam": partial(torch.optim.Adam, lr=1e-3, eps=1e-3),
}


def training(optimiser: str, steps: int) -> Callable[[Network], Callable]:
    def of_network(network: Network) -> Callable[[nn.Module, Tensor], list[Tensor]]:
        def program(module: nn.Module, leaf: Tensor) -> list[Tensor]:
            parameters = [p for p in module.parameters() if p.requires_grad]
            optimizer = OPTIMISERS[optimiser]([*parameters, leaf])
            outputs = []
            for step in range(steps):
                torch.manual_seed(step)
                optimizer.zero_grad()
                y = module(network.input.laid_out(leaf) + 0.1 * step)
                differentiated(weighted_sum(y) / y.numel())  # a mean, or training soon leaves what can be inverted
                outputs.append(y)
                optimizer.step()
            return [*outputs, *(p.detach().clone() for p in parameters), leaf.detach().clone()]
        return program
    return of_network


@given(networks(dtypes=[torch.float64], training=[True], frozen=True), st.sampled_from(list(OPTIMISERS)),
       st.integers(2, 5))
@example(INITIALISES_ITSELF, "SGD", 4)
@example(NESTED_STATISTICS, "SGD", 4)
@example(SPLITS_BY_TURNS, "Adam", 4)
def test_a_network_and_its_twin_stay_together(device: str, network: Network, optimiser: str, steps: int):
    """Parameters, outputs of every step, running statistics, and the random numbers that dropout has drawn."""
    assert_network_like_twin("training", network, training(optimiser, steps), device,
                             depth=2 * steps * network.depth)


@given(networks(dtypes=[torch.float64], training=[True], max_depth=2,
                kinds=[kind for kind in KINDS if "to" not in kind]), st.sampled_from(list(OPTIMISERS)))
def test_evaluation_after_training_is_the_twins(device: str, network: Network, optimiser: str):
    """The running statistics that training has left are what evaluation uses, forward and inverse."""
    def of_network(network: Network):
        def program(module: nn.Module, leaf: Tensor) -> list[Tensor]:
            training(optimiser, 3)(network)(module, leaf)
            module.eval()
            with torch.no_grad():
                return [module(network.input.laid_out(leaf)), module.inverse(network.input.laid_out(leaf))]
        return program
    assert_network_like_twin("evaluation after training", network, of_network, device, depth=8 * network.depth)
