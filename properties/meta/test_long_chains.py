"""Long chains are checked in minutes: gradients are compared in groups, and fewer examples are drawn."""

from functools import partial

import pytest
import torch
from torch import nn

from memcnn import AdditiveCoupling, ReversibleSequential
from memcnn.testing import search
from memcnn.testing.example import Example
from memcnn.testing.laws.differences import MOST_WRONG, like_finite_differences
from memcnn.testing.laws.subject import Subject
from memcnn.testing.laws.twin import duplicate

EXAMPLE = Example(((2, 4, 3, 3),), torch.float64, "cpu")
BLOCKS = 8
ONE_BY_ONE = 2 * 4
"""Passes for one tensor by itself: in two directions, central differences with a step and with half of it."""


class Counted(nn.Module):
    """Passes its input on; ``passes`` counts how often, in all copies together."""

    passes = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        Counted.passes += 1
        return x


class Branch(nn.Module):
    """A convolution, and the gradient of its weight times ``factor``."""

    def __init__(self, factor: float = 1.0):
        super().__init__()
        self.convolution, self.factor, self.counted = nn.Conv2d(2, 2, 3, padding=1), factor, Counted()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.convolution.weight
        weight = self.factor * weight + (1 - self.factor) * weight.detach()
        return nn.functional.conv2d(self.counted(x), weight, self.convolution.bias, padding=1).relu()


def chain(*wrong: int) -> ReversibleSequential:
    return ReversibleSequential(
        *(AdditiveCoupling(Branch(1.5 if i in wrong else 1.0), Branch()) for i in range(BLOCKS))
    )


def compared(*wrong: int):
    """Return the result for a chain with these blocks wrong, and the number of passes that it took."""
    Counted.passes = 0
    subject = Subject(EXAMPLE.module(partial(chain, *wrong)), tuple(EXAMPLE.inputs()))
    result = like_finite_differences(subject, explain=False)
    return result, Counted.passes / (2 * BLOCKS)


def test_the_one_wrong_gradient_of_a_chain_is_found_in_a_few_passes():
    result, passes = compared(5)
    assert result.failed
    assert (
        "gradient of 5." in result.explanation
        and "Fm.convolution.weight is 1.5 times what it should be" in result.explanation
    )
    tensors = 4 * BLOCKS + 1
    assert passes < ONE_BY_ONE * tensors


def test_a_chain_with_only_wrong_gradients_is_reported():
    result, _ = compared(*range(BLOCKS))
    assert result.failed and "1.5 times what it should be" in result.explanation
    assert MOST_WRONG > BLOCKS, "the check examines every wrong gradient of this chain"
    assert compared()[0].verdict == "PASS"


@pytest.mark.parametrize(("longest", "examples"), [(0.0, search.LEAST_EXAMPLES), (1e9, 2 + 8)])
def test_a_law_stops_drawing_when_its_time_is_over(longest, examples):
    found = search.search(
        lambda: AdditiveCoupling(nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)),
        EXAMPLE,
        "inverse",
        modes=(True, False),
        vary=(),
        max_examples=8,
        first_seed=0,
        options={"deepest": 0},
        longest=longest,
    )
    assert found.examples == examples and found.out_of_time == (longest == 0.0)


def test_a_duplicate_shares_nothing_with_the_module():
    class Owner(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution, self.recurrent, self.norm = nn.Conv2d(2, 2, 3), nn.GRU(2, 2), nn.BatchNorm2d(2)
            self.tied, self.values, self.table = self.convolution, [torch.ones(2), {"a": torch.ones(1)}], {1: [2]}
            self.computed = self.convolution.weight * 2
            self.convolution.register_forward_hook(lambda *_: None)

    module = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), Owner()
    module = nn.Sequential(*module)
    copy = duplicate(module)
    assert [n for n, _ in copy.named_modules()] == [n for n, _ in module.named_modules()]
    assert copy[1].tied is copy[1].convolution and copy[1].table == {1: [2]}
    assert len(copy[1].convolution._forward_hooks) == 1
    tensors = list(zip([*copy.parameters(), *copy.buffers()], [*module.parameters(), *module.buffers()], strict=True))
    tensors += [(copy[1].values[0], module[1].values[0]), (copy[1].values[1]["a"], module[1].values[1]["a"])]
    tensors += [
        (copy[1].computed, module[1].computed),
        (copy[1].recurrent._flat_weights[0], module[1].recurrent.weight_ih_l0),
    ]
    assert all(torch.equal(a, b) and a.data_ptr() != b.data_ptr() and type(a) is type(b) for a, b in tensors)
    assert copy[1].recurrent._flat_weights[0] is copy[1].recurrent.weight_ih_l0
    copy[1].table[1].append(3)
    assert module[1].table == {1: [2]}
