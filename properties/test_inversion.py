"""The law of inversion: inverse(forward(x)) = x and forward(inverse(y)) = y, up to the rounding of the dtype."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

from memcnn.models.resnet import MODELS
from memcnn.testing.cases import KINDS, Network, Values
from memcnn.testing.laws.subject import without_dropout
from memcnn.testing.strategies import networks
from memcnn.testing.tolerances import relative_error, tolerance
from properties.laws import Program, condition_number, hold
from properties.twin import Outcome, run


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_each_inverse_undoes_forward_and_forward_undoes_inverse(kind: str, device: str, data: st.DataObject):
    assert_inverts(data.draw(networks(kinds=[kind], scales=(1.0, 0.01, 10.0))), device)


@given(networks(scales=(1.0, 0.01, 10.0), autocast=(False, True)))
def test_networks_of_them_invert(device: str, network: Network):
    assert_inverts(network, device)


def there_and_back(inverse: bool) -> Program:
    """Gives x, y = forward(x) and inverse(y); or y, x and forward(x)."""
    def of_network(network: Network) -> Callable[[nn.Module, Tensor], list[Tensor]]:
        @torch.no_grad()
        def program(module: nn.Module, leaf: Tensor) -> list[Tensor]:
            without_dropout(module)  # a mask drawn anew is another function
            there, back = (module.inverse, module) if inverse else (module, module.inverse)
            start = (network.output if inverse else network.input).laid_out(leaf)
            with network.context(leaf.device):
                middle = there(start)
                return [start, middle, back(middle)]
        return program
    return of_network


def difference_of_ends(actual: Outcome, expected: Outcome) -> float:
    """Relative to the end alone: beside a middle that is larger by far, an end that is lost would look small."""
    return relative_error(actual.results[-1], expected.results[-1])


def assert_inverts(network: Network, device: str) -> None:
    for law, inverse in ("inverse(forward(x)) = x", False), ("forward(inverse(y)) = y", True):
        module = network.build(device)  # one that has not initialised itself on other values
        leaf = (network.output if inverse else network.input).leaf(device)
        start, middle, end = run(module, there_and_back(inverse)(network), [leaf]).results
        assume(middle.isfinite().all())  # else a scale has overflowed
        result = network.input if inverse else network.output
        assert (middle.shape, middle.dtype) == (result.shape, result.dtype)
        hold(law, network, relative_error(end, start, least_scale=middle.abs().max().item()), depth=network.depth,
             condition=partial(condition_number, network, there_and_back(inverse), inverse=inverse,
                               difference=difference_of_ends))


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
