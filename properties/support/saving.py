"""Branches and hooks for tests of what autograd saves."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from properties.support.twin import conv_branch


class WithDropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = conv_branch()

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.net(x), 0.4)


def cloning_hooks():
    return saved_tensors_hooks(torch.clone, lambda saved: saved)
