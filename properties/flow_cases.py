"""Drawn chains of couplings and of the layers between them: sizes, choices and seeds are drawn, never values."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from memcnn import (
    ActNorm,
    AdditiveCoupling,
    AffineAdapterExp,
    AffineAdapterNaive,
    AffineAdapterSigmoid,
    AffineCoupling,
    ChannelPermutation,
    DepthToSpace,
    InvertibleConv1x1,
    ReversibleSequential,
    SpaceToDepth,
)
from memcnn.testing.strategies import BATCH_NORMS, CONVOLUTIONS, LEAST_STATISTICS

ADAPTERS = {"naive": AffineAdapterNaive, "sigmoid": AffineAdapterSigmoid, "exp": AffineAdapterExp,
            "exp, bound 0.5": partial(AffineAdapterExp, bound=0.5)}
KINDS = ("affine", "additive", "actnorm", "conv1x1", "permutation", "down", "up")


class Branch(nn.Module):
    """[Batch norm], convolution, tanh, convolution; keeps a shape (N, C, ...), or doubles it along ``doubled``."""

    def __init__(self, shape: Sequence[int], doubled: int | None = None, norm: bool = False):
        super().__init__()
        channels, dims = shape[1], len(shape) - 2
        norm = norm and torch.Size(shape).numel() // channels >= LEAST_STATISTICS
        self.layers = nn.Sequential(
            BATCH_NORMS[dims](channels) if norm else nn.Identity(),
            CONVOLUTIONS[dims](channels, channels, 3, padding=1),
            nn.Tanh(),
            CONVOLUTIONS[dims](channels, channels if doubled is None else 2 * channels, 1),
        )
        self.doubled = doubled

    def forward(self, x: Tensor) -> Tensor:
        h = self.layers(x)
        return h if self.doubled in (None, 1) else torch.cat(h.chunk(2, 1), self.doubled)


@dataclass(frozen=True)
class Layer:
    kind: str
    shape: tuple[int, ...]  # of its input
    split_dim: int = 1
    doubled: int = 1  # the dimension along which an affine coupling's branches put scale and shift
    adapter: str = "naive"
    norm: bool = False

    def build(self) -> nn.Module:
        half = tuple(size // 2 if i == self.split_dim % len(self.shape) else size for i, size in enumerate(self.shape))
        match self.kind:
            case "affine":
                doubled = None if self.adapter == "naive" else self.doubled
                F, G = (Branch(half, doubled, self.norm) for _ in range(2))
                return AffineCoupling(F, G, ADAPTERS[self.adapter], split_dim=self.split_dim)
            case "additive":
                F, G = (Branch(half, norm=self.norm) for _ in range(2))
                return AdditiveCoupling(F, G, split_dim=self.split_dim)
            case "actnorm":
                return ActNorm(self.shape[1])
            case "conv1x1":
                return InvertibleConv1x1(self.shape[1])
            case "permutation":
                return ChannelPermutation(torch.randperm(self.shape[1]))
            case "down":
                return SpaceToDepth()
            case "up":
                return DepthToSpace()

    @property
    def output_shape(self) -> tuple[int, ...]:
        n, channels, *sizes = self.shape
        if self.kind == "down":
            return n, channels * 2 ** len(sizes), *(size // 2 for size in sizes)
        if self.kind == "up":
            return n, channels // 2 ** len(sizes), *(2 * size for size in sizes)
        return self.shape


@dataclass(frozen=True)
class Flow:
    """Layers one after the other, with an input for them. ``build`` makes the same values every time."""

    layers: tuple[Layer, ...]
    dtype: torch.dtype
    training: bool
    channels_last: bool
    seed: int

    @property
    def depth(self) -> int:
        return len(self.layers)

    def build(self) -> ReversibleSequential:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            flow = ReversibleSequential(*(layer.build() for layer in self.layers)).to(self.dtype)
            with torch.no_grad():
                for part in flow.modules():
                    if isinstance(part, ActNorm) and not self.training:
                        part.log_scale.uniform_(-1, 1)
                        part.shift.uniform_(-1, 1)
                    elif isinstance(part, InvertibleConv1x1):
                        part.triangles.add_(0.1 * torch.randn_like(part.triangles))  # no longer orthogonal
        return flow.train(self.training)

    def input(self) -> Tensor:
        return self._normal(self.layers[0].shape)

    def output(self) -> Tensor:
        """Values of the shape of the chain's output, to be inverted."""
        return self._normal(self.layers[-1].output_shape)

    def _normal(self, shape: tuple[int, ...]) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        x = torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype)
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last and len(shape) == 4 else x


@st.composite
def flows(draw, *, kinds: Sequence[str] = KINDS, dtypes: Sequence[torch.dtype] = (torch.float64, torch.float32),
          max_depth: int = 4, max_size: int = 4, split_batch: bool = True, mix_samples: bool = True) -> Flow:
    """Chains of 1 to ``max_depth`` layers; whether couplings may split the batch, and branches mix samples."""
    sizes = [draw(st.integers(1, max_size)) for _ in range(draw(st.integers(1, 2)))]
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, max_size)), *sizes)
    even = draw(st.integers(0 if split_batch else 1, len(shape) - 1))
    shape = tuple(2 * size if i == even else size for i, size in enumerate(shape))  # so that a coupling fits
    layers = []
    for _ in range(draw(st.integers(1, max_depth))):
        splits = [i for i in range(0 if split_batch else 1, len(shape)) if shape[i] % 2 == 0]
        n, channels, *sizes = shape
        fits = {"affine": bool(splits), "additive": bool(splits), "up": channels % 2 ** len(sizes) == 0,
                "down": all(size % 2 == 0 for size in sizes),
                "actnorm": torch.Size(shape).numel() // channels >= LEAST_STATISTICS}
        kind = draw(st.sampled_from([kind for kind in kinds if fits.get(kind, True)]))
        options = {}
        if kind in ("affine", "additive"):
            split_dim = draw(st.sampled_from(splits))
            options = {"split_dim": draw(st.sampled_from([split_dim, split_dim - len(shape)])),
                       "doubled": draw(st.integers(0 if mix_samples else 1, len(shape) - 1)),
                       "adapter": draw(st.sampled_from(list(ADAPTERS))), "norm": mix_samples and draw(st.booleans())}
        layers.append(Layer(kind, shape, **options))
        shape = layers[-1].output_shape
    return Flow(tuple(layers), dtype=draw(st.sampled_from(list(dtypes))), training=draw(st.booleans()),
                channels_last=draw(st.booleans()), seed=draw(st.integers(0, 2**16)))
