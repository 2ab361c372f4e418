"""Hypothesis strategies for tensors, for the branches F and G, and for reversible blocks and networks of them.

They draw descriptions (``memcnn.testing.cases``), which ``build`` turns into tensors and modules. For a block of your
own, which changes each half of its channels by a function F of the other half::

    @settings(deadline=None)
    @given(shapes().flatmap(lambda shape: branches(shape, mix_samples=False)), st.integers(0, 2**16))
    def test_my_block(branch, seed):
        n, half, *sizes = branch.shape
        assert check_all(MyBlock(branch.build()), Values((n, 2 * half, *sizes), seed=seed).build()).passed

``deadline=None``, since an example takes longer than the 200 ms that hypothesis allows by default.
``settings(max_examples=...)`` says how many are tried: 100 if not given. ``mix_samples=False`` leaves out BatchNorm and
its like, with which the log-determinant of a single sample is not defined. If your block has no log-determinant, you
can omit it.
"""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from hypothesis import strategies as st

from memcnn.testing.cases import (
    ACTIVATIONS,
    ADAPTERS,
    COMPOSITIONS,
    COUPLINGS,
    KINDS,
    KINKED_LAYERS,
    LAYERS,
    LAYOUTS,
    LEAST_STATISTICS,
    MIXERS,
    NESTED,
    NORMS,
    RANDOM_LAYERS,
    Block,
    Branch,
    Chain,
    Network,
    Shape,
    Values,
    fitting_layers,
)

__all__ = ["blocks", "branches", "chains", "networks", "shapes", "tensors"]

DTYPES = (torch.float64, torch.float32)
SEEDS = st.integers(0, 2**16)


@st.composite
def shapes(draw: st.DrawFn, *, max_size: int = 4, max_spatial: int = 3, double_batch: bool = True) -> Shape:
    """(N, C, ...) with up to ``max_spatial`` further dimensions. At least one size is even; without
    ``double_batch`` this is not N.
    """
    shape = [
        draw(st.integers(1, 3)),
        *(draw(st.integers(1, max_size)) for _ in range(1 + draw(st.integers(0, max_spatial)))),
    ]
    shape[draw(st.integers(0 if double_batch else 1, len(shape) - 1))] *= 2
    return tuple(shape)


@st.composite
def tensors(
    draw: st.DrawFn,
    shape: Shape | None = None,
    *,
    dtypes: Sequence[torch.dtype] = DTYPES,
    layouts: Sequence[str] = LAYOUTS,
    scales: Sequence[float] = (1.0, 0.01, 10.0),
) -> Values:
    """Normally distributed values of ``shape``, or of a drawn shape."""
    return Values(
        shape=shape or draw(shapes()),
        dtype=draw(st.sampled_from(dtypes)),
        seed=draw(SEEDS),
        scale=draw(st.sampled_from(scales)),
        layout=draw(st.sampled_from(layouts)),
    )


@st.composite
def branches(
    draw: st.DrawFn,
    shape: Shape,
    *,
    layers: Collection[str] = LAYERS,
    doubled: int | None = None,
    mix_samples: bool = True,
) -> Branch:
    """[norm], convolution, linear or attention layer, [activation], [nested reversible blocks], [dropout].

    It keeps ``shape``, (N, C, ...), or doubles it along ``doubled``. It has only ``layers`` that fit the shape.

    mix_samples: whether a sample's result may depend on other samples.
    """
    fitting = fitting_layers(shape, layers)
    norms = [name for name in NORMS if name in fitting and (mix_samples or name not in ("batch norm", "act norm"))]
    drawn: list[str | Chain | None] = [
        draw(st.sampled_from([None, *norms])),
        draw(st.sampled_from([name for name in MIXERS if name in fitting])),
        draw(st.sampled_from([None, *(name for name in ACTIVATIONS if name in fitting)])),
    ]
    if NESTED in fitting and (mix_samples or any(size % 2 == 0 for size in shape[1:])) and draw(st.integers(0, 4)) == 4:
        inner = [name for name in layers if name != NESTED]
        drawn.append(
            draw(
                chains(
                    shape, kinds=COUPLINGS, layers=inner, max_depth=2, split_batch=mix_samples, mix_samples=mix_samples
                )
            )
        )
    if "dropout" in fitting and draw(st.booleans()):
        drawn.append("dropout")
    return Branch(shape, tuple(layer for layer in drawn if layer is not None), doubled)


@st.composite
def blocks(
    draw: st.DrawFn,
    shape: Shape,
    *,
    kinds: Collection[str] = KINDS,
    layers: Collection[str] = LAYERS,
    split_batch: bool = True,
    mix_samples: bool = True,
) -> Block:
    """A coupling or a layer of a flow, of those ``kinds`` that fit inputs of ``shape``.

    split_batch: whether a coupling may halve the batch.
    """
    kind = draw(st.sampled_from([kind for kind in kinds if _fits(kind, shape, split_batch)]))
    if kind not in COUPLINGS:
        return Block(kind, shape)
    split_dim = draw(st.sampled_from(_splits(shape, split_batch)))
    half = tuple(size // 2 if i == split_dim else size for i, size in enumerate(shape))
    doubles = kind in ADAPTERS and kind != "affine naive"
    doubled = draw(st.integers(0 if mix_samples else 1, len(shape) - 1)) if doubles else None
    branch = branches(half, layers=layers, doubled=doubled, mix_samples=mix_samples)
    return Block(kind, shape, draw(branch), draw(branch), split_dim - draw(st.sampled_from([0, len(shape)])))


@st.composite
def chains(
    draw: st.DrawFn,
    shape: Shape,
    *,
    max_depth: int = 4,
    compositions: Sequence[str] = COMPOSITIONS,
    kinds: Collection[str] = KINDS,
    layers: Collection[str] = LAYERS,
    split_batch: bool = True,
    **options: Any,
) -> Chain:
    """1 to ``max_depth`` blocks, the first for inputs of ``shape``; further options are those of ``blocks``."""
    composition = draw(st.sampled_from(compositions))
    if composition == "only invertible":  # its inverse would draw the masks of F and G in another order
        layers = [name for name in layers if name not in RANDOM_LAYERS]
    drawn = []
    for _ in range(draw(st.integers(1, max_depth))):
        if any(_fits(kind, shape, split_batch) for kind in kinds):
            drawn.append(draw(blocks(shape, kinds=kinds, layers=layers, split_batch=split_batch, **options)))
            shape = drawn[-1].output_shape
    keep_every = draw(st.sampled_from([None, 2, 3])) if composition.startswith("sequence") else None
    return Chain(tuple(drawn), composition, keep_every)


@st.composite
def networks(
    draw: st.DrawFn,
    *,
    dtypes: Sequence[torch.dtype] = DTYPES,
    layouts: Sequence[str] = LAYOUTS,
    scales: Sequence[float] = (1.0,),
    training: Sequence[bool] = (True, False),
    autocast: Sequence[bool] = (False,),
    frozen: bool = False,
    kinds: Collection[str] = KINDS,
    layers: Collection[str] = LAYERS,
    max_size: int = 4,
    split_batch: bool = True,
    **options: Any,
) -> Network:
    """Chains with an input, a mode and a precision; further options are those of ``chains``.

    autocast: drawn for float32 alone, and then without "conv 3" of volumes.
    frozen: whether parameters may be frozen.
    """
    dtype, layout = draw(st.sampled_from(dtypes)), draw(st.sampled_from(layouts))
    under_autocast = dtype == torch.float32 and draw(st.sampled_from(autocast))
    if under_autocast:  # the stream of nested blocks would be in low precision, and the engine warns of that
        layers = [name for name in layers if name != NESTED]
    if dtype != torch.float64:
        layers = [name for name in layers if name not in KINKED_LAYERS]
    if layout != "contiguous":  # a mask is drawn in the order of memory, which a chain may choose where sizes are 1
        layers = [name for name in layers if name not in RANDOM_LAYERS]
    if layout == "expanded":  # ActNorm would initialise itself from channels that may be constant
        layers, kinds = [name for name in layers if name != "act norm"], [kind for kind in kinds if kind != "actnorm"]
    shape = draw(
        shapes(max_size=max_size, double_batch=split_batch).filter(
            lambda shape: any(_fits(kind, shape, split_batch) for kind in kinds)
        )
    )
    if (
        under_autocast and len(shape) == 5
    ):  # CPUs convolve them wrong: bench/audit/packages/reproductions/torch_conv3d.py
        layers = [name for name in layers if name != "conv 3"]
    chain = draw(chains(shape, kinds=kinds, layers=layers, split_batch=split_batch, **options))
    return Network(
        chain,
        draw(tensors(shape, dtypes=[dtype], layouts=[layout], scales=scales)),
        training=draw(st.sampled_from(training)),
        autocast=under_autocast,
        frozen_every=draw(st.sampled_from([0, 3, 2, 1])) if frozen else 0,
    )


def _splits(shape: Shape, split_batch: bool) -> list[int]:
    return [dim for dim, size in enumerate(shape) if size % 2 == 0 and (dim or split_batch)]


def _fits(kind: str, shape: Shape, split_batch: bool) -> bool:
    """Return whether a block of this kind can take inputs of ``shape``."""
    _, channels, *sizes = shape
    if kind in COUPLINGS:
        return bool(_splits(shape, split_batch))
    return {
        "actnorm": torch.Size(shape).numel() // channels >= LEAST_STATISTICS,
        "space to depth": bool(sizes) and all(size % 2 == 0 for size in sizes),
        "depth to space": bool(sizes) and channels % 2 ** len(sizes) == 0,
    }.get(kind, True)
