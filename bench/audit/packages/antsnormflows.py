"""antsnormflows: a fork of normflows that also handles volumes."""

import antsnormflows as an
import torch

from bench.audit.packages.layers import dense, flow

PACKAGE = "antsnormflows"
IMAGE, VOLUME = (3, 4, 4, 4), (2, 4, 2, 2, 2)


LAYERS = [
    flow("ActNorm(6)", lambda: an.flows.ActNorm(6), perturb=False),
    flow("ActNorm((4, 1, 1))", lambda: an.flows.ActNorm((4, 1, 1)), IMAGE, perturb=False),
    flow("BatchNorm()", lambda: an.flows.BatchNorm()),
    flow("BatchNorm() on images", lambda: an.flows.BatchNorm(), IMAGE),
    flow("Invertible1x1Conv(4)", lambda: an.flows.Invertible1x1Conv(4), IMAGE),
    flow("Invertible1x1Conv(4, use_lu=True)", lambda: an.flows.Invertible1x1Conv(4, use_lu=True), IMAGE),
    flow("Invertible1x1x1Conv(4, use_lu=True)", lambda: an.flows.Invertible1x1x1Conv(4, use_lu=True), VOLUME),
    flow("GlowBlock2d(4, 8)", lambda: an.flows.GlowBlock2d(4, 8, init_zeros=False), IMAGE),
    flow("GlowBlock3d(4, 8)", lambda: an.flows.GlowBlock3d(4, 8, init_zeros=False), VOLUME),
    flow('AffineCouplingBlock(scale_map="exp")', lambda: an.flows.AffineCouplingBlock(dense(3, 6))),
    flow(
        "MaskedAffineFlow(b, t, s)",
        lambda: an.flows.MaskedAffineFlow(torch.tensor([1.0, 0, 1, 0, 1, 0]), dense(6, 6), dense(6, 6)),
    ),
    flow("InvertibleAffine(6)", lambda: an.flows.InvertibleAffine(6)),
]
