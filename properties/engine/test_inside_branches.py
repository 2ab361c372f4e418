"""Branches that use PyTorch's tools inside: checkpoints, saved-tensor hooks, own Functions, parts without gradients."""

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from properties.support.saving import WithDropout, cloning_hooks
from properties.support.twin import (
    assert_like_twin,
    block,
    conv_branch,
    images,
    weighted_sum,
)

pytestmark = [
    pytest.mark.usefixtures("on_device"),
    pytest.mark.filterwarnings("ignore:.torch.jit.* is deprecated:DeprecationWarning"),  # torch's own use
]


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant: bool, branch=conv_branch):
        super().__init__()
        self.net = branch()
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.net, x, use_reentrant=self.use_reentrant)


class UnderHooks(nn.Module):
    """Runs under saved-tensor hooks of its own."""

    def __init__(self, hooks):
        super().__init__()
        self.net = conv_branch()
        self.hooks = hooks

    def forward(self, x: Tensor) -> Tensor:
        with self.hooks():
            return self.net(x)


class GradientInside(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = x if x.requires_grad else x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(x.tanh().square().sum(), x, create_graph=True)
        return gradient


class NoGradientInside(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            gate = self.conv(x)
        return gate * self.conv(x.detach()).sin() + x.cos()


class Exponential(torch.autograd.Function):
    """Saves its own output."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        y = x.exp()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return gradient * y


class OwnFunction(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return Exponential.apply(self.conv(x).tanh())


BRANCHES = {
    "checkpoint": lambda: Checkpointed(False),
    "checkpointed dropout": lambda: Checkpointed(False, WithDropout),
    "reentrant checkpoint": lambda: Checkpointed(True),
    "save_on_cpu": lambda: UnderHooks(save_on_cpu),
    "hooks": lambda: UnderHooks(cloning_hooks),
    "no_grad and detach": NoGradientInside,
    "a Function that saves its output": OwnFunction,
}


def chain_by_hand(model, x):
    for _ in range(3):
        x = model(x)
    weighted_sum(x).backward()
    return x


@pytest.mark.parametrize("branch", BRANCHES.values(), ids=BRANCHES)
def test_a_branch_with_tools_of_pytorch_inside_trains_as_the_twin(branch):
    assert_like_twin(block(branch), chain_by_hand, images(), depth=8)


def test_a_branch_that_differentiates_is_refused_and_runs_when_disabled():
    model = block(GradientInside)
    with pytest.raises(RuntimeError, match="GradientInside differentiates within its own forward pass.*disable=True"):
        model(images())
    model.disable = True
    weighted_sum(model(images())).backward()
