"""The law of state: a step leaves buffers, modes and generators as ordinary training does, and the caller's tensors
unchanged."""

import pytest
from hypothesis import example, given, settings

from memcnn.testing import check_state
from memcnn.testing.cases import Network
from memcnn.testing.strategies import networks
from properties.support.errors import assert_holds
from properties.support.networks import (
    EXPANDED,
    INITIALISES_ITSELF,
    MASKS_IN_CHANNELS_LAST,
    NESTED_STATISTICS,
    UNDER_AUTOCAST,
    VIEWS_IN_FORWARD,
    run_check,
)


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@given(network=networks(autocast=(False, True), frozen=True))
@example(network=VIEWS_IN_FORWARD)
@example(network=EXPANDED)
@example(network=INITIALISES_ITSELF)
@example(network=NESTED_STATISTICS)
@example(network=MASKS_IN_CHANNELS_LAST)
@example(network=UNDER_AUTOCAST)
@settings(max_examples=settings.default.max_examples // 2 + 1)
def test_a_step_changes_only_what_ordinary_training_changes(inverse: bool, device: str, network: Network):
    assert_holds(
        run_check(check_state, network, device, inverse=inverse),
        network,
        "state, through inverse" if inverse else "state",
    )
