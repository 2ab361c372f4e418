"""A residual block to convert with ``to_reversible``, and variants of it."""

import torch
import torch.nn.functional as F
from torch import nn

import memcnn
from memcnn.models.reversible_stack import ReversibleStack


class Residual(nn.Module):
    """x + gain * dropout(norm(linear(x))), dropout by its functional form."""

    def __init__(self, width: int = 6, p: float = 0.5):
        super().__init__()
        self.linear, self.norm, self.p = nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), p
        self.gain = nn.Parameter(torch.full((width,), 0.7))
        self.register_buffer("shift", torch.full((width,), 0.1), persistent=False)

    def function(self, x):
        return self.gain * F.dropout(self.norm(self.linear(x) + self.shift), self.p, self.training)

    def forward(self, x):
        return x + self.function(x)


def convert(*blocks: nn.Module) -> ReversibleStack:
    """Return the reversible stack of these blocks, converted with a sample of shape (4, 6)."""
    return memcnn.to_reversible(nn.Sequential(*blocks), torch.randn(4, 6), measure=False)[0]


def residual_block(**methods) -> nn.Module:
    """Return a ``Residual`` whose class has these methods in place of its own."""
    return type("Block", (Residual,), methods)()
