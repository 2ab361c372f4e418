"""Every shipped block and network, wrapped and not, and the zoo's own base classes: all must pass every check."""

from functools import partial

import torch
from torch import nn

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
    InvertibleModuleWrapper,
    ReversibleBlock,
    ReversibleSequential,
    SpaceToDepth,
)
from memcnn.models.resnet import CifarResNet, basic_branch, bottleneck_branch
from properties.support.twin import Container
from properties.zoo import corners, flows, signs, users
from properties.zoo.engine import Engine, Pair, chain_of
from properties.zoo.specimen import LARGE, Own, Specimen, branch, dropping, normalised

SCALE_AND_SHIFT = partial(branch, 2, 4)


def coupling(make=branch, **options) -> AdditiveCoupling:
    return AdditiveCoupling(make(), make(), **options)


def affine(adapter, make=SCALE_AND_SHIFT, **options) -> AffineCoupling:
    return AffineCoupling(make(), make(), adapter, **options)


def chain(*modules: nn.Module, **options) -> ReversibleSequential:
    return ReversibleSequential(*modules, **options)


def flow() -> ReversibleSequential:
    """Return a flow of all layers: a change of resolution, a step of Glow, a permutation, and the change undone."""
    return chain(
        SpaceToDepth(),
        InvertibleConv1x1(16),
        ActNorm(16),
        affine(AffineAdapterExp, partial(branch, 8, 16)),
        ChannelPermutation(torch.randperm(16)),
        DepthToSpace(),
    )


def set_actnorm() -> ActNorm:
    """Return an ActNorm after its first pass, in which it sets its own parameters."""
    layer = ActNorm(4)
    nn.init.uniform_(layer.log_scale, -1, 1)
    nn.init.uniform_(layer.shift, -1, 1)
    layer.initialised = True
    return layer


def units(branch_of, width: int, exact: bool = False) -> nn.Module:
    """The reversible units of a RevNet's stage, in a chain: the first, plain unit of a stage has no inverse."""
    stage = CifarResNet(branch_of, (3,), (width * branch_of.expansion, width), reversible=True, exact=exact).stages[0]
    return chain(*list(stage)[1:])


def embedded() -> nn.Sequential:
    return Container(
        InvertibleModuleWrapper(coupling()), ChannelPermutation([2, 0, 3, 1]), InvertibleModuleWrapper(coupling())
    )


def nested() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(4, 4, 1), InvertibleModuleWrapper(coupling()), nn.Conv2d(4, 4, 1))


HEALTHY = [
    Specimen("additive coupling", coupling),
    Specimen("additive coupling, larger", partial(coupling, normalised), shape=LARGE),
    Specimen("additive coupling, wrapped", lambda: InvertibleModuleWrapper(coupling())),
    Specimen(
        "additive coupling, wrapped, input kept",
        lambda: InvertibleModuleWrapper(coupling(), keep_input=True),
        stores=True,
    ),
    Specimen("additive coupling, split along a side", lambda: AdditiveCoupling(branch(4), branch(4), split_dim=-1)),
    Specimen("additive coupling, batch normalisation", partial(coupling, normalised)),
    Specimen("additive coupling, batch normalisation, eval", lambda: coupling(normalised).eval()),
    Specimen("additive coupling, dropout", partial(coupling, dropping)),
    Specimen("additive coupling, dropout, larger", partial(coupling, dropping), shape=LARGE),
    Specimen("additive coupling, linear", lambda: coupling(partial(nn.Linear, 3, 3), split_dim=-1), shape=(4, 5, 6)),
    Specimen("additive coupling of one branch", lambda: AdditiveCoupling(b := branch(), b)),
    Specimen("additive coupling, G frozen", lambda: frozen(coupling())),
    Specimen("additive coupling, exact", partial(coupling, normalised, exact=True), finite_differences=False),
    Specimen("affine coupling, naive", lambda: affine(AffineAdapterNaive, branch)),
    Specimen("affine coupling, sigmoid", partial(affine, AffineAdapterSigmoid)),
    Specimen("affine coupling, exponential", partial(affine, AffineAdapterExp)),
    Specimen("affine coupling, wrapped", lambda: InvertibleModuleWrapper(affine(AffineAdapterExp))),
    Specimen("reversible block", lambda: ReversibleBlock(branch(), branch())),
    Specimen(
        "reversible block, affine",
        lambda: ReversibleBlock(branch(2, 4), branch(2, 4), "affine", adapter=AffineAdapterSigmoid),
    ),
    Specimen("activation normalisation, first pass", partial(ActNorm, 4)),
    Specimen("activation normalisation", set_actnorm),
    Specimen("invertible 1x1 convolution", partial(InvertibleConv1x1, 4)),
    Specimen("channel permutation", lambda: ChannelPermutation([2, 0, 3, 1])),
    Specimen("space to depth", SpaceToDepth, shape=(2, 3, 4, 6)),
    Specimen("depth to space", DepthToSpace, shape=(2, 8, 3, 2)),
    Specimen("reversible sequence", lambda: chain(coupling(), coupling())),
    Specimen("reversible sequence, affine", lambda: chain(*(affine(AffineAdapterExp) for _ in range(2)))),
    Specimen(
        "reversible sequence, dropout and batch normalisation", lambda: chain(coupling(dropping), coupling(normalised))
    ),
    Specimen("reversible sequence, nested", lambda: chain(coupling(), chain(coupling(), set_actnorm()))),
    Specimen(
        "reversible sequence, every second stored",
        lambda: chain(*(coupling() for _ in range(3)), keep_every=2),
        stores=True,
    ),
    Specimen(
        "reversible sequence, exact",
        lambda: chain(coupling(normalised), coupling(normalised), exact=True),
        finite_differences=False,
    ),
    Specimen("wrapped blocks in a container of one's own", embedded),
    Specimen("blocks nested in branches", lambda: coupling(nested), shape=(3, 8, 3, 4)),
    Specimen("a block of one's own with blocks nested in branches", lambda: Own(nested), shape=(3, 8, 3, 4)),
    Specimen("flow", flow, shape=(3, 4, 4, 4)),
    Specimen("RevNet units", partial(units, basic_branch, 4)),
    Specimen("RevNet units, bottleneck", partial(units, bottleneck_branch, 4), shape=(3, 16, 3, 3)),
    Specimen("RevNet units, exact", partial(units, basic_branch, 4, exact=True), finite_differences=False),
    Specimen("a block of one's own", Own),
    Specimen("a block of one's own, batch normalisation", partial(Own, normalised), shape=LARGE),
    Specimen("an engine of one's own", lambda: Engine(Pair(), Pair()), wrap=False, chain=chain_of(Engine)),
    Specimen(
        "an engine of one's own, dropout",
        lambda: Engine(Pair(dropping), Pair(dropping)),
        wrap=False,
        chain=chain_of(Engine, dropping),
        shape=LARGE,
    ),
    Specimen(
        "an engine of one's own, batch normalisation",
        lambda: Engine(Pair(normalised)),
        wrap=False,
        chain=chain_of(Engine, normalised),
        shape=LARGE,
    ),
    *corners.HEALTHY,
    *flows.HEALTHY,
    *signs.HEALTHY,
    *users.HEALTHY,
]


def frozen(block: AdditiveCoupling) -> AdditiveCoupling:
    block.Gm.requires_grad_(False)
    return block
