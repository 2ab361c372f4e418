"""Small branches, inputs and blocks that several test files use."""

import re

import pytest
import torch
from torch import Tensor, nn

from memcnn import InvertibleModuleWrapper
from properties.support.twin import images


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))


def rows(*shape: int) -> Tensor:
    return images(*(shape or (4, 6)))


def wrapped(module: nn.Module, **options) -> InvertibleModuleWrapper:
    return InvertibleModuleWrapper(module, **options).double()


class Doubling(nn.Module):
    """An invertible module that a test spoils by overriding one half of it."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return x * self.scale

    def inverse(self, y):
        return y / self.scale


def refused(error: type[Exception], *words: str):
    return pytest.raises(error, match=".*".join(re.escape(word) for word in words))


class Notes(list):
    """A list in which modules note each evaluation. The engine does not restore it for the recomputation."""
