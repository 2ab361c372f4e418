"""Blocks in unusual circumstances: at their first parameters, with conditions, at kinks, in other layouts, in float64.

Each fault hides from a check that looks at ordinary circumstances alone. Each healthy block alarms a check that does
not know the circumstance.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint

from properties.zoo.inverses import FORTH, keeping
from properties.zoo.specimen import Own, Specimen, branch, fault, halves, normalised, whole

MOVED = FORTH + " after an optimiser step"


def starting_at_zero() -> nn.Sequential:
    """A branch whose last layer is zero at the start, as in Glow."""
    layers = branch()
    nn.init.zeros_(layers[-1].weight)
    nn.init.zeros_(layers[-1].bias)
    return layers


class SignAtZero(Own):
    """x2 = y2 + G(y1), where G is zero at the start."""

    def inverse(self, y: Tensor) -> Tensor:
        y1, y2 = halves(y)
        x2 = y2 + self.G(y1)
        return whole(y1 - self.F(x2), x2)


class ReZero(Own):
    """Branches with a learned factor that is zero at the start."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = halves(x)
        y1 = x1 + self.factor * self.F(x2)
        return whole(y1, x2 + self.factor * self.G(y1))

    def inverse(self, y: Tensor) -> Tensor:
        y1, y2 = halves(y)
        x2 = y2 - self.factor * self.G(y1)
        return whole(y1 - self.factor * self.F(x2), x2)


class ReZeroInWrongOrder(ReZero):
    def inverse(self, y: Tensor) -> Tensor:
        y1, y2 = halves(y)
        x1 = y1 - self.factor * self.F(y2)
        return whole(x1, y2 - self.factor * self.G(x1))


class Scale(nn.Module):
    """s x + t, with s = 1 and t = 0 at the start."""

    def __init__(self):
        super().__init__()
        self.s, self.t = nn.Parameter(torch.ones(4, 1, 1)), nn.Parameter(torch.zeros(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.s * x + self.t

    def inverse(self, y: Tensor) -> Tensor:
        return (y - self.t) / self.s

    def log_det(self, x: Tensor) -> Tensor:
        return (self.s.abs().log().sum() * x[0, 0].numel()).expand(len(x))

    def forward_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self(x), self.log_det(x)

    def inverse_log_det(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.inverse(y), -self.log_det(y)


class ShiftUndoneLast(Scale):
    def inverse(self, y: Tensor) -> Tensor:
        return y / self.s - self.t


class LogDetDetached(Scale):
    def forward_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self(x), self.log_det(x).detach()


class VersionedInverse(nn.Module):
    """W x, where the inverse of W is kept as long as W has the version of which it is the inverse."""

    def __init__(self):
        super().__init__()
        self.W = nn.Parameter(torch.eye(4) + 0.2 * torch.randn(4, 4))
        self.kept: tuple[int, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("ij,njhw->nihw", self.W, x)

    def inverse_weight(self) -> Tensor:
        if torch.is_grad_enabled():
            return torch.linalg.inv(self.W)
        if self.kept is None or self.kept[0] != self.W._version:
            self.kept = self.W._version, torch.linalg.inv(self.W)
        return self.kept[1]

    def inverse(self, y: Tensor) -> Tensor:
        return torch.einsum("ij,njhw->nihw", self.inverse_weight().to(y), y)


class StaleInverse(VersionedInverse):
    def inverse_weight(self) -> Tensor:
        if self.kept is None:
            self.kept = 0, torch.linalg.inv(self.W.detach())
        return torch.linalg.inv(self.W) if torch.is_grad_enabled() else self.kept[1]


class WithoutGradients(Own):
    @torch.no_grad()
    def inverse(self, y: Tensor) -> Tensor:
        return super().inverse(y)


class RaisesInInverse(Own):
    def inverse(self, y: Tensor) -> Tensor:
        raise KeyError("no such block")


class _InSinglePrecision(Function):
    """w x, whose backward pass computes in float32."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return w * x

    @staticmethod
    def backward(ctx, dy):
        x, w = (v.float() for v in ctx.saved_tensors)
        d = dy.float()
        return (d * w).to(dy), (d * x).sum((0, 2, 3), keepdim=True)[0].to(dy)


class _KeptInSinglePrecision(Function):
    """w x, which keeps x in float32."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x.float(), w)
        return w * x

    @staticmethod
    def backward(ctx, dy):
        x, w = ctx.saved_tensors
        return dy * w, (dy * x.to(dy)).sum((0, 2, 3), keepdim=True)[0]


class ByFunction(nn.Module):
    def __init__(self, function: type[Function]):
        super().__init__()
        self.function, self.w = function, nn.Parameter(torch.rand(4, 1, 1) + 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(x, self.w)

    def inverse(self, y: Tensor) -> Tensor:
        return y / self.w


class _WritesToGradient(Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy.mul_(1)


class GradientWritten(Own):
    def forward(self, x: Tensor) -> Tensor:
        return _WritesToGradient.apply(super().forward(x))


class InputLayout(Own):
    """Reads the memory of its input as if it had no gaps."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.as_strided(x, x.shape, x.contiguous().stride()))


def of_numbers() -> nn.Linear:
    return nn.Linear(3, 2)


class Conditional(Own):
    """y1 = x1 + c F(x2), where c is made of a second input that ``inverse`` is given as well."""

    def __init__(self, condition: Callable[[], nn.Module] = of_numbers):
        super().__init__()
        self.condition = condition()

    def c(self, condition: Tensor) -> Tensor:
        return self.condition(condition)[:, :, None, None]

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        x1, x2 = halves(x)
        y1 = x1 + self.c(condition) * self.F(x2)
        return whole(y1, x2 + self.G(y1))

    def inverse(self, y: Tensor, condition: Tensor) -> Tensor:
        y1, y2 = halves(y)
        x2 = y2 - self.G(y1)
        return whole(y1 - self.c(condition) * self.F(x2), x2)


class OtherCondition(Conditional):
    """The condition of another sample is used in the inverse."""

    def inverse(self, y: Tensor, condition: Tensor) -> Tensor:
        return super().inverse(y, condition.flip(0))


class Checkpointed(nn.Module):
    def __init__(self, make: Callable[[], nn.Module], *, reentrant: bool):
        super().__init__()
        self.branch, self.reentrant = make(), reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.branch, x, use_reentrant=self.reentrant)


class InitialisesItself(Scale):
    """Sets s and t in its first forward pass, in eval mode as well."""

    def __init__(self):
        super().__init__()
        self.register_buffer("done", torch.tensor(False))

    def forward(self, x: Tensor) -> Tensor:
        if not self.done:
            with torch.no_grad():
                deviation, mean = torch.std_mean(x, (0, 2, 3))
                self.s.copy_(1 / deviation[:, None, None])
                self.t.copy_(-self.s * mean[:, None, None])
                self.done.fill_(True)
        return super().forward(x)


class MixesSamples(nn.Module):
    """A linear map of the samples; only the sum of its log-determinants is defined."""

    def __init__(self):
        super().__init__()
        self.A = nn.Parameter(torch.eye(3) + 0.2 * torch.randn(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("ij,jchw->ichw", self.A, x)

    def inverse(self, y: Tensor) -> Tensor:
        return torch.einsum("ij,jchw->ichw", torch.linalg.inv(self.A), y)

    def forward_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        total = torch.linalg.slogdet(self.A).logabsdet * x[0].numel()
        return self(x), torch.stack((total, 0 * total, 0 * total))

    def inverse_log_det(self, y: Tensor) -> tuple[Tensor, Tensor]:
        total = -torch.linalg.slogdet(self.A).logabsdet * y[0].numel()
        return self.inverse(y), (total / 3).expand(3)


class MixesSamplesWrongly(MixesSamples):
    """The sum is that of a single entry."""

    def forward_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self(x), torch.linalg.slogdet(self.A).logabsdet.expand(3)


def bounded() -> nn.Sequential:
    return nn.Sequential(spectral_norm(nn.Conv2d(2, 2, 3, padding=1)), nn.Tanh())


def rectified() -> nn.Sequential:
    return nn.Sequential(nn.ReLU(), nn.Conv2d(2, 2, 1))


def conditioned(x: Tensor) -> tuple[Tensor, ...]:
    return x, x[:, :3, 0, 0]


def chosen(x: Tensor) -> tuple[Tensor, ...]:
    return x, torch.arange(len(x))


FAULTS = [
    fault(
        "sign flipped, where G starts at zero",
        "x2 = y2 + G(y1)",
        lambda: keeping(SignAtZero(starting_at_zero)),
        "inverse",
        MOVED,
        "right with the parameters as they start",
        stores=True,
    ),
    fault(
        "order of forward, where factors start at zero",
        "as in ReZero",
        lambda: keeping(ReZeroInWrongOrder()),
        "inverse",
        MOVED,
        "right with the parameters as they start",
        stores=True,
    ),
    fault(
        "shift undone after a scale of one",
        "y / s - t",
        lambda: keeping(ShiftUndoneLast()),
        "inverse",
        MOVED,
        "right with the parameters as they start",
        stores=True,
    ),
    fault(
        "inverse of a weight kept over a step",
        "it is computed once",
        lambda: keeping(StaleInverse()),
        "inverse",
        "after an optimiser step both",
        "inverse gives other values .* from the old parameters",
        "gradients",
        stores=True,
    ),
    fault(
        "log-determinant detached",
        "its gradient is missing",
        lambda: keeping(LogDetDetached()),
        "log_det",
        "gradients of forward_log_det",
        "the gradient of .*s",
        stores=True,
    ),
    fault(
        "inverse under no_grad",
        "nothing is learned through it",
        lambda: keeping(WithoutGradients()),
        "gradients",
        "gradients through inverse",
        "missing, but the loss depends on it",
        stores=True,
    ),
    fault(
        "inverse raises",
        "a KeyError",
        RaisesInInverse,
        "inverse",
        FORTH,
        "inverse raised KeyError: 'no such block'",
        "gradients",
        "state",
        "memory",
    ),
    fault(
        "backward in float32",
        "in a function of its own",
        lambda: keeping(ByFunction(_InSinglePrecision)),
        "gradients",
        "backward computes in float64",
        "results of float32",
        stores=True,
    ),
    fault(
        "input kept in float32",
        "in a function of its own",
        lambda: keeping(ByFunction(_KeptInSinglePrecision)),
        "gradients",
        "backward computes in float64",
        "tensors of a lower precision",
        stores=True,
    ),
    fault(
        "incoming gradient written to",
        "dy.mul_(1)",
        GradientWritten,
        "state",
        "the caller's tensors",
        "the gradient of output 0 was written to",
    ),
    fault(
        "strides ignored",
        "by as_strided",
        lambda: keeping(InputLayout()),
        "inverse",
        "the strides of a tensor",
        "forward gives other results for non-contiguous values",
        stores=True,
    ),
    fault(
        "condition of another sample",
        "in the inverse alone",
        OtherCondition,
        "inverse",
        FORTH,
        "inverse gives something else",
        "gradients",
        inputs=conditioned,
    ),
    fault(
        "sum of log-determinants wrong",
        "where samples mix",
        lambda: keeping(MixesSamplesWrongly()),
        "log_det",
        "forward_log_det is",
        "the Jacobian",
        stores=True,
    ),
]
HEALTHY = [
    Specimen("branches that start at zero", partial(Own, starting_at_zero)),
    Specimen("branches with factors that start at zero", ReZero),
    Specimen("scale that starts at one", Scale),
    Specimen("inverse of a weight kept by version", lambda: keeping(VersionedInverse()), stores=True),
    Specimen("spectral norm, training", partial(Own, bounded)),
    Specimen("checkpoint in a branch", lambda: Own(partial(Checkpointed, branch, reentrant=False))),
    Specimen("checkpoint of batch normalisation", lambda: Own(partial(Checkpointed, normalised, reentrant=False))),
    Specimen("initialises itself in eval mode", lambda: InitialisesItself().eval()),
    Specimen("ReLU of zeros", partial(Own, rectified), inputs=lambda x: (0 * x,)),
    Specimen("ReLU of a constant image", partial(Own, rectified), inputs=lambda x: (0 * x + 0.5,)),
    Specimen("ReLU of clamped values", partial(Own, rectified), inputs=lambda x: (x.clamp(0, 1),)),
    Specimen("samples that mix", MixesSamples, stores=True),
    Specimen("condition", Conditional, inputs=conditioned),
    Specimen("condition of integers", lambda: Conditional(partial(nn.Embedding, 3, 2)), inputs=chosen),
]
