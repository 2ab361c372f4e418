"""The law of gradients: they equal those of the network's plain twin, and finite differences.

The plain twin is a copy of the network whose wrappers have ``disable = True``: autograd stores every activation.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memcnn import InvertibleModuleWrapper
from memcnn.models.resnet import MODELS
from memcnn.testing import check_gradients
from memcnn.testing.cases import KINDS
from memcnn.testing.strategies import networks
from properties.support.errors import assert_holds
from properties.support.networks import run_check
from properties.support.twin import assert_like_twin, backward, images

each_kind = pytest.mark.parametrize("kind", KINDS)
each_direction = pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])


@each_direction
@each_kind
@given(data=st.data())
def test_gradients_are_the_twins(kind: str, inverse: bool, device: str, data: st.DataObject):
    network = data.draw(networks(kinds=[kind]))
    report = run_check(check_gradients, network, device, inverse=inverse, finite_differences=False)
    assert_holds(report, network, "gradients through inverse" if inverse else "gradients")


@each_direction
@each_kind
@given(data=st.data())
@settings(max_examples=5)
def test_gradients_are_those_of_finite_differences(kind: str, inverse: bool, data: st.DataObject):
    network = data.draw(networks(kinds=[kind], dtypes=[torch.float64], frozen=True, max_depth=2, max_size=2))
    assert_holds(run_check(check_gradients, network, inverse=inverse), network, "gradients, finite differences")


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("revnet")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_whole_network_has_the_gradients_of_its_twin(name: str, dtype: torch.dtype):
    torch.manual_seed(0)
    model = MODELS[name]().to(dtype)
    blocks = sum(isinstance(part, InvertibleModuleWrapper) for part in model.modules())
    assert_like_twin(model, backward, images(4, 3, 16, 16, dtype=dtype), depth=blocks)
