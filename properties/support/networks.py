"""Networks on which the engine was wrong once, and a function that runs a check on a described network."""

from collections.abc import Callable

import torch

from memcnn.testing import Inverted, Report
from memcnn.testing.cases import Block, Branch, Chain, Network, Values


def run_check(
    check: Callable[..., Report], network: Network, device: str = "cpu", *, inverse: bool = False, **options
) -> Report:
    """Return the report of ``check`` on the network or, with ``inverse``, on its inverse with drawn inputs."""
    module, x = network.build(device), network.input.build(device)
    if inverse:
        module, x = Inverted(module), network.output.build(device)
    if network.autocast:
        options["autocast"] = torch.bfloat16
    return check(module, x, seed=network.input.seed, **options)


def network(
    shape,
    *layers: str,
    kind: str = "additive",
    splits=(1, 1),
    composition: str = "sequence",
    layout: str = "contiguous",
    dtype: torch.dtype = torch.float64,
    **options,
) -> Network:
    """Return a chain of couplings, one for each of ``splits``, whose branches consist of ``layers``.

    Args:
        shape: the shape of the input.
        layers: the layers of a branch, by their names or as chains.
        kind: the kind of block; branches of affine blocks double the dimension that is split.
        splits: the dimension that each coupling splits.
        composition: how the blocks form a network.
        layout: the memory layout of the input.
        dtype: the type of the input.
        options: further fields of ``Network``.
    """
    blocks = []
    for dim in splits:
        half = tuple(size // 2 if i == dim else size for i, size in enumerate(shape))
        branch = Branch(half, layers, doubled=dim if kind in ("affine sigmoid", "affine exp") else None)
        blocks.append(Block(kind, shape, branch, branch, split_dim=dim))
    return Network(Chain(tuple(blocks), composition), Values(shape, dtype, layout=layout), **options)


# A branch received views in forward and dense tensors in the recomputation, where autograd saves other tensors
VIEWS_IN_FORWARD = network((2, 4, 3, 4), "group norm", "conv 3", "tanh", layout="transposed", composition="by hand")
GAPS_IN_FORWARD = network((2, 4, 4, 3), "batch norm", "conv 3", layout="sliced", splits=(2, 1), composition="by hand")
# The recomputation could not write a rebuilt half into the memory of one that had been expanded
EXPANDED = network((3, 2, 2), "conv 3", "silu in place", kind="affine exp", layout="expanded")
# A layer that initialises itself was refused, or initialised itself again when its branch was recomputed
INITIALISES_ITSELF = network((2, 4, 4, 2), "act norm", "linear", "tanh")
# One block handed its halves to the next, which splits along another dimension
SPLITS_BY_TURNS = network((2, 4, 4), "conv 1", "tanh", "dropout", splits=(1, 1, 2, 1, -3))
# Masks follow the order of memory; drawn networks have dropout only where that is the usual order
MASKS_IN_CHANNELS_LAST = network((2, 4, 4, 4), "conv 3", "dropout", "conv 1", layout="channels_last")
# Scale and shift always lay along the channels, whatever dimension the coupling halved
SPLITS_THE_BATCH = network((4, 3, 2), "linear", "tanh", kind="affine exp", splits=(0, 2))
# The weight that autocast had rounded was not the one that was inverted
UNDER_AUTOCAST = Network(
    Chain(tuple(Block(kind, (2, 4, 3, 3)) for kind in ("conv1x1", "actnorm", "conv1x1"))),
    Values((2, 4, 3, 3)),
    autocast=True,
)
# The recomputation moved batch statistics again where one block is recomputed within another
NESTED_STATISTICS = network(
    (4, 8, 2), "conv 3", network((4, 4, 2), "batch norm", "linear", "dropout", composition="by hand").chain
)
# The sign of ActNorm's log-determinant shows only where its scale is not one
SCALES_CHANNELS = Network(Chain((Block("actnorm", (2, 4, 4, 2)),)), Values((2, 4, 4, 2), scale=3.0))
