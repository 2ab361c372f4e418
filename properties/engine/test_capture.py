"""While a CUDA graph is captured, a reversible block works as ever or says what it cannot do."""

import pytest
import torch
from torch import nn

from memcnn import AdditiveCoupling, InvertibleModuleWrapper
from memcnn.models import capture, replay
from properties.support.twin import backward, block, conv_branch, images, plain_twin

DROPOUT = nn.Sequential(nn.Dropout(0.5), nn.Conv2d(3, 3, 1))


@pytest.fixture
def capturing(monkeypatch):
    """Every device is one whose work goes into a graph."""
    for module in (capture, replay):
        monkeypatch.setattr(module, "is_captured", lambda device: True)


def test_no_generator_is_asked_in_a_capture_and_gradients_are_the_twins(capturing, monkeypatch):
    def forbidden(*_):
        raise RuntimeError("Cannot call CUDAGeneratorImpl::current_seed during CUDA graph capture")

    monkeypatch.setattr(replay, "_rng_state", forbidden)
    module = block(lambda: nn.Sequential(conv_branch(), nn.GELU(approximate="tanh")))
    twin = plain_twin(module)
    for one in (module, twin):
        backward(one, images())
    for p, q in zip(module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_a_branch_that_draws_random_numbers_is_refused_in_a_capture(capturing):
    module = InvertibleModuleWrapper(AdditiveCoupling(DROPOUT, conv_branch())).double()
    with pytest.raises(RuntimeError, match="Sequential draws random numbers .*disable=True"):
        module(images())
    plain_twin(module)(images())
    InvertibleModuleWrapper(AdditiveCoupling(DROPOUT, conv_branch()), preserve_rng_state=False).double()(images())


@pytest.mark.parametrize(
    ("exact", "check_inverse", "fix"), [(True, None, "use exact=False"), (False, 1e-3, "leave it out there")]
)
def test_checks_that_read_values_are_refused_in_a_capture(capturing, exact, check_inverse, fix):
    coupling = AdditiveCoupling(conv_branch(), conv_branch(), exact=exact)
    module = InvertibleModuleWrapper(coupling, check_inverse=check_inverse).double()
    with pytest.raises(RuntimeError, match=f"impossible while a CUDA graph is captured: {fix}"):
        backward(module, images())
