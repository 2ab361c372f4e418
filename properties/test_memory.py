"""The law of memory: a chain of reversible blocks needs the same activations at any depth, however it is composed."""

import pytest
import torch
from torch import nn

from memcnn import AdditiveCoupling, ChannelPermutation, InvertibleModuleWrapper, ReversibleSequential
from memcnn.testing.memory import TensorMeter
from properties.twin import Container, OnlyInvertible, conv_branch, images, plain_twin, weighted_sum

pytestmark = pytest.mark.usefixtures("on_device")


class ByHand(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def with_a_block_inside(branch: nn.Module) -> nn.Module:
    return nn.Sequential(branch, InvertibleModuleWrapper(AdditiveCoupling(conv_branch(2))), nn.Tanh())


COMPOSITIONS = {
    "ReversibleSequential of couplings": lambda couplings: ReversibleSequential(*couplings),
    "nn.Sequential of wrapped blocks": lambda couplings: nn.Sequential(*map(InvertibleModuleWrapper, couplings)),
    "a loop over wrapped blocks": lambda couplings: ByHand(*map(InvertibleModuleWrapper, couplings)),
    "modules with forward and inverse": lambda couplings: ReversibleSequential(*map(OnlyInvertible, couplings)),
    "blocks nested in branches": lambda couplings: ReversibleSequential(*(
        AdditiveCoupling(with_a_block_inside(c.Fm), with_a_block_inside(c.Gm)) for c in couplings)),
    "wrapped containers of wrapped blocks": lambda couplings: nn.Sequential(*(
        InvertibleModuleWrapper(Container(InvertibleModuleWrapper(c), ChannelPermutation([7, 2, 1, 0, 6, 3, 5, 4]),
                                          InvertibleModuleWrapper(AdditiveCoupling(conv_branch(4)))))
        for c in couplings)),
    "couplings that split by turns": lambda couplings: ReversibleSequential(*(
        AdditiveCoupling(c.Fm, c.Gm, split_dim=2 if i % 2 else 1) if i % 2 == 0 else
        AdditiveCoupling(conv_branch(8), split_dim=2) for i, c in enumerate(couplings))),
}


def step_bytes(chain: nn.Module, *, backward=lambda loss: loss.backward()) -> int:
    """Peak bytes of a forward and backward pass beyond the input, the parameters and their gradients."""
    x = images(4, 8, 16, 16, dtype=torch.float32)
    for parameter in [x, *chain.parameters()]:
        parameter.grad = torch.zeros_like(parameter)
    with TensorMeter() as meter:
        backward(weighted_sum(chain(x)))
    return meter.peak_bytes


def chain_of(depth: int, composition: str) -> nn.Module:
    return COMPOSITIONS[composition]([AdditiveCoupling(conv_branch(4), conv_branch(4)) for _ in range(depth)])


def slope(composition: str, depths=(4, 64), twin=lambda chain: chain, **options) -> float:
    few, many = (step_bytes(twin(chain_of(depth, composition)), **options) for depth in depths)
    return (many - few) / (depths[1] - depths[0])


@pytest.mark.parametrize("composition", COMPOSITIONS)
def test_a_further_block_costs_less_than_a_hundredth_of_its_activations(composition):
    stored = slope(composition, twin=plain_twin, depths=(2, 6))
    assert stored > 8 * 4 * 8 * 16 * 16, "the twin must store at least eight maps a block"
    assert slope(composition) < stored / 100


def test_a_retained_graph_is_flat_in_depth_too():
    def twice(loss):
        loss.backward(retain_graph=True)
        loss.backward()
    composition = "nn.Sequential of wrapped blocks"
    stored = slope(composition, twin=plain_twin, depths=(2, 6), backward=twice)
    assert slope(composition, depths=(8, 24), backward=twice) < stored / 100


def test_training_through_the_inverse_is_as_flat():
    class Inverse(ByHand):
        def forward(self, y):
            for block in reversed(self.blocks):
                y = block.inverse(y)
            return y

    def chain(depth):
        couplings = (AdditiveCoupling(conv_branch(4), conv_branch(4)) for _ in range(depth))
        return Inverse(*map(InvertibleModuleWrapper, couplings))
    stored = step_bytes(plain_twin(chain(6))) - step_bytes(plain_twin(chain(5)))
    assert step_bytes(chain(32)) - step_bytes(chain(4)) < 28 * stored / 100


def test_disabled_blocks_store_everything():
    """The plain twin is no reversible block in disguise, and the meter sees what is stored."""
    composition = "nn.Sequential of wrapped blocks"
    assert step_bytes(plain_twin(chain_of(16, composition))) > 3 * step_bytes(chain_of(16, composition))
