"""Small branches, inputs and blocks that several test files use."""

import re

import pytest
import torch
from torch import Tensor, nn

from memcnn import InvertibleModuleWrapper
from properties.support.twin import images


def net() -> nn.Module:
    """Return a branch that keeps the shape (N, 3)."""
    return nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))


def rows(*shape: int) -> Tensor:
    """Return normally distributed values of this shape, (4, 6) by default, that require gradients."""
    return images(*(shape or (4, 6)))


def wrapped(module: nn.Module, **options) -> InvertibleModuleWrapper:
    """Return the module in a wrapper with these options, in float64."""
    return InvertibleModuleWrapper(module, **options).double()


class Doubling(nn.Module):
    """y = 2 x with a learned factor. Tests override ``forward`` or ``inverse`` to plant a fault."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return x * self.scale

    def inverse(self, y):
        return y / self.scale


def refused(error: type[Exception], *words: str):
    """Expect this exception, with a message that contains all the words in this order."""
    return pytest.raises(error, match=".*".join(re.escape(word) for word in words))


class Notes(list):
    """A list in which modules note each evaluation. The engine does not restore it for the recomputation."""
