"""Faults of the inverse. Their carriers rebuild activations without it, or keep their input, where that is said."""

import copy
from collections.abc import Callable
from functools import partial

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
from properties.zoo.specimen import Own, branch, fault, normalised

FORTH = "inverse(forward(x)) = x"
BACK = "forward(inverse(y)) = y"


class Additive(AdditiveCoupling):
    """Ours, whose engine asks F and G alone, so that a wrong ``uncouple`` leaves its gradients right."""

    def __init__(self, make: Callable[[], nn.Module] = branch):
        super().__init__(make(), make())


class Layer(nn.Module):
    """A layer of two functions, which keeps its input: its gradients need no inverse."""

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
    """Inverts two halves of the batch, to save memory."""

    def inverse(self, y: Tensor) -> Tensor:
        size = len(y) // 2
        parts = [super(EvenBatch, self).inverse(y[i * size : (i + 1) * size]) for i in range(2)]
        return torch.cat((*parts, y[2 * size :]))


class SingleSampleSqueezed(Own):
    def inverse(self, y: Tensor) -> Tensor:
        return super().inverse(y).squeeze()


class OddRound(Own):
    """Gives the last column away where the width is odd."""

    def inverse(self, y: Tensor) -> Tensor:
        return super().inverse(y)[..., : y.shape[-1] // 2 * 2]


class InDouble(Own):
    """Inverts in float64 for accuracy, and forgets to come back."""

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
    """As if W were orthogonal, which it is until the first optimiser step."""

    def __init__(self, channels: int):
        super().__init__(channels)
        with torch.no_grad():
            self.triangles += 0.1 * torch.randn_like(self.triangles)

    def inverse_weight(self) -> Tensor:
        return self.weight().T


class StaleInverse(InvertibleConv1x1):
    """The inverse of W is computed once, as a buffer, and W learns on."""

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
    """Batch normalisation as an invertible layer. In training it uses the batch's statistics, its inverse others."""

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
    """Right in form; forward divides by sqrt(variance + eps), the inverse multiplies by sqrt(variance)."""

    def inverse(self, y: Tensor) -> Tensor:
        mean, variance = (v.view(1, -1, 1, 1) for v in (self.norm.running_mean, self.norm.running_var))
        return y * variance.sqrt() + mean


class FewIterations(nn.Module):
    """The residual block of i-ResNet, x + f(x) with a contraction f, inverted by too few steps of fixed point."""

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
    """Returns the input that forward has seen last, whatever it is asked to invert."""

    def forward(self, x: Tensor) -> Tensor:
        self.last = x.detach().clone()
        return super().forward(x)

    def inverse(self, y: Tensor) -> Tensor:
        return self.last


class Counting(Own):
    """Skips F and G at every other call, as a schedule by the number of calls would; the inverse never does."""

    def __init__(self):
        super().__init__()
        self.calls = Notes()

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(None)
        return super().forward(x) if len(self.calls) % 2 else x + 0


class Clipping(Grid):
    """Where the grid ends, values are clipped, not refused."""

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


FAULTS = [
    fault("sign flipped in the inverse", "x2 = y2 + G(y1)", SignFlipped, "inverse", FORTH, "something else than x"),
    fault(
        "sign flipped in half of the inverse",
        "x1 = y1 + F(x2)",
        SignFlippedInF,
        "inverse",
        FORTH,
        "only in the first half along dimension 1",
    ),
    fault("halves swapped", "the inverse returns (x2, x1)", HalvesSwapped, "inverse", FORTH, "halves .* swapped"),
    fault(
        "inverse in the order of forward", "F is undone before G", WrongOrder, "inverse", FORTH, "something else than x"
    ),
    fault("F in the place of G", "copied and not changed", FInPlaceOfG, "inverse", FORTH, "something else than x"),
    fault("G not undone", "x2 = y2", HalfForgotten, "inverse", FORTH, "something else than x"),
    fault("inverse is forward", "it calls couple", ForwardAgain, "inverse", FORTH, "does what forward does"),
    fault(
        "inverse does nothing",
        "a placeholder was never filled",
        Unchanged,
        "inverse",
        FORTH,
        "returns its argument unchanged",
    ),
    fault(
        "inverse only for an even batch",
        "it works on two halves of the batch",
        EvenBatch,
        "inverse",
        FORTH,
        "only at 2 along dimension 0",
    ),
    fault(
        "a batch of one is squeezed",
        "squeeze() without a dimension",
        lambda: keeping(SingleSampleSqueezed()),
        "inverse",
        FORTH,
        r"gives \(4, 3, 4\)",
        shape=(1, 4, 3, 4),
        stores=True,
    ),
    fault(
        "odd width is cut",
        "the inverse gives one column less",
        lambda: keeping(OddRound()),
        "inverse",
        FORTH,
        r"gives \(3, 4, 4, 2\)",
        shape=(3, 4, 4, 3),
        stores=True,
    ),
    fault(
        "inverse in another dtype",
        "it computes in float64 and does not come back",
        lambda: keeping(InDouble()),
        "inverse",
        FORTH,
        r"gives .*float64 on cpu, not .*float32",
        "gradients",
        stores=True,
    ),
    fault(
        "shift undone after the scale",
        "y / s - t",
        partial(affine, ShiftAfterScale),
        "inverse",
        FORTH,
        "something else than x",
    ),
    fault(
        "scale multiplied again", "(y - t) * s", partial(affine, ScaledAgain), "inverse", FORTH, "something else than x"
    ),
    fault(
        "permutation inverted by itself",
        "right for transpositions alone",
        lambda: keeping(PermutedAgain([1, 2, 3, 0])),
        "inverse",
        FORTH,
        "does what forward does",
        stores=True,
    ),
    fault(
        "1x1 convolution inverted by its transpose",
        "right until W has learned",
        lambda: keeping(Transposed(4)),
        "inverse",
        FORTH,
        "something else than x",
        "log_det",
        stores=True,
    ),
    fault(
        "stale inverse of a weight",
        "kept in a buffer while W learns",
        lambda: keeping(StaleInverse(4)),
        "inverse",
        FORTH,
        "something else than x",
        "log_det",
        stores=True,
    ),
    fault(
        "inverse in single precision",
        "W is inverted in float32, whatever its dtype",
        lambda: keeping(InSinglePrecision(4)),
        "inverse",
        FORTH + " in float64",
        "float32",
        "log_det",
        stores=True,
    ),
    fault(
        "a constant of float32",
        "y = pi x, x = y / 3.1415927",
        layer(lambda x: torch.pi * x, lambda y: y / 3.1415927),
        "inverse",
        FORTH + " in float64",
        "float32",
    ),
    fault(
        "space to depth in another order",
        "channels by position, then by channel",
        lambda: keeping(OtherChannelOrder()),
        "inverse",
        FORTH,
        "something else than x",
        shape=(2, 3, 4, 4),
    ),
    fault(
        "batch normalisation inverted by running statistics",
        "forward uses the batch's",
        lambda: keeping(trained_norm(Normalisation)),
        "inverse",
        FORTH,
        "in eval mode it is right",
        stores=True,
    ),
    fault(
        "epsilon forgotten",
        "sqrt(variance), not sqrt(variance + eps)",
        lambda: keeping(trained_norm(EpsilonForgotten, eps=1e-3).eval()),
        "inverse",
        FORTH,
        "something else than x",
        stores=True,
    ),
    fault(
        "inverse only for small inputs: clamp",
        "forward clamps to [-1, 1]",
        layer(lambda x: x.clamp(-1, 1), lambda y: y),
        "inverse",
        FORTH,
        "hundredth as large it is right",
        stores=True,
    ),
    fault(
        "inverse only for small inputs: tanh",
        "forward saturates, the inverse clamps",
        layer(lambda x: torch.tanh(2 * x), lambda y: torch.atanh(y.clamp(-0.99, 0.99)) / 2),
        "inverse",
        FORTH,
        "hundredth as large it is right",
        stores=True,
    ),
    fault(
        "leaky ReLU with another slope",
        "0.01 there, 0.02 back",
        layer(lambda x: torch.where(x > 0, x, 0.01 * x), lambda y: torch.where(y > 0, y, y / 0.02)),
        "inverse",
        FORTH,
        "something else than x",
        stores=True,
    ),
    fault(
        "too few iterations",
        "three steps of a fixed point",
        lambda: keeping(FewIterations()),
        "inverse",
        FORTH,
        "something else than x",
        stores=True,
    ),
    fault(
        "forward is not deterministic",
        "it skips F and G at every other call",
        lambda: keeping(Counting()),
        "inverse",
        BACK,
        "not deterministic",
        "state",
        "gradients",
    ),
    fault(
        "inverse remembers",
        "it returns the last input, whatever y is",
        lambda: keeping(Remembered()),
        "inverse",
        BACK,
        "returns the last input",
        stores=True,
    ),
    fault(
        "exact grid overflows",
        "values are clipped at its end",
        overflowing,
        "inverse",
        FORTH,
        "hundredth as large it is right",
        finite_differences=False,
        stores=True,
    ),
    fault(
        "inverse of normalised branches wrong",
        "the sign, where F has state",
        partial(SignFlippedInF, normalised),
        "inverse",
        FORTH,
        "only in the first half along dimension 1",
    ),
]
