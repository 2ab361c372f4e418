"""The law of gradients: those of plain backpropagation through the same block, and those of finite differences."""

import pytest
import torch
from hypothesis import given, settings

from memcnn import InvertibleModuleWrapper
from memcnn.models.resnet import MODELS
from memcnn.testing.strategies import Chain, chains
from properties.twin import assert_like_twin, backward, images, weighted_sum


@given(chains())
def test_gradients_buffers_and_random_numbers_are_the_twins(chain: Chain):
    assert_like_twin(chain.build(), backward, chain.input().requires_grad_(), depth=2 * chain.depth)


@given(chains())
def test_training_through_the_inverse_is_the_twins(chain: Chain):
    def inverse(module, y):
        for block in reversed(module):
            y = block.inverse(y)
        weighted_sum(y).backward()
        return y
    assert_like_twin(chain.build(), inverse, chain.input().requires_grad_(), depth=2 * chain.depth)


@given(chains(dtypes=[torch.float64], max_depth=2, max_size=2))
@settings(max_examples=10)
def test_gradients_are_those_of_finite_differences(chain: Chain):
    module, x = chain.build(), chain.input().requires_grad_()
    for part in module.modules():
        if isinstance(part, (torch.nn.Dropout, torch.nn.modules.batchnorm._BatchNorm)):
            part.eval()  # finite differences need the same function at every call
    parameters = list(module.parameters())[:2]
    assert torch.autograd.gradcheck(lambda x, *_: module(x), (x, *parameters), fast_mode=True)


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("revnet")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_whole_network_has_the_gradients_of_its_twin(name, dtype):
    torch.manual_seed(0)
    model = MODELS[name]().to(dtype)
    blocks = sum(isinstance(part, InvertibleModuleWrapper) for part in model.modules())
    x = images(4, 3, 16, 16, dtype=dtype)
    assert_like_twin(model, backward, x, depth=blocks)
