"""FrEIA: layers take and return tuples, ``layer((x,), rev=False) -> (y,), log_det``."""

import FrEIA.modules as fm
import torch
from torch import Tensor, nn

from bench.audit.packages.layers import Flow, Layer, Pair, convolutional, dense

PACKAGE = "FrEIA"
VECTOR, IMAGE = (6,), (4, 6, 6)


class Adapter(Flow):
    """An adapter for layers with one input and one output."""

    def forward_log_det(self, x: Tensor) -> Pair:
        (y,), log_det = self.layer((x,))
        return self.pair((y, log_det), x)

    def inverse_log_det(self, y: Tensor) -> Pair:
        (x,), log_det = self.layer((y,), rev=True)
        return self.pair((x, log_det), y)


class Estimated(Adapter):
    """An adapter for IResNetLayer, which needs gradients enabled because it differentiates for its log-determinant."""

    def forward_log_det(self, x: Tensor) -> Pair:
        with torch.enable_grad():
            return super().forward_log_det(x.view_as(x).requires_grad_() if not x.requires_grad else x.view_as(x))

    def inverse_log_det(self, y: Tensor) -> Pair:
        with torch.enable_grad():
            return super().inverse_log_det(y.view_as(y).requires_grad_() if not y.requires_grad else y.view_as(y))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer((x,), jac=False)[0][0]

    def inverse(self, y: Tensor) -> Tensor:
        return self.layer((y,), rev=True, jac=False)[0][0]


class NoLogDet(nn.Module):
    """An adapter for layers without a log-determinant; FrEIA takes ``jac=False`` for them."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer((x,), jac=False)[0][0]

    def inverse(self, y: Tensor) -> Tensor:
        return self.layer((y,), rev=True, jac=False)[0][0]


class Conditional(Flow):
    """An adapter for conditional layers. It holds one fixed condition as a buffer."""

    def __init__(self, layer: nn.Module, condition: Tensor):
        super().__init__(layer)
        self.register_buffer("condition", condition)

    def forward_log_det(self, x: Tensor) -> Pair:
        (y,), log_det = self.layer((x,), [self.condition])
        return self.pair((y, log_det), x)

    def inverse_log_det(self, y: Tensor) -> Pair:
        (x,), log_det = self.layer((y,), [self.condition], rev=True)
        return self.pair((x, log_det), y)


class Parts(nn.Module):
    """An adapter for layers with one input and several outputs."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.layer((x,))[0])

    def inverse(self, *y: Tensor) -> Tensor:
        return self.layer(y, rev=True)[0][0]


class Mixture(Flow):
    """A Gaussian mixture. A fixed index selects the component for each sample."""

    def __init__(self):
        super().__init__(fm.GaussianMixtureModel([VECTOR], [(2,), (2, 6), (2, 21)]))
        self.weights = nn.Parameter(torch.rand(4, 2).softmax(-1), requires_grad=False)
        self.mean = nn.Parameter(torch.randn(4, 2, 6))
        self.entries = nn.Parameter(0.3 * torch.randn(4, 2, 21))

    def condition(self) -> list:
        return [self.weights, self.mean, self.entries, torch.tensor([0, 1, 1, 0])]

    def forward_log_det(self, x: Tensor) -> Pair:
        (y,), log_det = self.layer((x,), self.condition())
        return y, log_det

    def inverse_log_det(self, y: Tensor) -> Pair:
        (x,), log_det = self.layer((y,), self.condition(), rev=True)
        return x, log_det


def vector(name: str, **options) -> Layer:
    return Layer(_shown(name, options), lambda: Adapter(getattr(fm, name)([VECTOR], **options)), (4, *VECTOR))


def image(name: str, shape: tuple[int, ...] = IMAGE, **options) -> Layer:
    return Layer(
        f"{_shown(name, options)} on images", lambda: Adapter(getattr(fm, name)([shape], **options)), (3, *shape)
    )


def _shown(name: str, options: dict) -> str:
    words = [f"{key}={value}" for key, value in options.items() if not callable(value) and not torch.is_tensor(value)]
    return f"{name}({', '.join(words)})"


AUTOENCODER = {
    law: "its inverse is the transpose of its weight, only asymptotically the inverse (its documentation)"
    for law in ("inverse", "wrapped")
}
couplings = (
    "NICECouplingBlock",
    "RNVPCouplingBlock",
    "GLOWCouplingBlock",
    "GINCouplingBlock",
    "AffineCouplingOneSided",
)
LAYERS = [
    *(vector(name, subnet_constructor=dense) for name in couplings),
    *(image(name, subnet_constructor=convolutional) for name in couplings),
    vector("GLOWCouplingBlock", subnet_constructor=dense, clamp_activation="TANH", split_len=0.3),
    vector("RNVPCouplingBlock", subnet_constructor=dense, clamp_activation="SIGMOID", split_len=1),
    Layer(
        "ConditionalAffineTransform(dims_c)",
        lambda: Conditional(
            fm.ConditionalAffineTransform([VECTOR], [(3,)], subnet_constructor=dense), torch.randn(4, 3)
        ),
    ),
    Layer(
        "GLOWCouplingBlock(dims_c)",
        lambda: Conditional(fm.GLOWCouplingBlock([VECTOR], [(3,)], subnet_constructor=dense), torch.randn(4, 3)),
    ),
    vector("AllInOneBlock", subnet_constructor=dense),
    image("AllInOneBlock", subnet_constructor=convolutional),
    vector("AllInOneBlock", subnet_constructor=dense, gin_block=True),
    vector("AllInOneBlock", subnet_constructor=dense, permute_soft=True, global_affine_type="SIGMOID"),
    vector("AllInOneBlock", subnet_constructor=dense, reverse_permutation=True, global_affine_type="EXP"),
    vector("AllInOneBlock", subnet_constructor=dense, learned_householder_permutation=2),
    image(
        "AllInOneBlock", subnet_constructor=convolutional, learned_householder_permutation=2, reverse_permutation=True
    ),
    vector("ActNorm"),
    image("ActNorm"),
    Layer(
        "IResNetLayer()",
        lambda: _lipschitz(fm.IResNetLayer([(2,)], hutchinson_samples=1)),
        (4, 2),
        perturb=False,
        known={"log_det": "estimated with random vectors (its documentation)"},
    ),
    vector("HouseholderPerm", n_reflections=2),
    vector("HouseholderPerm", n_reflections=3),
    vector("HouseholderPerm", n_reflections=4, fixed=True),
    Layer(
        "HouseholderPerm(dims_c)",
        lambda: Conditional(fm.HouseholderPerm([VECTOR], [(12,)], n_reflections=2), torch.randn(4, 12)),
    ),
    Layer("OrthogonalTransform()", lambda: Adapter(fm.OrthogonalTransform([VECTOR])), perturb=False),
    vector("PermuteRandom"),
    Layer(
        "FixedLinearTransform(M, b)",
        lambda: Adapter(fm.FixedLinearTransform([VECTOR], M=torch.eye(6) + 0.3 * torch.randn(6, 6), b=torch.randn(6))),
    ),
    Layer(
        "Fixed1x1Conv(M)",
        lambda: Adapter(fm.Fixed1x1Conv([IMAGE], M=torch.eye(4) + 0.3 * torch.randn(4, 4))),
        (3, *IMAGE),
    ),
    vector("InvertibleSigmoid"),
    image("InvertibleSigmoid"),
    vector("InvAutoAct"),
    vector("InvAutoActTwoSided"),
    image("InvAutoActTwoSided"),
    Layer("InvAutoFC()", lambda: NoLogDet(fm.InvAutoFC([VECTOR])), known=AUTOENCODER),
    Layer("InvAutoConv2D()", lambda: NoLogDet(fm.InvAutoConv2D([IMAGE])), (3, *IMAGE), known=AUTOENCODER),
    vector("LearnedElementwiseScaling"),
    image("LearnedElementwiseScaling"),
    image("IRevNetDownsampling"),
    image("IRevNetDownsampling", legacy_backend=True),
    image("IRevNetUpsampling", (8, 3, 3)),
    image("HaarDownsampling"),
    image("HaarDownsampling", order_by_wavelet=True, rebalance=0.5),
    image("HaarUpsampling", (8, 3, 3)),
    image("Flatten"),
    image("Reshape", output_dims=(16, 3, 3)),
    Layer("Split()", lambda: Parts(fm.Split([VECTOR]))),
    Layer(
        "Split(section_sizes=(1, 2), dim=1)", lambda: Parts(fm.Split([IMAGE], section_sizes=(1, 2), dim=1)), (3, *IMAGE)
    ),
    Layer("GaussianMixtureModel(dims_c)", Mixture),
]


def _lipschitz(layer: fm.IResNetLayer) -> Flow:
    layer.lipschitz_correction()
    return Estimated(layer)
