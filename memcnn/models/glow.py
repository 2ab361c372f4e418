"""Glow: a normalising flow for images, several scales of actnorm, invertible 1x1 convolution and affine coupling.

Kingma, Dhariwal, "Glow: Generative Flow with Invertible 1x1 Convolutions", arXiv:1807.03039, section 3 and figure 2b.
An ``AffineCoupling`` changes one half after the other, so that a step here has two of the paper's coupling layers.
Scales are bounded (``AffineAdapterExp``). After each scale but the last, half of the channels leave with a Gaussian
whose mean and deviation a convolution predicts from the other half.
"""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from memcnn.models.affine import AffineAdapterExp, AffineCoupling
from memcnn.models.flows import ActNorm, InvertibleConv1x1
from memcnn.models.log_det import constant_log_det, sum_per_sample
from memcnn.models.rearrange import SpaceToDepth
from memcnn.models.streams import reversible_chain

__all__ = ["Glow", "bits_per_dimension", "glow_cifar"]


class _Latent(nn.Module):
    """Standardise the half h by a mean and a deviation that are predicted from x; initially they are 0 and 1."""

    def __init__(self, channels: int):
        super().__init__()
        self.predict = nn.Conv2d(channels, 2 * channels, 3, padding=1)
        _set_to_zero(self.predict)

    def forward_log_det(self, h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_deviation = self.predict(x).chunk(2, 1)
        return (h - mean) * torch.exp(-log_deviation), sum_per_sample(-log_deviation)

    def inverse_log_det(self, z: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_deviation = self.predict(x).chunk(2, 1)
        return mean + z * torch.exp(log_deviation), sum_per_sample(log_deviation)


class Glow(nn.Module):
    """A bijection between images (N, C, H, W) and latent values (N, C * H * W), which are standard normal.

    The first call in training mode initialises the actnorm layers from its batch.

    Args:
        shape: (C, H, W) of an image; ``2**scales`` divides H and W.
        scales: number of scales.
        depth: number of steps of each scale.
        hidden: channels within F and G.
        bound: the largest |log s| of a coupling's scale s.
        disable: keep the weights, but store every activation.

    Raises:
        ValueError: ``2**scales`` does not divide H and W.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        scales: int = 3,
        depth: int = 8,
        hidden: int = 64,
        *,
        bound: float = 2.0,
        disable: bool = False,
    ):
        super().__init__()
        if any(size % 2**scales for size in shape[1:]):
            raise ValueError(f"2**{scales} must divide height and width of the images: got {shape}; use fewer scales")
        self.shape = tuple(shape)
        channels, *sizes = shape
        # Lists of flows: the type nn.Module declares no forward_log_det.
        self.scales: Any = nn.ModuleList()
        self.latents: Any = nn.ModuleList()
        self.parts: list[tuple[int, ...]] = []  # the shapes of the latent values that leave, in order
        for scale in range(scales):
            channels, sizes = 4 * channels, [size // 2 for size in sizes]
            layers = [SpaceToDepth(), *(layer for _ in range(depth) for layer in _step(channels, hidden, bound))]
            self.scales.append(reversible_chain(layers, disable))
            if scale < scales - 1:
                channels //= 2
                self.latents.append(_Latent(channels))
            self.parts.append((channels, *sizes))

    def forward(self, x: Tensor) -> Tensor:
        """Return the latent values (N, C * H * W) of images x (N, C, H, W)."""
        return self.forward_log_det(x)[0]

    def inverse(self, z: Tensor) -> Tensor:
        """Return the images (N, C, H, W) of latent values z (N, C * H * W)."""
        return self.inverse_log_det(z)[0]

    def forward_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return z = ``self(x)`` and log|det dz/dx| of each image, shape (N,).

        Raises:
            ValueError: the images have another shape.
        """
        if tuple(x.shape[1:]) != self.shape:
            shape = ", ".join(map(str, self.shape))
            raise ValueError(f"the flow was made for images (N, {shape}): got {tuple(x.shape)}")
        z, total = [], constant_log_det(x)
        for i, scale in enumerate(self.scales):
            x, log_det = scale.forward_log_det(x)
            total = total + log_det
            if i < len(self.latents):
                h, x = x.chunk(2, 1)
                h, log_det = self.latents[i].forward_log_det(h, x)
                total = total + log_det
                z.append(h)
        return torch.cat([part.flatten(1) for part in (*z, x)], 1), total

    def inverse_log_det(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return x = ``self.inverse(z)`` and log|det dx/dz| of each image, shape (N,).

        Raises:
            ValueError: z has another number of values.
        """
        if z.dim() != 2 or z.shape[1] != math.prod(self.shape):
            raise ValueError(f"latent values must have the shape (N, {math.prod(self.shape)}): got {tuple(z.shape)}")
        pieces = z.split(list(map(math.prod, self.parts)), 1)
        *left, x = (piece.unflatten(1, shape) for piece, shape in zip(pieces, self.parts, strict=True))
        total = constant_log_det(z)
        for i, scale in reversed(list(enumerate(self.scales))):
            if i < len(self.latents):
                h, log_det = self.latents[i].inverse_log_det(left[i], x)
                x, total = torch.cat((h, x), 1), total + log_det
            x, log_det = scale.inverse_log_det(x)
            total = total + log_det
        return x, total

    def log_prob(self, x: Tensor) -> Tensor:
        """Return the natural logarithm of the density of each image x (N, C, H, W), shape (N,)."""
        z, log_det = self.forward_log_det(x)
        return log_det - 0.5 * sum_per_sample(z.square() + math.log(2 * math.pi))

    @torch.no_grad()
    def sample(self, count: int, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """Return ``count`` images, (count, C, H, W), of latent values with the deviation ``temperature``.

        Args:
            count: number of images.
            temperature: at least 0; less than 1 gives likelier images (section 4 of the paper uses 0.7).
            generator: a generator of the CPU that draws the latent values; None for torch's own.

        Raises:
            ValueError: ``temperature`` is negative.
        """
        if temperature < 0:
            raise ValueError(f"temperature must be at least 0, the deviation of the latent values: got {temperature}")
        parameter = next(self.parameters())
        z = torch.randn(count, math.prod(self.shape), generator=generator, dtype=parameter.dtype)
        return self.inverse(temperature * z.to(parameter.device))


def bits_per_dimension(flow: Glow, images: Tensor, levels: int = 256) -> Tensor:
    """Return the mean negative log2-likelihood of a pixel value, a scalar to minimise (section 2 of the paper).

    Uniform noise makes the pixel values continuous. The result is an upper bound of the value for discrete pixels.

    Args:
        flow: the model.
        images: uint8 of shape (N, C, H, W).
        levels: 256, or for example 32 to keep only the first 5 bits of a pixel.

    Raises:
        TypeError: the images are not uint8.
        ValueError: ``levels`` is no power of two from 2 to 256.
    """
    if images.dtype != torch.uint8:
        raise TypeError(
            f"images must be uint8, pixel values from 0 to 255: got {images.dtype}; for others use -flow.log_prob(x)"
        )
    if levels < 2 or 256 % levels:
        raise ValueError(f"levels must be a power of two from 2 to 256: got {levels}")
    x = torch.div(images, 256 // levels, rounding_mode="floor").to(next(flow.parameters()).dtype)
    x = (x + torch.rand_like(x)) / levels - 0.5
    dimensions = math.prod(images.shape[1:])
    return (math.log(levels) - flow.log_prob(x).mean() / dimensions) / math.log(2)


def glow_cifar(*, depth: int = 8, hidden: int = 64, disable: bool = False) -> Glow:
    """Return a small Glow of three scales for images (N, 3, 32, 32); the paper has 32 steps and 512 channels."""
    return Glow((3, 32, 32), 3, depth, hidden, disable=disable)


def _step(channels: int, hidden: int, bound: float) -> tuple[nn.Module, ...]:
    """Return one step of the flow (figure 2a)."""
    F, G = (_branch(channels // 2, hidden) for _ in range(2))
    coupling = AffineCoupling(F, G, adapter=partial(AffineAdapterExp, bound=bound))
    return ActNorm(channels), InvertibleConv1x1(channels), coupling


def _set_to_zero(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


def _branch(channels: int, hidden: int) -> nn.Module:
    """Return conv3x3, ReLU, conv1x1, ReLU, conv3x3 to twice the channels. The last one is initialised with zeros."""
    last = nn.Conv2d(hidden, 2 * channels, 3, padding=1)
    _set_to_zero(last)
    return nn.Sequential(
        nn.Conv2d(channels, hidden, 3, padding=1), nn.ReLU(), nn.Conv2d(hidden, hidden, 1), nn.ReLU(), last
    )
