"""The blocks with a wrong inverse of `properties.zoo.inverses`."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from memcnn import (
    AdditiveCoupling,
    AffineAdapterExp,
    AffineCoupling,
    ChannelPermutation,
    InvertibleConv1x1,
    InvertibleModuleWrapper,
    SpaceToDepth,
)
from memcnn.engine.exact import Grid
from properties.support.blocks import Notes
from properties.zoo.specimen import Own, branch


class Additive(AdditiveCoupling):
    """Our additive coupling. The engine does not use ``uncouple``, so a wrong one leaves the gradients right."""

    def __init__(self, make: Callable[[], nn.Module] = branch):
        super().__init__(make(), make())


class Layer(nn.Module):
    """A layer that consists of two functions. Its wrapper keeps the input, so its gradients need no inverse."""

    def __init__(self, forth: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]):
        super().__init__()
        self.forth, self.back = forth, back

    def forward(self, x: Tensor) -> Tensor:
        return self.forth(x)

    def inverse(self, y: Tensor) -> Tensor:
        return self.back(y)


def keeping(module: nn.Module) -> InvertibleModuleWrapper:
    return InvertibleModuleWrapper(module, keep_input=True)


def layer(forth: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
    return lambda: keeping(Layer(forth, back))


class SignFlipped(Additive):
    def uncouple(self, y1: Tensor, y2: Tensor) -> tuple[Tensor, Tensor]:
        x2 = y2 + self.Gm(y1)
        return y1 - self.Fm(x2), x2


class SignFlippedInF(Additive):
    def uncouple(self, y1: Tensor, y2: Tensor) -> tuple[Tensor, Tensor]:
        x2 = y2 - self.Gm(y1)
        return y1 + self.Fm(x2), x2


class HalvesSwapped(Additive):
    def uncouple(self, y1: Tensor, y2: Tensor) -> tuple[Tensor, Tensor]:
        return super().uncouple(y1, y2)[::-1]


class WrongOrder(Additive):
    def uncouple(self, y1: Tensor, y2: Tensor) -> tuple[Tensor, Tensor]:
        x1 = y1 - self.Fm(y2)
        return x1, y2 - self.Gm(x1)


class FInPlaceOfG(Additive):
    def uncouple(self, y1: Tensor, y2: Tensor) -> tuple[Tensor, Tensor]:
        x2 = y2 - self.Fm(y1)
        return y1 - self.Fm(x2), x2


class HalfForgotten(Additive):
    def uncouple(self, y1: Tensor, y2: Tensor) -> tuple[Tensor, Tensor]:
        return y1 - self.Fm(y2), y2


class ForwardAgain(Additive):
    def uncouple(self, y1: Tensor, y2: Tensor) -> tuple[Tensor, Tensor]:
        return self.couple(y1, y2)


class Unchanged(Additive):
    def uncouple(self, y1: Tensor, y2: Tensor) -> tuple[Tensor, Tensor]:
        return y1, y2


class EvenBatch(Additive):
    """Inverts the two halves of the batch one after the other, and leaves the last sample of an odd batch as it is."""

    def inverse(self, y: Tensor) -> Tensor:
        size = len(y) // 2
        parts = [super(EvenBatch, self).inverse(y[i * size : (i + 1) * size]) for i in range(2)]
        return torch.cat((*parts, y[2 * size :]))


class SingleSampleSqueezed(Own):
    def inverse(self, y: Tensor) -> Tensor:
        return super().inverse(y).squeeze()


class OddRound(Own):
    """Drops the last column if the width is odd."""

    def inverse(self, y: Tensor) -> Tensor:
        return super().inverse(y)[..., : y.shape[-1] // 2 * 2]


class InDouble(Own):
    """Inverts in float64, and does not convert the result back."""

    def inverse(self, y: Tensor) -> Tensor:
        return Own.inverse(copy.deepcopy(self).double(), y.double())


class ShiftAfterScale(AffineCoupling):
    def uncouple(self, y1: Tensor, y2: Tensor) -> tuple[Tensor, Tensor]:
        s, t = self.Gm(y1)
        x2 = y2 / s - t
        s, t = self.Fm(x2)
        return y1 / s - t, x2


class ScaledAgain(AffineCoupling):
    def uncouple(self, y1: Tensor, y2: Tensor) -> tuple[Tensor, Tensor]:
        s, t = self.Gm(y1)
        x2 = (y2 - t) * s
        s, t = self.Fm(x2)
        return (y1 - t) * s, x2


class PermutedAgain(ChannelPermutation):
    def inverse(self, y: Tensor) -> Tensor:
        return self(y)


class Transposed(InvertibleConv1x1):
    """Inverts by the transpose of W, which is orthogonal until the first optimiser step."""

    def __init__(self, channels: int):
        super().__init__(channels)
        with torch.no_grad():
            self.triangles += 0.1 * torch.randn_like(self.triangles)

    def inverse_weight(self) -> Tensor:
        return self.weight().T


class StaleInverse(InvertibleConv1x1):
    """Computes the inverse of W once, as a buffer, although W is trained."""

    def __init__(self, channels: int):
        super().__init__(channels)
        self.register_buffer("cached", super().inverse_weight().detach())
        with torch.no_grad():
            self.triangles += 0.1

    def inverse_weight(self) -> Tensor:
        return self.cached


class InSinglePrecision(InvertibleConv1x1):
    def inverse_weight(self) -> Tensor:
        return torch.linalg.inv(self.weight().float())


class OtherChannelOrder(SpaceToDepth):
    def inverse(self, y: Tensor) -> Tensor:
        n, channels, *sizes = y.shape
        by_position = y.view(n, 4, channels // 4, *sizes).transpose(1, 2).reshape(y.shape)
        return super().inverse(by_position)


class Normalisation(nn.Module):
    """Batch normalisation as an invertible layer. In training, forward uses batch statistics and inverse does not."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)

    def inverse(self, y: Tensor) -> Tensor:
        mean, variance, weight, bias = (
            v.view(1, -1, 1, 1)
            for v in (self.norm.running_mean, self.norm.running_var, self.norm.weight, self.norm.bias)
        )
        return (y - bias) / weight * (variance + self.norm.eps).sqrt() + mean


class EpsilonForgotten(Normalisation):
    """Forward divides by sqrt(variance + eps), but the inverse multiplies by sqrt(variance)."""

    def inverse(self, y: Tensor) -> Tensor:
        mean, variance = (v.view(1, -1, 1, 1) for v in (self.norm.running_mean, self.norm.running_var))
        return y * variance.sqrt() + mean


class FewIterations(nn.Module):
    """The residual block of i-ResNet, x + f(x) with a contraction f, inverted by too few fixed-point iterations."""

    def __init__(self):
        super().__init__()
        self.f = branch(4)

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.5 * self.f(x)

    def inverse(self, y: Tensor) -> Tensor:
        x = y
        for _ in range(3):
            x = y - 0.5 * self.f(x)
        return x


class Remembered(Own):
    """Returns the last input of forward, whatever the argument of inverse is."""

    def forward(self, x: Tensor) -> Tensor:
        self.last = x.detach().clone()
        return super().forward(x)

    def inverse(self, y: Tensor) -> Tensor:
        return self.last


class Counting(Own):
    """Forward skips F and G at every other call, like a schedule; the inverse never does."""

    def __init__(self):
        super().__init__()
        self.calls = Notes()

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(None)
        return super().forward(x) if len(self.calls) % 2 else x + 0


class Clipping(Grid):
    """Clips values beyond the end of the grid instead of raising an error."""

    def checked(self, x: Tensor) -> Tensor:
        return x.clamp(-self.limit(x.dtype), self.limit(x.dtype))


def overflowing() -> nn.Module:
    return InvertibleModuleWrapper(AdditiveCoupling(branch(), branch(), exact=Clipping(2.0**-23)), keep_input=True)


def affine(kind: type[AffineCoupling]) -> AffineCoupling:
    return kind(branch(2, 4), branch(2, 4), AffineAdapterExp)


def trained_norm(kind: type[Normalisation], *, eps: float = 1e-5) -> Normalisation:
    module = kind(4)
    module.norm.eps = eps
    nn.init.uniform_(module.norm.running_mean, -1, 1)
    return module
