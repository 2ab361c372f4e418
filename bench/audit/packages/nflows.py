"""nflows: ``transform(x)`` and ``transform.inverse(y)`` return values and log-determinants."""

import nflows.transforms as nt
from nflows.nn.nets import ResidualNet
from nflows.transforms.nonlinearities import CauchyCDF
from torch import nn

from bench.audit.packages.layers import Layer, convolutional, flow, unit

PACKAGE = "nflows"
MASK = [1, 0, 1, 0, 1, 0]
IMAGE = (3, 4, 4, 4)


def net(inputs: int, outputs: int) -> nn.Module:
    return ResidualNet(inputs, outputs, hidden_features=16, num_blocks=1)


class Image(nn.Module):
    """A convolutional network that accepts and ignores the context argument of couplings."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.net = convolutional(inputs, outputs)

    def forward(self, x, context=None):
        return self.net(x)


def coupling(name: str, *, image: bool = False, draw=lambda x: x, **options) -> Layer:
    words = ", ".join(f"{key}={value!r}" for key, value in options.items())
    return flow(
        f"{name}({words})" + (" on images" if image else ""),
        lambda: getattr(nt, name)([1, 0, 1, 0] if image else MASK, Image if image else net, **options),
        IMAGE if image else (4, 6),
        draw=draw,
    )


def _multiscale() -> nn.Module:
    composite = nt.MultiscaleCompositeTransform(2)
    shape = composite.add_transform(nt.OneByOneConvolution(4), (4, 4, 4))
    composite.add_transform(nt.OneByOneConvolution(shape[0]), shape)
    return composite


def _cached(linear: nn.Module) -> nn.Module:
    linear.use_cache()
    return linear


BATCH_NORM = {
    law: "its inverse exists in eval mode only (its documentation)"
    for law in ("inverse in train", "log_det in train", "state in train", "wrapped in train")
}
tails = {"tails": "linear", "tail_bound": 3.0}
LAYERS = [
    coupling("AffineCouplingTransform"),
    coupling("AffineCouplingTransform", image=True),
    coupling("AdditiveCouplingTransform"),
    *(
        coupling(f"Piecewise{kind}CouplingTransform", draw=unit)
        for kind in ("Linear", "Quadratic", "Cubic", "RationalQuadratic")
    ),
    *(
        coupling(f"Piecewise{kind}CouplingTransform", **tails)
        for kind in ("Linear", "Quadratic", "Cubic", "RationalQuadratic")
    ),
    coupling("PiecewiseRationalQuadraticCouplingTransform", image=True, **tails),
    coupling("PiecewiseRationalQuadraticCouplingTransform", **tails, apply_unconditional_transform=True),
    flow("MaskedAffineAutoregressiveTransform(6, 16)", lambda: nt.MaskedAffineAutoregressiveTransform(6, 16)),
    *(
        flow(
            f"MaskedPiecewise{kind}AutoregressiveTransform({options})",
            lambda kind=kind, arguments=arguments: getattr(nt, f"MaskedPiecewise{kind}AutoregressiveTransform")(
                features=6, hidden_features=16, **arguments
            ),
            draw=draw,
        )
        for kind, options, arguments, draw in [
            ("Linear", "8, 6, 16", {"num_bins": 8}, unit),
            ("Quadratic", "6, 16", {}, unit),
            ("Cubic", "8, 6, 16", {"num_bins": 8}, unit),
            ("RationalQuadratic", "6, 16", {}, unit),
            ("Quadratic", '6, 16, tails="linear"', tails, lambda x: x),
            ("RationalQuadratic", '6, 16, tails="linear"', tails, lambda x: x),
        ]
    ),
    flow("NaiveLinear(6)", lambda: nt.NaiveLinear(6)),
    flow("LULinear(6)", lambda: nt.LULinear(6)),
    flow("SVDLinear(6, 4)", lambda: nt.SVDLinear(6, 4)),
    flow("QRLinear(6, 4)", lambda: nt.QRLinear(6, 4)),
    flow("LULinear(6, using_cache=True)", lambda: _cached(nt.LULinear(6))),
    flow("SVDLinear(6, 4, using_cache=True)", lambda: _cached(nt.SVDLinear(6, 4))),
    flow("QRLinear(6, 4, using_cache=True)", lambda: _cached(nt.QRLinear(6, 4))),
    flow("OneByOneConvolution(4)", lambda: nt.OneByOneConvolution(4), IMAGE),
    flow("HouseholderSequence(6, 5)", lambda: nt.HouseholderSequence(6, 5)),
    flow("RandomPermutation(6)", lambda: nt.RandomPermutation(6)),
    flow("ReversePermutation(6)", lambda: nt.ReversePermutation(6)),
    flow("BatchNorm(6)", lambda: nt.BatchNorm(6), known=BATCH_NORM),
    flow("ActNorm(6)", lambda: nt.ActNorm(6)),
    flow("ActNorm(4) on images", lambda: nt.ActNorm(4), IMAGE),
    flow("SqueezeTransform()", lambda: nt.SqueezeTransform(), IMAGE),
    flow("SqueezeTransform(3)", lambda: nt.SqueezeTransform(3), (3, 1, 6, 6)),
    flow("PointwiseAffineTransform(1.0, 2.0)", lambda: nt.PointwiseAffineTransform(1.0, 2.0)),
    flow("IdentityTransform()", lambda: nt.IdentityTransform()),
    flow("MultiscaleCompositeTransform(2)", _multiscale, IMAGE),
    flow("Tanh()", lambda: nt.Tanh()),
    flow("LogTanh()", lambda: nt.LogTanh()),
    flow("LeakyReLU(0.1)", lambda: nt.LeakyReLU(0.1)),
    flow("Sigmoid()", lambda: nt.Sigmoid()),
    flow("Sigmoid(learn_temperature=True)", lambda: nt.Sigmoid(learn_temperature=True)),
    flow("Logit()", lambda: nt.Logit(), draw=unit),
    flow("CauchyCDF()", lambda: CauchyCDF()),
    *(
        flow(f"Piecewise{kind}CDF([6])", lambda kind=kind: getattr(nt, f"Piecewise{kind}CDF")([6]), draw=unit)
        for kind in ("Linear", "Quadratic", "Cubic", "RationalQuadratic")
    ),
    flow(
        "CompositeCDFTransform(Sigmoid(), PiecewiseRationalQuadraticCDF([6]))",
        lambda: nt.CompositeCDFTransform(nt.Sigmoid(), nt.PiecewiseRationalQuadraticCDF([6])),
    ),
]
