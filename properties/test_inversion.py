"""The law of inversion: inverse(forward(x)) = x and forward(inverse(y)) = y, up to the rounding of the dtype."""

import pytest
import torch
from hypothesis import given, target

from memcnn.models.resnet import MODELS
from memcnn.testing.strategies import Chain, chains
from memcnn.testing.tolerances import relative_error, tolerance


@given(chains())
def test_inverse_undoes_forward(chain: Chain):
    module, x = chain.build(), chain.input()
    with torch.no_grad():
        check(there_and_back(chain, module, x, first=module, then=inverse_of(module)), chain)


@given(chains())
def test_forward_undoes_inverse(chain: Chain):
    module, y = chain.build(), chain.input()
    with torch.no_grad():
        check(there_and_back(chain, module, y, first=inverse_of(module), then=module), chain)


def there_and_back(chain, module, x, *, first, then) -> float:
    """The relative error of then(first(x)), with the same dropout masks both ways."""
    if chain.training:  # a dropout mask drawn anew is another function
        for part in module.modules():
            if isinstance(part, torch.nn.Dropout):
                part.eval()
    middle = first(x)
    assert middle.shape == x.shape and middle.dtype == x.dtype
    return relative_error(then(middle), x, least_scale=middle.abs().max().item())


def inverse_of(module):
    def inverse(y):
        for block in reversed(module):
            y = block.inverse(y)
        return y
    return inverse


def check(error: float, chain: Chain) -> None:
    target(error / torch.finfo(chain.dtype).eps, label="error in roundings")
    assert error <= tolerance(chain.dtype, depth=chain.depth)


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("revnet")])
def test_the_reversible_stages_of_a_network_invert(name):
    model = MODELS[name]().double()
    blocks = [module for module in model.modules() if hasattr(module, "inverse") and hasattr(module, "_fn")]
    assert len(blocks) == {"revnet38": 7, "revnet110": 25, "revnet164": 24}[name]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for block in blocks:
            channels = 2 * next(part for part in block._fn.Fm if hasattr(part, "in_channels")).in_channels
            x = torch.randn(2, channels, 8, 8, generator=generator, dtype=torch.float64)
            assert relative_error(block.inverse(block(x)), x) <= tolerance(x.dtype)
