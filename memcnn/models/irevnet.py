"""i-RevNet: a classifier whose features before the pooling still hold the whole image.

Jacobsen, Smeulders, Oyallon, "i-RevNet: Deep Invertible Networks", arXiv:1802.07088, section 3. A unit of the paper is
one additive step, (x, x~) -> (x~, x + F(x~)); an ``AdditiveCoupling`` is two of them. The invertible down-sampling of
section 3.1, ``SpaceToDepth``, turns positions into channels, so that no value is lost. In the paper, F of a unit that
down-samples is a strided convolution of the half before the down-sampling. Here F reads the half after it, and can
compute the same.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memcnn.engine.exact import Grid
from memcnn.models.additive import AdditiveCoupling
from memcnn.models.rearrange import SpaceToDepth
from memcnn.models.resnet import BranchMaker, basic_branch
from memcnn.models.streams import check_shape, reversible_chain

__all__ = ["ChannelPadding", "IRevNet", "irevnet_bijective", "irevnet_injective"]


class ChannelPadding(nn.Module):
    """Add channels: zeros, as in the paper, or further copies of the given channels in turn.

    ``inverse`` drops the added channels. inverse(forward(x)) is x, but forward(inverse(y)) need not be y.

    Args:
        channels: C, the number of channels of the input.
        width: the number of channels of the output, at least C.
        padding: "zeros" or "repeat".

    Raises:
        ValueError: ``width`` is less than ``channels``, or ``padding`` is neither word.
    """

    def __init__(self, channels: int, width: int, padding: str = "zeros"):
        super().__init__()
        if width < channels:
            raise ValueError(f"width must be at least the {channels} channels that are padded: got {width}")
        if padding not in ("zeros", "repeat"):
            raise ValueError(f"padding must be 'zeros' or 'repeat': got {padding!r}")
        self.channels, self.width, self.padding = channels, width, padding

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, width, H, W) for x (N, C, H, W)."""
        if self.padding == "zeros":
            return F.pad(x, (0, 0, 0, 0, 0, self.width - self.channels))
        return x[:, torch.arange(self.width, device=x.device) % self.channels]

    def inverse(self, y: Tensor) -> Tensor:
        """Return the first C channels of y."""
        return y[:, : self.channels].contiguous()

    def extra_repr(self) -> str:
        return f"{self.channels}, {self.width}, padding={self.padding!r}"


class IRevNet(nn.Module):
    """An invertible ``encoder`` of the image, then BatchNorm, ReLU, average pool and a linear layer.

    With zeros as padding, channels are constant until the first couplings have changed them, and BatchNorm would
    amplify the rounding errors of rebuilt zeros until gradients are wrong. Couplings are therefore exact by default.
    With ``padding="repeat"`` no channel is constant, and they are not.

    Args:
        units: number of couplings of each stage. Resolution halves between two stages.
        num_classes: number of logits.
        image_channels: channels of the image.
        initial: factor of the down-sampling before the first stage.
        width: channels of the first stage, an even number. None: the ``image_channels * initial**2`` that the
            down-sampling gives, which makes the encoder bijective. A larger one makes it injective.
        padding: "zeros" or "repeat", the content of the further channels of an injective encoder.
        branch: makes F and G, see ``memcnn.models.resnet``.
        exact: invert without rounding, as for ``AdditiveCoupling``. None: only if the padding is zeros.
        disable: keep the weights, but store every activation.

    Raises:
        ValueError: the widths do not fit.
    """

    def __init__(
        self,
        units: Sequence[int],
        num_classes: int = 10,
        *,
        image_channels: int = 3,
        initial: int = 2,
        width: int | None = None,
        padding: str = "zeros",
        branch: BranchMaker = basic_branch,
        exact: bool | float | Grid | None = None,
        disable: bool = False,
    ):
        super().__init__()
        self.image_channels = image_channels
        given = image_channels * initial**2
        width = given if width is None else width
        if width % 2:
            raise ValueError(f"width must be even, since couplings halve it: got {width}")
        layers: list[nn.Module] = [SpaceToDepth(initial)]
        if width != given:
            layers.append(ChannelPadding(given, width, padding))
        exact = (width != given and padding == "zeros") if exact is None else exact
        for stage, count in enumerate(units):
            if stage > 0:
                layers.append(SpaceToDepth(2))
                width *= 4
            for unit in range(count):
                Fm, Gm = (branch(width // 2, width // 2, activate=(stage, unit) != (0, 0)) for _ in range(2))
                layers.append(AdditiveCoupling(Fm, Gm, exact=exact))
        self.encoder = reversible_chain(layers, disable)
        self.head = nn.Sequential(
            nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (N, num_classes) of images x (N, image_channels, H, W)."""
        return self.head(self.encode(x))

    def encode(self, x: Tensor) -> Tensor:
        """Return the code, (N, C, h, w), of images x (N, image_channels, H, W).

        h = H / (initial * 2**(stages - 1)), likewise w, and C = width * 4**(stages - 1). The sizes must be divisible.

        Raises:
            ValueError: x has another shape.
        """
        check_shape(x, ("N", self.image_channels, "H", "W"))
        return self.encoder(x)

    def decode(self, code: Tensor) -> Tensor:
        """Return the images of codes (N, C, h, w), up to rounding; up to half a grid step if the encoder is exact.

        Any code gives an image. If the encoder is injective, ``encode`` of this image need not be the code.
        """
        return self.encoder.inverse(code)


def irevnet_bijective(num_classes: int = 10, *, units: Sequence[int] = (6, 6, 6), disable: bool = False) -> IRevNet:
    """Return a bijective i-RevNet for images (N, 3, 32, 32): 12, 48 and 192 channels, code (N, 192, 4, 4)."""
    return IRevNet(units, num_classes, disable=disable)


def irevnet_injective(
    num_classes: int = 10, *, units: Sequence[int] = (6, 6, 6), padding: str = "zeros", disable: bool = False
) -> IRevNet:
    """Return an injective i-RevNet for images (N, 3, 32, 32): 32, 128 and 512 channels, code (N, 512, 4, 4)."""
    return IRevNet(units, num_classes, width=32, padding=padding, disable=disable)
