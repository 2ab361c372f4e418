"""The law of training: after any number of optimiser steps a network and its plain twin are still the same."""

from dataclasses import replace
from functools import partial

import torch
from hypothesis import example, given
from hypothesis import strategies as st

from memcnn.testing import check_training
from memcnn.testing.cases import Network
from memcnn.testing.laws.training import sgd
from memcnn.testing.strategies import networks
from properties.support.errors import assert_holds
from properties.support.networks import INITIALISES_ITSELF, NESTED_STATISTICS, SPLITS_BY_TURNS, run_check

# Adam divides by the size of a gradient plus eps: eps must exceed gradients that consist only of rounding
OPTIMISERS = {"SGD": sgd, "Adam": partial(torch.optim.Adam, lr=1e-3, eps=1e-3)}

ALL_FROZEN = replace(NESTED_STATISTICS, frozen_every=1, input=replace(NESTED_STATISTICS.input, layout="sliced"))


@given(
    networks(dtypes=[torch.float64], training=[True], frozen=True), st.sampled_from(list(OPTIMISERS)), st.integers(2, 5)
)
@example(INITIALISES_ITSELF, "SGD", 4)
@example(NESTED_STATISTICS, "SGD", 4)
@example(SPLITS_BY_TURNS, "Adam", 4)
@example(ALL_FROZEN, "SGD", 2)
def test_a_network_and_its_twin_stay_together(device: str, network: Network, optimiser: str, steps: int):
    report = run_check(check_training, network, device, optimiser=OPTIMISERS[optimiser], steps=steps)
    assert_holds(report, network, "training")
