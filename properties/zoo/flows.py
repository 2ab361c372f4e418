"""Blocks as researchers write them: masks, spectra, momentum and rotations in place of couplings."""

import torch
from torch import Tensor, nn
from torch.autograd import Function

from properties.zoo.gradients import DIFFERENCES
from properties.zoo.inverse_blocks import keeping
from properties.zoo.inverses import FORTH
from properties.zoo.specimen import Own, Specimen, branch, fault, halves, whole


class StripedMask(nn.Module):
    """Changes every second row by a function of the other rows. Stores the mask of the largest height so far."""

    def __init__(self):
        super().__init__()
        self.branch, self.mask = branch(4), None

    def stored(self, x: Tensor) -> Tensor:
        height = x.shape[-2]
        if self.mask is None or len(self.mask) < height:
            self.mask = torch.arange(height, device=x.device)[:, None] % 2
        return self.mask

    def forward_mask(self, x: Tensor) -> Tensor:
        return self.stored(x)[: x.shape[-2]].to(x)

    def inverse_mask(self, x: Tensor) -> Tensor:
        return self.forward_mask(x)

    def forward(self, x: Tensor) -> Tensor:
        mask = self.forward_mask(x)
        return x + (1 - mask) * self.branch(x * mask)

    def inverse(self, y: Tensor) -> Tensor:
        mask = self.inverse_mask(y)
        return y - (1 - mask) * self.branch(y * mask)


class MaskCutFromTheEnd(StripedMask):
    def inverse_mask(self, x: Tensor) -> Tensor:
        return self.stored(x)[-x.shape[-2] :].to(x)


class Momentum(nn.Module):
    """A step of a Momentum ResNet on position and velocity, which are the halves of the channels."""

    def __init__(self):
        super().__init__()
        self.branch, self.gamma = branch(), 0.9

    def forward(self, z: Tensor) -> Tensor:
        x, v = halves(z)
        v = self.gamma * v + (1 - self.gamma) * self.branch(x)
        return whole(x + v, v)

    def inverse(self, z: Tensor) -> Tensor:
        x, v = halves(z)
        x = x - v
        return whole(x, (v - (1 - self.gamma) * self.branch(x)) / self.gamma)


class MomentumInTraining(Momentum):
    """Does not divide by gamma in training mode."""

    def inverse(self, z: Tensor) -> Tensor:
        x, v = halves(super().inverse(z))
        return whole(x, self.gamma * v if self.training else v)


class Spectrum(nn.Module):
    """Scales the spectrum of every row, each channel by a factor of its own."""

    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(0.3 * torch.randn(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.irfft(torch.fft.rfft(x) * self.log_scale.exp(), n=x.shape[-1])

    def inverse(self, y: Tensor) -> Tensor:
        return torch.fft.irfft(torch.fft.rfft(y) * (-self.log_scale).exp(), n=y.shape[-1])


class SpectrumOfEvenLength(Spectrum):
    """Calls ``irfft`` without the length, which is then taken to be even."""

    def inverse(self, y: Tensor) -> Tensor:
        return torch.fft.irfft(torch.fft.rfft(y) * (-self.log_scale).exp())


class Rotation(nn.Module):
    """Rotates pairs of channels by an angle that depends on their norm. This preserves the norm and the volume."""

    def __init__(self):
        super().__init__()
        self.angle = nn.Parameter(torch.randn(2, 1, 1))

    def turned(self, z: Tensor, sign: int) -> Tensor:
        a, b = halves(z)
        t = sign * self.angle * (a * a + b * b).tanh()
        return whole(a * t.cos() - b * t.sin(), a * t.sin() + b * t.cos())

    def forward(self, z: Tensor) -> Tensor:
        return self.turned(z, 1)

    def inverse(self, z: Tensor) -> Tensor:
        return self.turned(z, -1)

    def forward_log_det(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self(z), z.new_zeros(len(z))


class Scaling(nn.Module):
    """Scales every channel."""

    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(0.3 * torch.randn(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.log_scale.exp()

    def inverse(self, y: Tensor) -> Tensor:
        return y * (-self.log_scale).exp()

    def forward_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self(x), (self.log_scale.sum() * self.positions(x)).expand(len(x))

    def positions(self, x: Tensor) -> int:
        return x.shape[2] * x.shape[3]


class ScalingOfSquares(Scaling):
    def positions(self, x: Tensor) -> int:
        return x.shape[2] ** 2


class ScalingBySize(Scaling):
    """Returns the absolute value of the log-determinant."""

    def forward_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, value = super().forward_log_det(x)
        return y, value.abs()


class ScalingInTraining(Scaling):
    """Forgets the log-determinant in eval mode."""

    def forward_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, value = super().forward_log_det(x)
        return y, value if self.training else torch.zeros_like(value)


class Causal(nn.Module):
    """Adds to each row a function of the row above, which is zero at the start."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 4))

    def of_row_above(self, x: Tensor) -> Tensor:
        above = nn.functional.pad(x, (0, 0, 1, 0))[:, :, :-1]
        return torch.einsum("ij,njhw->nihw", self.weight, above).tanh()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.of_row_above(x)

    def inverse(self, y: Tensor) -> Tensor:
        x = y
        for _ in range(y.shape[2] - 1):  # each time one more row is right
            x = y - self.of_row_above(x)
        return x


class CausalFromOutputs(Causal):
    def inverse(self, y: Tensor) -> Tensor:
        return y - self.of_row_above(y)


class Cayley(nn.Module):
    """Rotates channels by the Cayley transform of an antisymmetric matrix."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(0.4 * torch.randn(4, 4))

    def rotation(self) -> Tensor:
        antisymmetric, one = self.weight - self.weight.T, torch.eye(4, dtype=self.weight.dtype)
        return torch.linalg.solve(one + antisymmetric, one - antisymmetric)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("ij,njhw->nihw", self.rotation(), x)

    def inverse(self, y: Tensor) -> Tensor:
        return torch.einsum("ji,njhw->nihw", self.rotation(), y)

    def forward_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self(x), x.new_zeros(len(x))


class HalvedGradient(Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient / 2


class HalvedOnTheWay(Own):
    """Halves the gradient on its way into F."""

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = halves(x)
        y1 = x1 + self.F(HalvedGradient.apply(x2))
        return whole(y1, x2 + self.G(y1))


class _BiasOfFirstSample(Function):
    @staticmethod
    def forward(ctx, x, bias):
        return x + bias

    @staticmethod
    def backward(ctx, dy):
        return dy, dy[0].sum((-2, -1), keepdim=True)


class Biased(nn.Module):
    """Adds a bias, whose gradient is that of the first sample alone."""

    def __init__(self):
        super().__init__()
        self.branch, self.bias = branch(), nn.Parameter(torch.randn(2, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return _BiasOfFirstSample.apply(self.branch(x), self.bias)


class Haar(nn.Module):
    """Haar wavelets of 2 x 2 pixels: (N, C, 2H, 2W) to (N, 4C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        a, b, c, d = (x[..., i::2, j::2] for i in (0, 1) for j in (0, 1))
        return torch.cat((a + b + c + d, a - b + c - d, a + b - c - d, a - b - c + d), 1) / 2

    def inverse(self, y: Tensor) -> Tensor:
        a, b, c, d = y.chunk(4, 1)
        above = torch.stack((a + b + c + d, a - b + c - d), -1).flatten(-2)
        below = torch.stack((a + b - c - d, a - b - c + d), -1).flatten(-2)
        return torch.stack((above, below), -2).flatten(-3, -2) / 2


class Heun(nn.Module):
    """A step of the reversible Heun method on a state and its second copy."""

    def __init__(self):
        super().__init__()
        self.branch, self.step = branch(), 0.1

    def moved(self, z: Tensor, copy: Tensor, step: float) -> tuple[Tensor, Tensor]:
        slope = self.branch(copy)
        new = 2 * z - copy + step * slope
        return z + step / 2 * (slope + self.branch(new)), new

    def forward(self, z: Tensor, copy: Tensor) -> tuple[Tensor, Tensor]:
        return self.moved(z, copy, self.step)

    def inverse(self, z: Tensor, copy: Tensor) -> tuple[Tensor, Tensor]:
        return self.moved(z, copy, -self.step)


def normed_by_hooks() -> nn.Sequential:
    """A branch under the older spectral norm, which leaves a weight with a graph on its module."""
    layers = branch()
    nn.utils.spectral_norm(layers[0])
    return layers


def negative(module: Scaling) -> Scaling:
    """Return the module with log-scales below zero."""
    nn.init.constant_(module.log_scale, -0.3)
    return module


FAULTS = [
    fault(
        "mask of another size",
        "stored, and cut from the wrong end in the inverse",
        lambda: keeping(MaskCutFromTheEnd()),
        "inverse",
        "a run at another size",
        "after a run with 4 entries along dimension 2 instead of 3 inverse gives other values",
        stores=True,
    ),
    fault(
        "factor forgotten in training mode",
        "v - (1 - gamma) F(x), without the division by gamma",
        lambda: keeping(MomentumInTraining()),
        "inverse",
        FORTH,
        "only in the second half along dimension 1; in eval mode it is right",
        stores=True,
    ),
    fault(
        "spectrum of an odd length",
        "irfft without its length",
        lambda: keeping(SpectrumOfEvenLength()),
        "inverse",
        FORTH,
        "inverse gives",
        shape=(3, 4, 3, 5),
        stores=True,
    ),
    fault(
        "log-determinant of squares",
        "H * H positions",
        ScalingOfSquares,
        "log_det",
        "forward_log_det is",
        "the Jacobian",
    ),
    fault(
        "log-determinant without its sign",
        "its absolute value",
        lambda: negative(ScalingBySize()),
        "log_det",
        "forward_log_det is",
        "the Jacobian",
    ),
    fault(
        "log-determinant of training alone",
        "zero in eval mode",
        lambda: ScalingInTraining().eval(),
        "log_det",
        "forward_log_det is",
        "the Jacobian",
    ),
    fault(
        "recursion from outputs, at zero",
        "y_t - f(y_(t-1))",
        lambda: keeping(CausalFromOutputs()),
        "inverse",
        FORTH + " after an optimiser step",
        "right with the parameters as they start",
        stores=True,
    ),
    fault(
        "gradient halved on its way into F",
        "in a function of its own",
        HalvedOnTheWay,
        "gradients",
        DIFFERENCES,
        "the gradient of the input is wrong",
    ),
    fault(
        "bias of the first sample",
        "in a function of its own",
        lambda: Own(Biased),
        "gradients",
        DIFFERENCES,
        r"the gradient of [FG]\.bias",
    ),
]
HEALTHY = [
    Specimen("mask stored for the largest size", StripedMask),
    Specimen("recursion from row to row", Causal),
    Specimen("Cayley transform", Cayley),
    Specimen("momentum", Momentum),
    Specimen("spectrum", Spectrum, shape=(3, 4, 3, 5)),
    Specimen("rotation by the norm", Rotation),
    Specimen("Haar wavelets", Haar, shape=(2, 3, 4, 6)),
    Specimen("spectral norm by hooks", lambda: Own(normed_by_hooks)),
    Specimen("reversible Heun step", Heun, inputs=lambda x: x.chunk(2, 1)),
]
