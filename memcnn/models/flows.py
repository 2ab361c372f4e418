"""Learned invertible layers between the couplings of a normalising flow: they normalise and mix channels.

Both layers are from Kingma and Dhariwal, "Glow: Generative Flow with Invertible 1x1 Convolutions", arXiv:1807.03039.
They accept inputs of shape (N, C, ...) with any number of spatial dimensions. ``memcnn.models.log_det`` explains their
log-determinants.
"""

import math
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memcnn.autocast import autocast_dtype
from memcnn.models.log_det import constant_log_det

__all__ = ["ActNorm", "InvertibleConv1x1"]


class ActNorm(nn.Module):
    """Activation normalisation: y = exp(log_scale) * x + shift, with a learned scale and shift for each channel.

    The first call of ``forward`` or ``inverse`` in training mode, with at least one sample, initialises both parameters
    from its input. Every channel of the result then has mean 0 and variance 1 over batch and positions; a constant
    channel keeps its scale. Until then the layer is the identity. Make this first call before you wrap the model for
    distributed training, because every process sees different data.

    Args:
        channels: C, the number of channels.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.shift = nn.Parameter(torch.zeros(channels))
        # Not a buffer: reading a flag from the GPU would synchronise at every call.
        self.initialised = False

    def forward(self, x: Tensor) -> Tensor:
        """Return y, same shape as x (N, C, ...)."""
        _check_channels(self, x, len(self.shift))
        if self.training and not self.initialised and x.numel():
            mean, deviation = self._statistics(x)
            self._initialise(-deviation.log(), -mean / deviation)
        scale, shift = self._like(x)
        return scale * x + shift

    def inverse(self, y: Tensor) -> Tensor:
        """Return x, same shape as y (N, C, ...)."""
        _check_channels(self, y, len(self.shift))
        if self.training and not self.initialised and y.numel():
            mean, deviation = self._statistics(y)
            self._initialise(deviation.log(), mean)
        scale, shift = self._like(y)
        return (y - shift) / scale

    def forward_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return y and log|det dy/dx| for each sample, shape (N,): sum(log_scale) times the number of positions."""
        return self(x), constant_log_det(x, self.log_scale.sum() * _positions(x))

    def inverse_log_det(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return x and log|det dx/dy| for each sample, shape (N,)."""
        return self.inverse(y), constant_log_det(y, -self.log_scale.sum() * _positions(y))

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.initialised)

    def set_extra_state(self, state: Tensor) -> None:
        self.initialised = bool(state)

    def extra_repr(self) -> str:
        return f"{len(self.shift)}"

    def _like(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shape = -1, *[1] * (x.dim() - 2)
        return self.log_scale.exp().to(x.dtype).view(shape), self.shift.to(x.dtype).view(shape)

    @torch.no_grad()
    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of each channel; 1 as the deviation of a constant channel."""
        x = x.to(self.shift.dtype)
        deviation, mean = torch.std_mean(x, [0, *range(2, x.dim())], correction=0)
        constant = deviation <= torch.finfo(x.dtype).eps * mean.abs()
        return mean, deviation.masked_fill(constant, 1)

    @torch.no_grad()
    def _initialise(self, log_scale: Tensor, shift: Tensor) -> None:
        self.log_scale.copy_(log_scale)
        self.shift.copy_(shift)
        self.initialised = True


class InvertibleConv1x1(nn.Module):
    """y = W x at every position, with W = P L U learned. P is a fixed permutation, L and U are triangular, diag(L) = 1.

    The parameter ``triangles`` (C, C) holds L below its diagonal, U above it, and log|diag(U)| on it. W can therefore
    never become singular, and log|det W| is the sum of the diagonal; the signs of diag(U) are fixed. W starts as a
    random orthogonal matrix. The layer disables autocast, because a product in half precision loses too many digits.

    Args:
        channels: C, the number of channels.
    """

    sign: Tensor
    permutation: Tensor

    def __init__(self, channels: int):
        super().__init__()
        orthogonal = torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float64))[0]
        P, L, U = torch.linalg.lu(orthogonal)
        triangles = L.tril(-1) + U.triu(1) + U.diag().abs().log().diag()
        self.triangles = nn.Parameter(triangles.to(torch.get_default_dtype()))
        self.register_buffer("sign", U.diag().sign().to(torch.get_default_dtype()))
        self.register_buffer("permutation", P.argmax(1))

    def forward(self, x: Tensor) -> Tensor:
        """Return y, same shape as x (N, C, ...)."""
        _check_channels(self, x, len(self.sign))
        with _no_autocast(x):
            return _matrix_at_each_position(self.weight(), x)

    def inverse(self, y: Tensor) -> Tensor:
        """Return x, same shape as y (N, C, ...)."""
        _check_channels(self, y, len(self.sign))
        with _no_autocast(y):
            return _matrix_at_each_position(self.inverse_weight(), y)

    def forward_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return y and log|det dy/dx| for each sample, shape (N,): log|det W| times the number of positions."""
        return self(x), constant_log_det(x, self.triangles.diag().sum() * _positions(x))

    def inverse_log_det(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return x and log|det dx/dy| for each sample, shape (N,)."""
        return self.inverse(y), constant_log_det(y, -self.triangles.diag().sum() * _positions(y))

    def weight(self) -> Tensor:
        """Return W, shape (C, C), in float32 or the parameter's wider dtype."""
        L, U = self._factors()
        return (L @ U)[self.permutation]

    def inverse_weight(self) -> Tensor:
        """Return the inverse of W, shape (C, C), in float32 or the parameter's wider dtype."""
        L, U = self._factors()
        identity = torch.eye(len(L), dtype=L.dtype, device=L.device)
        inverse_of_L = torch.linalg.solve_triangular(L, identity, upper=False, unitriangular=True)
        return torch.linalg.solve_triangular(U, inverse_of_L, upper=True)[:, self.permutation]

    def extra_repr(self) -> str:
        return f"{len(self.sign)}"

    def _factors(self) -> tuple[Tensor, Tensor]:
        packed = self.triangles.to(torch.promote_types(self.triangles.dtype, torch.float32))
        L = packed.tril(-1) + torch.eye(len(packed), dtype=packed.dtype, device=packed.device)
        return L, packed.triu(1) + (self.sign * packed.diag().exp()).diag()


def _check_channels(module: nn.Module, x: Tensor, channels: int) -> None:
    """Raise a ValueError if x is not (N, channels, ...)."""
    if x.dim() < 2 or x.shape[1] != channels:
        raise ValueError(
            f"{type(module).__name__} of {channels} channels takes inputs of shape (N, {channels}, ...): "
            f"got {tuple(x.shape)}"
        )


def _positions(x: Tensor) -> int:
    return math.prod(x.shape[2:])


def _matrix_at_each_position(W: Tensor, x: Tensor) -> Tensor:
    """Return W x over the channels of x (N, C, ...), in x's memory format.

    This is a matrix product instead of a convolution, because a convolution on a GPU may round its inputs to TF32.
    """
    W = W.to(x.dtype)
    if x.is_contiguous():
        return torch.matmul(W, x.view(*x.shape[:2], _positions(x))).view(x.shape)
    return F.linear(x.movedim(1, -1), W).movedim(-1, 1)


def _no_autocast(x: Tensor) -> AbstractContextManager:
    kind = x.device.type
    return nullcontext() if autocast_dtype(kind) is None else torch.autocast(kind, enabled=False)
