"""The law of gradients: those of plain backpropagation through the same block, and those of finite differences."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from memcnn import InvertibleModuleWrapper
from memcnn.models.resnet import MODELS
from memcnn.testing.cases import KINDS, LAYERS, RANDOM_LAYERS
from memcnn.testing.strategies import networks
from properties.laws import (
    assert_network_like_twin,
    condition_number,
    forward_and_backward,
    inverse_and_backward,
)
from properties.twin import assert_like_twin, backward, images

each_kind = pytest.mark.parametrize("kind", KINDS)


@each_kind
@given(data=st.data())
def test_gradients_buffers_and_random_numbers_are_the_twins(kind: str, device: str, data: st.DataObject):
    assert_network_like_twin("gradients", data.draw(networks(kinds=[kind])), forward_and_backward, device)


@each_kind
@given(data=st.data())
def test_training_through_the_inverse_is_the_twins(kind: str, device: str, data: st.DataObject):
    assert_network_like_twin("gradients through inverse", data.draw(networks(kinds=[kind])), inverse_and_backward,
                             device, inverse=True)


@each_kind
@given(data=st.data())
@settings(max_examples=5)
def test_gradients_are_those_of_finite_differences(kind: str, data: st.DataObject):
    network = data.draw(networks(
        kinds=[kind], layers=[name for name in LAYERS if name not in RANDOM_LAYERS], dtypes=[torch.float64],
        layouts=["contiguous"], training=[False], max_depth=2, max_size=2))
    module = network.build()
    for function, values, program in ((module, network.input, forward_and_backward),
                                      (module.inverse, network.output, inverse_and_backward)):
        # else what is rebuilt may overflow
        assume(condition_number(network, program, inverse=program is inverse_and_backward) < 1e6)
        inputs = values.leaf().requires_grad_(), *list(module.parameters())[:3]
        assume(function(inputs[0]).abs().max() < 1e4)  # where scales explode, a small difference is none
        assert torch.autograd.gradcheck(lambda x, *_, function=function: function(x), inputs, fast_mode=True)


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("revnet")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_whole_network_has_the_gradients_of_its_twin(name: str, dtype: torch.dtype):
    torch.manual_seed(0)
    model = MODELS[name]().to(dtype)
    blocks = sum(isinstance(part, InvertibleModuleWrapper) for part in model.modules())
    x = images(4, 3, 16, 16, dtype=dtype)
    assert_like_twin(model, backward, x, depth=blocks)
