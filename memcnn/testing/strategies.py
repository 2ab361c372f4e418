"""Hypothesis strategies for reversible blocks and their inputs.

They draw shapes, choices and seeds, never values, so that an example shrinks to a small one and replays from its print.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from memcnn import AdditiveCoupling, InvertibleModuleWrapper, ReversibleSequential

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
BATCH_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
ACTIVATIONS = {"tanh": nn.Tanh, "relu in place": lambda: nn.ReLU(inplace=True), "silu": nn.SiLU, "gelu": nn.GELU,
               "sigmoid": nn.Sigmoid}
LEAST_STATISTICS = 8
"""A norm divides by a standard deviation; over fewer values than this it may be close to zero, and is left out."""


@dataclass(frozen=True)
class Branch:
    """[norm], convolution, [activation], [dropout] that keeps a shape (N, C, ...)."""

    norm: str | None
    kernel: int
    activation: str | None
    dropout: float

    def build(self, shape: Sequence[int]) -> nn.Module:
        channels, dims = shape[1], len(shape) - 2
        norms = {"batch": (BATCH_NORMS[dims](channels), channels), "group": (nn.GroupNorm(1, channels), shape[0])}
        norm, statistics = norms.get(self.norm, (None, 1))
        layers = [norm] if norm and torch.Size(shape).numel() // statistics >= LEAST_STATISTICS else []
        layers.append(CONVOLUTIONS[dims](channels, channels, self.kernel, padding=self.kernel // 2))
        if self.activation is not None:
            layers.append(ACTIVATIONS[self.activation]())
        if self.dropout:
            layers.append(nn.Dropout(self.dropout))
        return nn.Sequential(*layers)


@dataclass(frozen=True)
class Chain:
    """Additive couplings one after the other, with an input for them. ``build`` makes the same values every time."""

    half: tuple[int, ...]
    split_dim: int
    branches: tuple[tuple[Branch, Branch], ...]
    training: bool
    channels_last: bool
    composition: str
    dtype: torch.dtype
    seed: int

    @property
    def depth(self) -> int:
        return len(self.branches)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the input: the half, doubled along ``split_dim``."""
        return tuple(2 * size if i == self.split_dim % len(self.half) else size for i, size in enumerate(self.half))

    def build(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            couplings = [AdditiveCoupling(F.build(self.half), G.build(self.half), split_dim=self.split_dim)
                         for F, G in self.branches]
        if self.composition == "sequential of wrapped blocks":
            chain = nn.Sequential(*map(InvertibleModuleWrapper, couplings))
        else:
            chain = ReversibleSequential(*couplings)
        return chain.to(self.dtype).train(self.training)

    def input(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        x = torch.randn(self.shape, generator=generator, dtype=torch.float64).to(self.dtype)
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last else x


def branches() -> st.SearchStrategy[Branch]:
    """A branch of a coupling."""
    return st.builds(Branch, norm=st.sampled_from([None, "group", "batch"]), kernel=st.sampled_from([1, 3]),
                     activation=st.sampled_from([None, *ACTIVATIONS]), dropout=st.sampled_from([0.0, 0.4]))


@st.composite
def chains(draw, *, dtypes: Sequence[torch.dtype] = (torch.float64, torch.float32), max_depth: int = 4,
           max_size: int = 4, training: Sequence[bool] = (True, False)) -> Chain:
    """Chains of 1 to ``max_depth`` couplings over inputs (N, C, ...) with one to three spatial dimensions."""
    dims = draw(st.integers(1, 3))
    half = tuple(draw(st.integers(1, max_size)) for _ in range(dims + 2))
    return Chain(
        half=half,
        split_dim=draw(st.integers(-len(half), len(half) - 1)),
        branches=tuple(draw(st.tuples(branches(), branches())) for _ in range(draw(st.integers(1, max_depth)))),
        training=draw(st.sampled_from(list(training))),
        channels_last=dims == 2 and draw(st.booleans()),
        composition=draw(st.sampled_from(["ReversibleSequential", "sequential of wrapped blocks"])),
        dtype=draw(st.sampled_from(list(dtypes))),
        seed=draw(st.integers(0, 2**16)),
    )
