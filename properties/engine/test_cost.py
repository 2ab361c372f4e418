"""The cost of a reversible step, counted: evaluations of F and G, and the arithmetic of their convolutions."""

from collections import Counter
from fractions import Fraction

import pytest
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from memcnn import InvertibleModuleWrapper, ReversibleSequential
from properties.support.twin import OnlyInvertible, block, images, plain_twin, weighted_sum

pytestmark = pytest.mark.usefixtures("on_device")

DEPTH = 3


CHAINS = {  # and how often backward evaluates each branch
    "wrapped blocks": (lambda: nn.Sequential(*(block() for _ in range(DEPTH))), 1),
    "ReversibleSequential": (lambda: ReversibleSequential(*(block() for _ in range(DEPTH))), 1),
    "kept inputs": (lambda: nn.Sequential(*(block(keep_input=True) for _ in range(DEPTH))), 1),
    "modules with forward and inverse": (
        lambda: nn.Sequential(*(InvertibleModuleWrapper(OnlyInvertible(block()._fn)) for _ in range(DEPTH))),
        2,
    ),
}


@pytest.mark.parametrize("name", CHAINS)
def test_each_branch_is_evaluated_once_forward_and_as_often_backward_as_is_needed(name):
    make, backward = CHAINS[name]
    module = make()
    calls = Counter()
    for part_name, part in module.named_modules():
        if part_name.endswith(("Fm", "Gm")):
            forward = part.forward
            part.forward = lambda x, forward=forward, key=part_name: (calls.update([key]), forward(x))[1]
    y = module(images())
    assert set(calls.values()) == {1} and len(calls) == 2 * DEPTH
    weighted_sum(y).backward()
    assert set(calls.values()) == {1 + backward}


@pytest.mark.parametrize("name", CHAINS)
def test_the_convolutions_cost_four_thirds_of_plain_training(name):
    make, backward = CHAINS[name]
    module = make()
    plain, reversible = flops(plain_twin(module)), flops(module)
    assert Fraction(reversible, plain) == Fraction(3 + backward, 3)


def flops(module: nn.Module) -> int:
    with FlopCounterMode(display=False) as counter:
        weighted_sum(module(images())).backward()
    return counter.get_total_flops()
