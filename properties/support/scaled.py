"""A branch whose subclasses have a state, and a program that changes this state before its backward pass."""

import pytest
from torch import Tensor, nn

from properties.support.twin import backward, block, weighted_sum


class Scaled(nn.Module):
    """A branch whose ``scale()`` is defined by a subclass."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.scale(x)
        return (self.linear(x) * scale).tanh()


def chain(branch, **options) -> nn.Module:
    return nn.Sequential(block(branch, **options), block(branch, **options))


def twice(module: nn.Module, x: Tensor) -> Tensor:
    """Run two forward passes and one backward pass: when the first pass is rebuilt, the state has changed."""
    y = module(x) + module(x + 1)
    weighted_sum(y).backward()
    return y


PROGRAMS = pytest.mark.parametrize("program", [backward, twice], ids=lambda program: program.__name__)
