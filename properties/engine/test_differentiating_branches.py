"""Branches that differentiate within their forward pass, such as Hamiltonian networks."""

import math

import pytest
import torch
from torch import Tensor, nn

from memcnn.engine.recompute import Activation
from properties.support.blocks import Notes, net, refused, rows
from properties.support.held import living
from properties.support.twin import assert_like_twin, backward, block, weighted_sum

pytestmark = pytest.mark.usefixtures("on_device")


class Hamiltonian(nn.Module):
    """Returns the gradient of a scalar function with respect to the input, as Hamiltonian networks do."""

    def __init__(self, between=nn.Identity):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), between(), nn.Linear(5, 1))

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            energy = self.net(x).sum()
            (gradient,) = torch.autograd.grad(energy, x, create_graph=True)
        return gradient / math.sqrt(3)


@pytest.mark.parametrize(
    "between", [nn.Identity, nn.Sigmoid, lambda: nn.Dropout(0.5)], ids=["plain", "saves its output", "dropout"]
)
@pytest.mark.parametrize("requires_grad", [True, False])
def test_a_branch_that_differentiates_itself_works_with_kept_inputs(between, requires_grad):
    def branch() -> nn.Module:
        return Hamiltonian(between)

    module = nn.Sequential(block(branch, keep_input=True), block(net), block(branch, keep_input=True))
    assert_like_twin(module, backward, rows().detach().requires_grad_(requires_grad))


def test_a_branch_that_differentiates_itself_is_differentiated_twice_with_a_retained_graph():
    def program(module: nn.Module, x: Tensor) -> Tensor:
        y = module(x)
        weighted_sum(y).backward(retain_graph=True)
        weighted_sum(y * y).backward()
        return y

    assert_like_twin(block(Hamiltonian, keep_input=True), program, rows())


def test_a_branch_that_differentiates_itself_is_refused_in_the_forward_pass_without_kept_inputs():
    with refused(RuntimeError, "differentiates within its own forward pass", "keep_input=True"):
        block(Hamiltonian)(rows())


def test_kept_activations_are_dropped_when_the_evaluation_ends():
    before = {id(activation) for activation in living(Activation)}
    y = block(net, keep_input=True)(rows())
    made = [activation for activation in living(Activation) if id(activation) not in before]
    assert made and all(activation.tensor is None for activation in made)
    weighted_sum(y).backward()


def test_a_branch_that_differentiates_itself_in_the_recomputation_alone_is_refused():
    class Late(Hamiltonian):
        def __init__(self):
            super().__init__()
            self.seen = Notes()

        def forward(self, x: Tensor) -> Tensor:
            self.seen.append(None)
            return self.net(x).expand_as(x) if len(self.seen) == 1 else super().forward(x)

    y = block(Late)(rows())
    with refused(RuntimeError, "Late differentiates within its own forward pass in the recomputation", "keep_input"):
        weighted_sum(y).backward()
