"""A module whose inverse is a builtin function without a signature trains as any other."""

import inspect

import pytest
import torch
from torch import nn

from memcnn import InvertibleModuleWrapper


class Shifted(nn.Module):
    inverse = staticmethod(torch.sub)

    def forward(self, x, shift):
        return x + shift


def test_an_inverse_without_a_signature_is_called_with_the_further_arguments():
    with pytest.raises(ValueError, match="no signature found"):
        inspect.signature(Shifted.inverse)
    x = torch.arange(4.0).requires_grad_()
    y = InvertibleModuleWrapper(Shifted())(2 * x, 3)
    y.square().sum().backward()
    assert torch.equal(y, 2 * x + 3) and torch.equal(x.grad, 4 * (2 * x + 3).detach())
