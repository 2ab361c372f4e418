"""Descriptions of tensors, branches, blocks and networks, which hypothesis draws and ``build`` makes.

A description holds shapes, choices and seeds, never values: it shrinks to a small one, prints as the code that makes
it, and builds the same values every time. The strategies are in ``memcnn.testing.strategies``.
"""

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from math import prod

import torch
from torch import Tensor, nn

from memcnn.models.additive import AdditiveCoupling
from memcnn.models.affine import AffineAdapterExp, AffineAdapterNaive, AffineAdapterSigmoid, AffineCoupling
from memcnn.models.flows import ActNorm, InvertibleConv1x1
from memcnn.models.rearrange import ChannelPermutation, DepthToSpace, SpaceToDepth
from memcnn.models.revop import InvertibleModuleWrapper, ReversibleSequential
from memcnn.testing.adapters import inverse_of

Shape = tuple[int, ...]

LAYOUTS = ("contiguous", "channels_last", "transposed", "sliced", "expanded")
"""How a tensor lies in memory. A sliced one has gaps, an expanded one holds one sample under several indices."""


@dataclass(frozen=True)
class Values:
    """A tensor of normally distributed values."""

    shape: Shape
    dtype: torch.dtype = torch.float32
    seed: int = 0
    scale: float = 1.0
    layout: str = "contiguous"

    def leaf(self, device: str = "cpu") -> Tensor:
        """Return a leaf with the values; ``laid_out`` makes the tensor from it."""
        n, *others, last = self.shape
        shape = {"sliced": (n, *others, 2 * last), "expanded": (1, *others, last)}.get(self.layout, self.shape)
        if self.layout == "transposed":
            *others, last_but_one, last = self.shape
            shape = (*others, last, last_but_one)
        generator = torch.Generator().manual_seed(self.seed)
        values = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
        return (self.scale * values).to(device, self.dtype)

    def laid_out(self, leaf: Tensor) -> Tensor:
        """Return the tensor, of shape ``shape``, as a differentiable function of ``leaf``."""
        match self.layout:
            case "channels_last":
                formats = {4: torch.channels_last, 5: torch.channels_last_3d}
                return leaf.contiguous(memory_format=formats.get(leaf.dim(), torch.contiguous_format))
            case "transposed":
                return leaf.transpose(-1, -2)
            case "sliced":
                return leaf[..., ::2]
            case "expanded":
                return leaf.expand(self.shape)
        return leaf

    def build(self, device: str = "cpu") -> Tensor:
        """Return the tensor, of shape ``shape``."""
        return self.laid_out(self.leaf(device))


class Attention(nn.Module):
    """Self-attention over (N, L, features), with nonzero biases.

    Without them it maps zeros to zeros, where a following ReLU has its kink.
    """

    def __init__(self, features: int, dropout: float = 0.0):
        super().__init__()
        heads = 2 if features % 2 == 0 else 1
        self.attention = nn.MultiheadAttention(features, heads, dropout=dropout, batch_first=True)
        for bias in self.attention.in_proj_bias, self.attention.out_proj.bias:
            nn.init.uniform_(bias, -0.5, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Doubled(nn.Module):
    """x, and x once more with a learned factor, side by side along ``dim``."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim, self.factor = dim, nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.factor * x], self.dim)


class OnlyInvertible(nn.Module):
    """A block that shows a wrapper only ``forward`` and ``inverse``."""

    def __init__(self, coupling: nn.Module):
        super().__init__()
        self.coupling = coupling

    def forward(self, x: Tensor) -> Tensor:
        return self.coupling(x)

    def inverse(self, y: Tensor) -> Tensor:
        return inverse_of(self.coupling)(y)


class ByHand(nn.Sequential):
    """An ordinary ``nn.Sequential`` of wrapped blocks, and the loop that inverts it."""

    def inverse(self, y: Tensor) -> Tensor:
        for block in reversed(self):
            y = inverse_of(block)(y)
        return y


def _convolution(kernel: int, shape: Shape) -> nn.Module:
    return (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(shape) - 3](shape[1], shape[1], kernel, padding=kernel // 2)


def _batch_norm(shape: Shape) -> nn.Module:
    return (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[len(shape) - 2](shape[1])


def _instance_norm(shape: Shape) -> nn.Module:
    norm = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[len(shape) - 3]
    return norm(shape[1], affine=True, track_running_stats=True)


NORMS: dict[str, Callable[[Shape], nn.Module]] = {
    "batch norm": _batch_norm,
    "group norm": lambda shape: nn.GroupNorm(1, shape[1]),
    "layer norm": lambda shape: nn.LayerNorm(shape[1:]),
    "instance norm": _instance_norm,
    "act norm": lambda shape: ActNorm(shape[1]),
}
MIXERS: dict[str, Callable[[Shape], nn.Module]] = {
    "conv 1": partial(_convolution, 1),
    "conv 3": partial(_convolution, 3),
    "linear": lambda shape: nn.Linear(shape[-1], shape[-1]),
    "attention": lambda shape: Attention(shape[-1]),
    "attention with dropout": lambda shape: Attention(shape[-1], dropout=0.3),
}
ACTIVATIONS: dict[str, Callable[[Shape], nn.Module]] = {
    "tanh": lambda _: nn.Tanh(),
    "sigmoid": lambda _: nn.Sigmoid(),
    "gelu": lambda _: nn.GELU(),
    "silu in place": lambda _: nn.SiLU(inplace=True),
    "elu in place": lambda _: nn.ELU(inplace=True),
    "relu": lambda _: nn.ReLU(),
    "relu in place": lambda _: nn.ReLU(inplace=True),
}
NESTED = "nested blocks"
BUILDERS = {**NORMS, **MIXERS, **ACTIVATIONS, "dropout": lambda _: nn.Dropout(0.4)}
LAYERS = (*BUILDERS, NESTED)
"""The layers that branches are made of."""
RANDOM_LAYERS = ("dropout", "attention with dropout")
KINKED_LAYERS = ("relu", "relu in place")
"""Rounding may move a value across their kink and so change a gradient entirely."""
LEAST_STATISTICS = 8
"""Fewest values over which a norm is drawn.

Over fewer, the standard deviation that it divides by may be close to zero."""


def fitting_layers(shape: Shape, layers: Collection[str] = LAYERS) -> list[str]:
    """Return those of ``layers`` that accept inputs of ``shape``, (N, C, ...)."""
    n, channels, *sizes = shape
    of_channel, of_sample = n * prod(sizes), channels * prod(sizes)
    values = {
        "batch norm": of_channel,
        "act norm": of_channel,
        "group norm": of_sample,
        "layer norm": of_sample,
        "instance norm": prod(sizes),
    }
    fits = {
        **{name: count >= LEAST_STATISTICS for name, count in values.items()},
        "conv 1": 1 <= len(sizes) <= 3,
        "conv 3": 1 <= len(sizes) <= 3,
        "attention": len(shape) == 3,
        "attention with dropout": len(shape) == 3,
        NESTED: any(size % 2 == 0 for size in shape),
    }
    return [name for name in layers if fits.get(name, True)]


@dataclass(frozen=True)
class Branch:
    """F or G: a sequence of layers that keep ``shape``, each a name or a nested chain.

    If ``doubled`` is given, a last layer doubles that dimension.
    """

    shape: Shape
    layers: tuple["str | Chain", ...]
    doubled: int | None = None

    @property
    def depth(self) -> int:
        """The number of nested blocks."""
        return sum(layer.depth for layer in self.layers if isinstance(layer, Chain))

    def build(self) -> nn.Module:
        layers = [BUILDERS[layer](self.shape) if isinstance(layer, str) else layer.build() for layer in self.layers]
        return nn.Sequential(*layers, *([] if self.doubled is None else [Doubled(self.doubled)]))


ADAPTERS = {"affine naive": AffineAdapterNaive, "affine sigmoid": AffineAdapterSigmoid, "affine exp": AffineAdapterExp}
COUPLINGS = ("additive", *ADAPTERS)
KINDS = (*COUPLINGS, "actnorm", "conv1x1", "permutation", "space to depth", "depth to space")


@dataclass(frozen=True)
class Block:
    """A coupling or a layer of a flow for inputs of ``shape``."""

    kind: str
    shape: Shape
    F: Branch | None = None
    G: Branch | None = None
    split_dim: int = 1

    @property
    def depth(self) -> int:
        return 1 + sum(branch.depth for branch in (self.F, self.G) if branch is not None)

    @property
    def output_shape(self) -> Shape:
        n, channels, *sizes = self.shape
        if self.kind == "space to depth":
            return n, channels * 2 ** len(sizes), *(size // 2 for size in sizes)
        if self.kind == "depth to space":
            return n, channels // 2 ** len(sizes), *(2 * size for size in sizes)
        return self.shape

    def build(self) -> nn.Module:
        if self.kind in COUPLINGS:
            if self.F is None or self.G is None:
                raise ValueError(f"a block of kind {self.kind!r} needs the branches F and G: got {self}")
            F, G = self.F.build(), self.G.build()
            if self.kind == "additive":
                return AdditiveCoupling(F, G, split_dim=self.split_dim)
            return AffineCoupling(F, G, ADAPTERS[self.kind], split_dim=self.split_dim)
        channels = self.shape[1]
        return {
            "actnorm": lambda: ActNorm(channels),
            "conv1x1": lambda: InvertibleConv1x1(channels),
            "permutation": lambda: ChannelPermutation(torch.randperm(channels)),
            "space to depth": SpaceToDepth,
            "depth to space": DepthToSpace,
        }[self.kind]()


COMPOSITIONS = ("sequence", "by hand", "sequences in a sequence", "only invertible")


@dataclass(frozen=True)
class Chain:
    """Blocks one after the other, wrapped and composed in one of the ways of ``COMPOSITIONS``."""

    blocks: tuple[Block, ...]
    composition: str = "sequence"
    keep_every: int | None = None

    @property
    def depth(self) -> int:
        return sum(block.depth for block in self.blocks)

    def build(self) -> nn.Module:
        """Return a module with ``forward`` and ``inverse``."""
        blocks = [block.build() for block in self.blocks]
        match self.composition:
            case "by hand":
                return ByHand(*map(InvertibleModuleWrapper, blocks))
            case "only invertible":
                blocks = [OnlyInvertible(block) for block in blocks]
            case "sequences in a sequence":
                parts = [part for part in (blocks[:1], blocks[1:]) if part]
                blocks = [ReversibleSequential(*part, keep_every=self.keep_every) for part in parts]
        return ReversibleSequential(*blocks, keep_every=self.keep_every)


@dataclass(frozen=True)
class Network:
    """A chain, its input, its mode, and which of its parameters are frozen.

    Attributes:
        chain: the blocks.
        input: the input of the chain.
        training: the mode.
        autocast: run forward and inverse under bfloat16 autocast.
        frozen_every: freeze every n-th parameter; 1 freezes all, 0 none.
    """

    chain: Chain
    input: Values
    training: bool = True
    autocast: bool = False
    frozen_every: int = 0

    @property
    def dtype(self) -> torch.dtype:
        return self.input.dtype

    @property
    def depth(self) -> int:
        return self.chain.depth

    @property
    def kind(self) -> str:
        """The kind of its blocks, or "mixed"."""
        kinds = {block.kind for block in self.chain.blocks}
        return kinds.pop() if len(kinds) == 1 else "mixed"

    @property
    def output(self) -> Values:
        """Values of the shape of the chain's output, as inputs of the inverse."""
        return replace(self.input, shape=self.chain.blocks[-1].output_shape)

    def build(self, device: str = "cpu") -> nn.Module:
        """Return the module on ``device``; the state of torch's CPU generator is as before."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.input.seed)  # torch.manual_seed would seed all GPUs, too
            module = self.chain.build().to(self.dtype)
            with torch.no_grad():
                for part in module.modules():
                    if isinstance(part, ActNorm) and not self.training:
                        part.log_scale.uniform_(-1, 1)
                        part.shift.uniform_(-1, 1)
                    elif isinstance(part, InvertibleConv1x1):
                        part.triangles.add_(0.1 * torch.randn_like(part.triangles))  # no longer orthogonal
        for i, parameter in enumerate(module.parameters()):
            parameter.requires_grad_(not (self.frozen_every and i % self.frozen_every == 0))
        return module.to(device).train(self.training)

    def context(self, device: str = "cpu") -> AbstractContextManager:
        """Return the context in which its forward pass runs."""
        return torch.autocast(torch.device(device).type, torch.bfloat16) if self.autocast else nullcontext()
