"""The law of inversion: inverse(forward(x)) = x and forward(inverse(y)) = y, up to the rounding of the dtype."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memcnn import InvertibleModuleWrapper
from memcnn.models.resnet import MODELS
from memcnn.testing import check_inverse
from memcnn.testing.cases import KINDS, Network, Values
from memcnn.testing.strategies import networks
from properties.support.errors import assert_holds
from properties.support.networks import run_check

SCALES = (1.0, 0.01, 10.0)


@pytest.mark.parametrize("inverse", [False, True], ids=["forward first", "inverse first"])
@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_each_direction_undoes_the_other(kind: str, inverse: bool, device: str, data: st.DataObject):
    assert_inverts(data.draw(networks(kinds=[kind], scales=SCALES)), device, inverse)


@pytest.mark.parametrize("inverse", [False, True], ids=["forward first", "inverse first"])
@given(network=networks(scales=SCALES, autocast=(False, True)))
def test_networks_of_all_kinds_invert(inverse: bool, device: str, network: Network):
    assert_inverts(network, device, inverse)


def assert_inverts(network: Network, device: str, inverse: bool) -> None:
    """Assert the law of inversion, starting from inputs or, with ``inverse``, from normally distributed outputs."""
    report = run_check(check_inverse, network, device, inverse=inverse, deepest=1)
    assert_holds(report, network, "inverse, from outputs" if inverse else "inverse")


@given(networks(autocast=(False, True)))
def test_both_directions_give_the_described_shape_and_dtype(device: str, network: Network):
    module = network.build(device)
    with torch.no_grad(), network.context(device):
        y = module(network.input.build(device))
        x = module.inverse(network.output.build(device))
    assert (y.shape, y.dtype) == (network.output.shape, network.output.dtype)
    assert (x.shape, x.dtype) == (network.input.shape, network.input.dtype)


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("revnet")])
def test_the_reversible_stages_of_a_network_invert(name: str):
    model = MODELS[name]().double()
    blocks = [module for module in model.modules() if isinstance(module, InvertibleModuleWrapper)]
    assert len(blocks) == {"revnet38": 7, "revnet110": 25, "revnet164": 24}[name]
    for block in blocks:
        channels = 2 * next(part for part in block.modules() if hasattr(part, "in_channels")).in_channels
        report = check_inverse(block, Values((2, channels, 8, 8), torch.float64).build(), deepest=1)
        assert report.passed and not any(result.skipped for result in report), report
