"""Parameters that start positive, and what goes wrong once training has carried one below zero."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from memcnn import InvertibleModuleWrapper
from properties.zoo.inverse_blocks import keeping
from properties.zoo.inverses import FORTH
from properties.zoo.specimen import Specimen, fault

OTHER_SIGN = " with parameters of the other sign"


class Gain(nn.Module):
    """y = g x, where g starts at one for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.g * x

    def inverse(self, y: Tensor) -> Tensor:
        return y / self.g

    def forward_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self(x), self.log_det(x).expand(len(x))

    def log_det(self, x: Tensor) -> Tensor:
        return x[0, 0].numel() * self.g.abs().log().sum()


class GainByRoot(Gain):
    """The inverse divides by a root, which is never negative."""

    def inverse(self, y: Tensor) -> Tensor:
        return y / self.g.square().sqrt()


class GainByLogarithm(Gain):
    """The inverse multiplies by exp(-log g)."""

    def inverse(self, y: Tensor) -> Tensor:
        return y * self.g.log().neg().exp()


class LogOfGain(Gain):
    """log g in place of log |g|."""

    def log_det(self, x: Tensor) -> Tensor:
        return x[0, 0].numel() * self.g.log().sum()


class Mixing(nn.Module):
    """A 1x1 convolution whose weight starts as a rotation: its determinant is 1."""

    def __init__(self) -> None:
        super().__init__()
        rotation = torch.linalg.qr(torch.randn(4, 4))[0]
        rotation[0] *= torch.det(rotation)
        self.weight = nn.Parameter(rotation)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("ij,njhw->nihw", self.weight, x)

    def inverse(self, y: Tensor) -> Tensor:
        return torch.einsum("ij,njhw->nihw", torch.linalg.inv(self.weight), y)

    def forward_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self(x), (x[0, 0].numel() * self.log_det()).expand(len(x))

    def log_det(self) -> Tensor:
        return torch.linalg.slogdet(self.weight).logabsdet


class LogOfDeterminant(Mixing):
    """``torch.logdet``, which gives NaN for a negative determinant."""

    def log_det(self) -> Tensor:
        return torch.logdet(self.weight)


class _AbsoluteGain(torch.autograd.Function):
    """|g| x, whose gradient is that of g x."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, g: Tensor) -> Tensor:
        ctx.save_for_backward(x, g)
        return g.abs() * x

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, dy: Tensor) -> tuple[Tensor, Tensor]:
        x, g = ctx.saved_tensors
        return dy * g.abs(), (dy * x).sum((0, 2, 3))[:, None, None]


class SignOfGainForgotten(Gain):
    def forward(self, x: Tensor) -> Tensor:
        return _AbsoluteGain.apply(x, self.g)

    def inverse(self, y: Tensor) -> Tensor:
        return y / self.g.abs()


class AbsoluteGain(Gain):
    def forward(self, x: Tensor) -> Tensor:
        return self.g.abs() * x

    def inverse(self, y: Tensor) -> Tensor:
        return y / self.g.abs()


class Slope(nn.Module):
    """PReLU, which folds the axis where its slope is negative."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor([0.25]))

    def forward(self, x: Tensor) -> Tensor:
        return functional.prelu(x, self.slope)

    def inverse(self, y: Tensor) -> Tensor:
        return torch.where(y > 0, y, y / self.slope)


class RootOfGain(nn.Module):
    """A scale by the square root of a parameter; neither direction is defined for a negative parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.full((4, 1, 1), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.g.sqrt() * x

    def inverse(self, y: Tensor) -> Tensor:
        return y / self.g.sqrt()


FAULTS = [
    fault(
        "scale undone by the root of its square",
        "right for g > 0",
        lambda: keeping(GainByRoot()),
        "inverse",
        FORTH + OTHER_SIGN,
        "something else than x.* right with the signs that they start with",
        stores=True,
    ),
    fault(
        "scale undone by its logarithm",
        "right for g > 0",
        lambda: keeping(GainByLogarithm()),
        "inverse",
        FORTH + OTHER_SIGN,
        "values that are not finite",
        stores=True,
    ),
    fault(
        "sign forgotten in the gradient of an absolute value",
        "in a function of its own",
        lambda: keeping(SignOfGainForgotten()),
        "gradients",
        "gradients = finite differences in float64" + OTHER_SIGN,
        "the gradient of .*g is -1 times what it should be",
        stores=True,
    ),
    fault(
        "log of a scale without its absolute value",
        "right for g > 0",
        lambda: keeping(LogOfGain()),
        "log_det",
        "forward_log_det is log|det| of the Jacobian" + OTHER_SIGN,
        "forward_log_det says nan",
        stores=True,
    ),
    fault(
        "log of a determinant without its absolute value",
        "torch.logdet",
        lambda: keeping(LogOfDeterminant()),
        "log_det",
        "forward_log_det is log|det| of the Jacobian" + OTHER_SIGN,
        "forward_log_det says nan",
        stores=True,
    ),
]
HEALTHY = [
    Specimen("scale that may be negative", Gain),
    Specimen("absolute value of a scale", AbsoluteGain),
    Specimen("log-determinant of forward alone, wrapped", lambda: InvertibleModuleWrapper(Gain())),
    Specimen("1x1 convolution that may change its orientation", Mixing),
    Specimen("PReLU, which has an inverse for positive slopes alone", Slope),
    Specimen("root of a scale, which must be positive", RootOfGain),
]
