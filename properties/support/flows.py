"""Chains whose activations keep about the same size at any depth."""

from functools import partial

import torch
from torch import nn

from memcnn import (
    ActNorm,
    AdditiveCoupling,
    AffineAdapterExp,
    AffineCoupling,
    ChannelPermutation,
    DepthToSpace,
    InvertibleConv1x1,
    ReversibleSequential,
    SpaceToDepth,
)
from properties.support.twin import conv_branch


def glow(depth: int, channels: int = 8) -> ReversibleSequential:
    """Return steps of Glow (arXiv:1807.03039) with bounded scales."""

    def branch():
        half = channels // 2
        return nn.Sequential(nn.Conv2d(half, half, 3, padding=1), nn.Tanh(), nn.Conv2d(half, 2 * half, 3, padding=1))

    adapter = partial(AffineAdapterExp, bound=0.1)
    return ReversibleSequential(
        *(
            layer
            for _ in range(depth)
            for layer in (ActNorm(channels), InvertibleConv1x1(channels), AffineCoupling(branch(), branch(), adapter))
        )
    )


def nice(depth: int, channels: int = 8) -> ReversibleSequential:
    """Return additive couplings and permutations, which preserve volume, and a change of resolution there and back."""
    return ReversibleSequential(
        *(
            layer
            for _ in range(depth)
            for layer in (
                AdditiveCoupling(conv_branch(channels // 2)),
                ChannelPermutation(torch.randperm(channels)),
                SpaceToDepth(),
                DepthToSpace(),
            )
        )
    )
