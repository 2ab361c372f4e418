"""The blocks of `properties.zoo.corners`: broken in unusual circumstances, or healthy and unusual."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint

from properties.zoo.specimen import Own, branch, halves, whole


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
    """W x. The inverse of W is cached, and computed again only when the version of W has changed."""

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


class InSinglePrecision(Function):
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


class KeptInSinglePrecision(Function):
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
    """Reads the memory of its input as if it were contiguous."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.as_strided(x, x.shape, x.contiguous().stride()))


def of_numbers() -> nn.Linear:
    return nn.Linear(3, 2)


class Conditional(Own):
    """y1 = x1 + c F(x2), where c is computed from a second input, which ``inverse`` takes as well."""

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
    """The inverse uses the condition of another sample."""

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
