"""normflows: ``layer(z)`` and ``layer.inverse(z)`` return values and log-determinants."""

import normflows as nf
import torch
from torch import Tensor, nn

from bench.audit.packages.layers import Flow, Layer, bounded, convolutional, dense, flow

PACKAGE = "normflows"
IMAGE = (3, 4, 4, 4)
MASK = torch.tensor([1.0, 0, 1, 0, 1, 0])


class Parts(nn.Module):
    """An adapter for layers with one input and several outputs."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.layer(x)[0])

    def inverse(self, *y: Tensor) -> Tensor:
        return self.layer.inverse(list(y))[0]


class ClassConditional(Flow):
    """An adapter for layers that depend on a class. It holds fixed one-hot labels as a buffer."""

    def __init__(self, layer: nn.Module):
        super().__init__(layer)
        self.register_buffer("label", torch.eye(3)[[0, 1, 2, 1]])

    def forward_log_det(self, x: Tensor):
        return self.pair(self.layer(x, self.label), x)

    def inverse_log_det(self, y: Tensor):
        return self.pair(self.layer.inverse(y, self.label), y)


def _residual(**options) -> nn.Module:
    net = nf.nets.LipschitzMLP([2, 16, 2], init_zeros=False, lipschitz_const=0.7)
    return nf.flows.Residual(net, **options)


def _planar() -> nn.Module:
    return nf.flows.Planar((6,), act="leaky_relu")


ESTIMATED = {"log_det": "estimated with random vectors where there are more than two features (its documentation)"}
LAYERS = [
    flow("AffineConstFlow(6)", lambda: nf.flows.AffineConstFlow(6)),
    flow("AffineConstFlow((4, 1, 1))", lambda: nf.flows.AffineConstFlow((4, 1, 1)), IMAGE),
    Layer("CCAffineConst(6, 3)", lambda: ClassConditional(nf.flows.CCAffineConst(6, 3))),
    *(
        flow(
            f"AffineCouplingBlock({scale_map=}, {split_mode=})".replace("'", '"'),
            lambda scale_map=scale_map, split_mode=split_mode: nf.flows.AffineCouplingBlock(
                dense(3, 6), scale_map=scale_map, split_mode=split_mode
            ),
        )
        for scale_map, split_mode in [("exp", "channel"), ("sigmoid", "channel_inv"), ("sigmoid_inv", "channel")]
    ),
    flow("AffineCouplingBlock(scale=False)", lambda: nf.flows.AffineCouplingBlock(dense(3, 3), scale=False)),
    flow(
        'AffineCouplingBlock(split_mode="checkerboard")',
        lambda: nf.flows.AffineCouplingBlock(convolutional(4, 8), split_mode="checkerboard"),
        IMAGE,
    ),
    flow(
        'AffineCouplingBlock(split_mode="checkerboard_inv")',
        lambda: nf.flows.AffineCouplingBlock(convolutional(4, 8), split_mode="checkerboard_inv"),
        IMAGE,
    ),
    flow("MaskedAffineFlow(b, t, s)", lambda: nf.flows.MaskedAffineFlow(MASK, dense(6, 6), dense(6, 6))),
    flow("MaskedAffineFlow(b, t)", lambda: nf.flows.MaskedAffineFlow(MASK, dense(6, 6))),
    flow("MaskedAffineAutoregressive(6, 16)", lambda: nf.flows.MaskedAffineAutoregressive(6, 16)),
    flow("GlowBlock(4, 8)", lambda: nf.flows.GlowBlock(4, 8, init_zeros=False), IMAGE, perturb=False),
    flow(
        'GlowBlock(4, 8, use_lu=False, split_mode="checkerboard")',
        lambda: nf.flows.GlowBlock(4, 8, init_zeros=False, use_lu=False, split_mode="checkerboard"),
        IMAGE,
        perturb=False,
    ),
    flow("ActNorm(6)", lambda: nf.flows.ActNorm(6), perturb=False),
    flow("ActNorm((4, 1, 1))", lambda: nf.flows.ActNorm((4, 1, 1)), IMAGE, perturb=False),
    flow("Invertible1x1Conv(4)", lambda: nf.flows.Invertible1x1Conv(4), IMAGE),
    flow("Invertible1x1Conv(4, use_lu=True)", lambda: nf.flows.Invertible1x1Conv(4, use_lu=True), IMAGE),
    flow("InvertibleAffine(6)", lambda: nf.flows.InvertibleAffine(6)),
    flow("InvertibleAffine(6, use_lu=False)", lambda: nf.flows.InvertibleAffine(6, use_lu=False)),
    flow("LULinearPermute(6)", lambda: nf.flows.LULinearPermute(6)),
    flow('Permute(5, mode="swap")', lambda: nf.flows.Permute(5, mode="swap"), (4, 5)),
    flow("Permute(6)", lambda: nf.flows.Permute(6)),
    flow("Squeeze()", lambda: nf.flows.Squeeze(), (3, 8, 2, 2)),
    *(
        Layer(f'Split("{mode}")', lambda mode=mode: Parts(nf.flows.Split(mode)), IMAGE)
        for mode in ("channel", "channel_inv", "checkerboard", "checkerboard_inv")
    ),
    flow('Planar((6,), act="leaky_relu")', _planar),
    flow("PeriodicWrap([0, 2], 3.0)", lambda: nf.flows.PeriodicWrap([0, 2], 3.0), draw=lambda x: 2.9 * bounded(x)),
    flow(
        "PeriodicShift([0, 2], 3.0, 0.5)",
        lambda: nf.flows.PeriodicShift([0, 2], 3.0, 0.5),
        draw=lambda x: 2.9 * bounded(x),
    ),
    flow("CoupledRationalQuadraticSpline(6, 1, 16)", lambda: nf.flows.CoupledRationalQuadraticSpline(6, 1, 16)),
    flow(
        "AutoregressiveRationalQuadraticSpline(6, 1, 16)",
        lambda: nf.flows.AutoregressiveRationalQuadraticSpline(6, 1, 16, init_identity=False),
    ),
    flow(
        "CircularCoupledRationalQuadraticSpline(6, 1, 16, [0, 1])",
        lambda: nf.flows.CircularCoupledRationalQuadraticSpline(6, 1, 16, [0, 1], init_identity=False),
    ),
    flow(
        "CircularAutoregressiveRationalQuadraticSpline(6, 1, 16, [0, 1])",
        lambda: nf.flows.CircularAutoregressiveRationalQuadraticSpline(6, 1, 16, [0, 1], init_identity=False),
    ),
    flow("Residual(LipschitzMLP([2, 16, 2]))", _residual, (4, 2), perturb=False, known=ESTIMATED),
    flow(
        "Residual(..., reduce_memory=False, exact_trace=True)",
        lambda: _residual(reduce_memory=False, exact_trace=True),
        (4, 2),
        perturb=False,
        known=ESTIMATED,
    ),
    flow(
        "Residual(..., reverse=False, brute_force=True)",
        lambda: _residual(reverse=False, reduce_memory=False, brute_force=True),
        (4, 2),
        perturb=False,
    ),
    flow(
        "Composite([...])",
        lambda: nf.flows.base.Composite(
            [nf.flows.InvertibleAffine(6), nf.flows.MaskedAffineFlow(MASK, dense(6, 6), dense(6, 6))]
        ),
    ),
    flow("Reverse(...)", lambda: nf.flows.base.Reverse(nf.flows.InvertibleAffine(6))),
]
