"""The law of inversion: inverse(forward(x)) = x and forward(inverse(y)) = y, up to the rounding of the dtype."""

from functools import partial

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from memcnn.models.resnet import MODELS
from memcnn.testing.cases import KINDS, Network, Values
from memcnn.testing.laws.subject import without_dropout
from memcnn.testing.strategies import networks
from memcnn.testing.tolerances import relative_error, tolerance
from properties.laws import condition_number, hold


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_each_inverse_undoes_forward_and_forward_undoes_inverse(kind: str, device: str, data: st.DataObject):
    assert_inverts(data.draw(networks(kinds=[kind], scales=(1.0, 0.01, 10.0))), device)


@given(networks(scales=(1.0, 0.01, 10.0), autocast=(False, True)))
def test_networks_of_them_invert(device: str, network: Network):
    assert_inverts(network, device)


@torch.no_grad()
def assert_inverts(network: Network, device: str) -> None:
    for law, values, result, inverse in (("inverse(forward(x)) = x", network.input, network.output, False),
                                         ("forward(inverse(y)) = y", network.output, network.input, True)):
        module = network.build(device)  # one that has not initialised itself on other values
        without_dropout(module)  # a mask drawn anew is another function
        there, back = (module.inverse, module) if inverse else (module, module.inverse)
        x = values.build(device)
        with network.context(device):
            middle = there(x)
            assume(middle.isfinite().all())  # else a scale has overflowed
            again = back(middle)
        assert (middle.shape, middle.dtype) == (result.shape, result.dtype)
        error = relative_error(again, x, least_scale=middle.abs().max().item())
        hold(law, network, error, depth=network.depth,
             condition=partial(condition_number, network, inverse=inverse))


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("revnet")])
def test_the_reversible_stages_of_a_network_invert(name: str):
    model = MODELS[name]().double()
    blocks = [module for module in model.modules() if hasattr(module, "inverse") and hasattr(module, "_fn")]
    assert len(blocks) == {"revnet38": 7, "revnet110": 25, "revnet164": 24}[name]
    with torch.no_grad():
        for block in blocks:
            channels = 2 * next(part for part in block._fn.Fm if hasattr(part, "in_channels")).in_channels
            x = Values((2, channels, 8, 8), torch.float64).build()
            assert relative_error(block.inverse(block(x)), x) <= tolerance(x.dtype)
