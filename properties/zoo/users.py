"""Blocks as users write them by hand, without a coupling: affine maps, rotations, shuffles, fixed points."""

import torch
from torch import Tensor, nn

from properties.zoo.corner_blocks import Scale
from properties.zoo.inverse_blocks import keeping
from properties.zoo.inverses import FORTH
from properties.zoo.specimen import Own, Specimen, branch, dropping, fault, halves, whole


class AffineByHand(nn.Module):
    """y2 = x2 exp(s(x1)) + t(x1), with dropout in s and t: under autocast the scale is a bfloat16."""

    def __init__(self):
        super().__init__()
        self.s, self.t = dropping(), dropping()

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = halves(x)
        s, t = self.s(x1).tanh(), self.t(x1)
        return whole(x1, x2 * s.exp() + t)

    def inverse(self, y: Tensor) -> Tensor:
        y1, y2 = halves(y)
        s, t = self.s(y1).tanh(), self.t(y1)
        return whole(y1, (y2 - t) * (-s).exp())


class TurnedAndScaled(nn.Module):
    """y = exp(g) Q x. Autocast makes the product of the inverse, which is its last operation, bfloat16."""

    def __init__(self):
        super().__init__()
        self.w, self.gain = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.zeros(4))

    def rotation(self) -> Tensor:
        skew = self.w.triu(1) - self.w.triu(1).T
        eye = torch.eye(4, dtype=skew.dtype, device=skew.device)
        return torch.linalg.solve(eye + skew, eye - skew)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.rotation() * self.gain.exp()

    def inverse(self, y: Tensor) -> Tensor:
        return (y * (-self.gain).exp()) @ self.rotation().T


class Shuffled(nn.Module):
    """Writes into a view of zeros. For transposed images ``flatten`` copies, so that the zeros stay."""

    def __init__(self):
        super().__init__()
        self.register_buffer("order", torch.tensor([1, 3, 0, 2]))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        y.flatten(2)[:, self.order] = x.flatten(2)
        return y

    def inverse(self, y: Tensor) -> Tensor:
        return y[:, self.order]


class SquareImages(Scale):
    """Its scale starts near one, and its log-determinant is right only for square images."""

    def __init__(self):
        super().__init__()
        nn.init.constant_(self.s, 1 + 1e-6)

    def log_det(self, x: Tensor) -> Tensor:
        return (self.s.abs().log().sum() * x.shape[2] ** 2).expand(len(x))


class FixedPoint(nn.Module):
    """x + g(x), where the spectral norm makes g a contraction. Its derivative uses the largest singular value."""

    iterations = 200

    def __init__(self):
        super().__init__()
        self.g = nn.Linear(4, 4)

    def residual(self, x: Tensor) -> Tensor:
        weight = self.g.weight / torch.linalg.matrix_norm(self.g.weight, 2).clamp(min=0.3) * 0.3
        return nn.functional.linear(x, weight, self.g.bias).tanh()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.residual(x)

    def inverse(self, y: Tensor) -> Tensor:
        x = y
        for _ in range(self.iterations):
            x = y - self.residual(x)
        return x


class StopsEarly(FixedPoint):
    iterations = 7


class Softplus(torch.autograd.Function):
    """Its backward is right, but has no derivative, because the saved sigmoid has no graph."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x.sigmoid())
        return nn.functional.softplus(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient * ctx.saved_tensors[0]


class SoftplusOfInput(Softplus):
    """Saves its input, whose sigmoid has a derivative."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return nn.functional.softplus(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient * ctx.saved_tensors[0].sigmoid()


class Applied(nn.Module):
    """A branch that ends in a function of one's own."""

    def __init__(self, function: type[torch.autograd.Function]):
        super().__init__()
        self.layers, self.function = branch(), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(self.layers(x))


FAULTS = [
    fault(
        "values lost for other strides",
        "forward writes into a copy of its result",
        lambda: keeping(Shuffled()),
        "inverse",
        FORTH,
        r"strides \(48, 12, 1, 3\): forward returns the same value, 0, in all .*; for contiguous values it is right",
        inputs=lambda x: (x.mT.contiguous().mT,),
        stores=True,
    ),
    fault(
        "log-determinant of a square",
        "whose scale hardly shows at the start",
        SquareImages,
        "log_det",
        "forward_log_det is log|det| of the Jacobian",
        "after an optimiser step .*: 0.75 times as much; with the parameters as they start",
    ),
    fault(
        "fixed point stops early",
        "after seven iterations",
        StopsEarly,
        "inverse",
        "inverse(forward(x)) = x in float64",
        "allows: look for an iteration that stops early",
        "gradients",
        shape=(3, 4),
    ),
    fault(
        "second derivative missing",
        "in a function of one's own, which the plain twin shares",
        lambda: Own(lambda: Applied(Softplus)),
        "gradients",
        "second derivatives = finite differences",
        "in a gradient penalty",
    ),
]
HEALTHY = [
    Specimen("affine map by hand, dropout", AffineByHand),
    Specimen("rotation with a gain, by hand", TurnedAndScaled),
    Specimen("fixed point with a spectral norm, by hand", FixedPoint, shape=(3, 4)),
    Specimen("a function of one's own with second derivatives", lambda: Own(lambda: Applied(SoftplusOfInput))),
]
