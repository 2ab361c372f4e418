"""The residual and reversible networks of the CIFAR experiments.

Architecture and parameter counts: Gomez, Ren, Urtasun, Grosse, "The Reversible Residual Network: Backpropagation
Without Storing Activations", arXiv:1707.04585; pre-activation units: He et al., arXiv:1603.05027. Every constructor
takes ``num_classes`` and returns a module that maps images (N, 3, 32, 32) to logits (N, num_classes).
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Protocol, cast

from torch import Tensor, nn

from memcnn.engine.survey import quiet_container
from memcnn.models.additive import AdditiveCoupling
from memcnn.models.legacy import (
    BasicBlock,
    BasicBlockSub,
    Bottleneck,
    BottleneckSub,
    ResNet,
    RevBasicBlock,
    RevBottleneck,
    batch_norm,
    conv3x3,
)
from memcnn.models.sequence import HalvesPassedOn
from memcnn.models.streams import in_full_precision
from memcnn.models.wrapper import InvertibleModuleWrapper

__all__ = [
    "MODELS",
    "BasicBlock",
    "BasicBlockSub",
    "Bottleneck",
    "BottleneckSub",
    "Branch",
    "CifarResNet",
    "ResNet",
    "RevBasicBlock",
    "RevBottleneck",
    "basic_branch",
    "batch_norm",
    "bottleneck_branch",
    "conv3x3",
    "resnet32",
    "resnet110",
    "resnet164",
    "revnet38",
    "revnet110",
    "revnet164",
]


@quiet_container
class Branch(nn.Sequential):
    """Layers in sequence; unlike ``nn.Sequential`` itself, ``torch.compile`` compiles it as a unit of its own."""

    stands_for = nn.Sequential  # read by memcnn.engine.survey and memcnn.kernels.batch_norm

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the layers for x."""
        return super().forward(x)


class BranchMaker(Protocol):
    """A function that makes F, G or the branch of a plain unit; ``expansion`` widens the stages' channels."""

    expansion: int

    def __call__(self, in_channels: int, out_channels: int, stride: int = 1, *, activate: bool = True) -> Branch:
        """Return the branch; ``activate`` puts BN and ReLU first."""


def _expands(factor: int) -> Callable[[Callable[..., Branch]], BranchMaker]:
    """Return a decorator that sets ``expansion`` of a function that makes branches."""

    def decorated(function: Callable[..., Branch]) -> BranchMaker:
        maker = cast(BranchMaker, function)
        maker.expansion = factor
        return maker

    return decorated


@_expands(1)
def basic_branch(in_channels: int, out_channels: int, stride: int = 1, *, activate: bool = True) -> Branch:
    """Return the branch [BN, ReLU,] conv3x3(stride), BN, ReLU, conv3x3. ``activate=False`` leaves the bracket out."""
    return Branch(
        *_activation(in_channels, activate),
        conv3x3(in_channels, out_channels, stride),
        *_activation(out_channels),
        conv3x3(out_channels, out_channels),
    )


@_expands(4)
def bottleneck_branch(in_channels: int, out_channels: int, stride: int = 1, *, activate: bool = True) -> Branch:
    """Return the branch [BN, ReLU,] conv1x1, BN, ReLU, conv3x3(stride), BN, ReLU, conv1x1.

    The inner width is a quarter of ``out_channels``. ``activate=False`` leaves the bracket out.
    """
    width = out_channels // bottleneck_branch.expansion
    return Branch(
        *_activation(in_channels, activate),
        nn.Conv2d(in_channels, width, 1, bias=False),
        *_activation(width),
        conv3x3(width, width, stride),
        *_activation(width),
        nn.Conv2d(width, out_channels, 1, bias=False),
    )


class ResidualUnit(nn.Module):
    """y = shortcut(x) + branch(x).

    The shortcut is conv1x1(stride) and BN if the unit strides or changes its width, else the identity. With
    ``full_precision`` it is float32 under autocast.
    """

    def __init__(
        self,
        branch: BranchMaker,
        in_channels: int,
        out_channels: int,
        stride: int,
        activate: bool,
        full_precision: bool,
    ):
        super().__init__()
        self.full_precision = full_precision
        self.branch = branch(in_channels, out_channels, stride, activate=activate)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.shortcut(x)
        return (in_full_precision(shortcut) if self.full_precision else shortcut) + self.branch(x)


class CifarResNet(nn.Module):
    """Stem, stages of units, BN, ReLU, global average pool, linear.

    Args:
        branch: ``basic_branch`` or ``bottleneck_branch``.
        units: number of units of each stage.
        channels: width of the stem, then of each stage (before the bottleneck's expansion).
        num_classes: number of logits.
        reversible: make every unit that neither strides nor changes its width a reversible one, whose F and G are
            two branches at half the width. Under autocast the stream that they invert stays in float32.
        disable: keep the reversible units' weights, but store every activation.
        exact: invert without rounding, see ``memcnn.engine.exact``.

    Raises:
        ValueError: ``channels`` does not name the stem and each stage.
    """

    def __init__(
        self,
        branch: BranchMaker,
        units: Sequence[int],
        channels: Sequence[int],
        num_classes: int = 10,
        *,
        reversible: bool = False,
        disable: bool = False,
        exact: bool = False,
    ):
        super().__init__()
        if len(channels) != len(units) + 1:
            raise ValueError(
                f"channels must name the stem and each of the {len(units)} stages, so {len(units) + 1} "
                f"widths: got {len(channels)}"
            )
        self.reversible = reversible
        stem, *widths = channels
        widths = [width * branch.expansion for width in widths]
        self.stem = nn.Sequential(conv3x3(3, stem), *_activation(stem))
        self.stages = nn.ModuleList()
        for stage, (count, (in_width, width)) in enumerate(zip(units, pairwise([stem, *widths]), strict=True)):
            self.stages.append(
                HalvesPassedOn(
                    *(
                        _unit(
                            branch,
                            in_width if unit == 0 else width,
                            width,
                            stride=2 if stage > 0 and unit == 0 else 1,
                            activate=(stage, unit) != (0, 0),
                            reversible=reversible,
                            disable=disable,
                            exact=exact,
                        )
                        for unit in range(count)
                    )
                )
            )
        self.head = nn.Sequential(
            *_activation(widths[-1]), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], num_classes)
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (N, num_classes) of images x (N, 3, H, W)."""
        return self.head[-1](self.features(x))

    def features(self, x: Tensor) -> Tensor:
        """Return the input of the linear layer, (N, C), for images x (N, 3, H, W)."""
        x = self.begin(x)
        for stage in self.stages:
            x = stage(x)
        return self.end(x)

    def begin(self, x: Tensor) -> Tensor:
        """Return the input of the first stage for images x (N, 3, H, W)."""
        x = self.stem(x)
        return in_full_precision(x) if self.reversible else x

    def end(self, x: Tensor) -> Tensor:
        """Return BN, ReLU and global average, (N, C), of the last stage's output x (N, C, H, W)."""
        for layer in list(self.head)[:-1]:
            x = layer(x)
        return x


def resnet32(num_classes: int = 10, *, disable: bool = False) -> CifarResNet:
    """Return ResNet-32. ``disable`` has no effect: no unit is reversible."""
    return CifarResNet(basic_branch, (5, 5, 5), (16, 16, 32, 64), num_classes)


def resnet110(num_classes: int = 10, *, disable: bool = False) -> CifarResNet:
    """Return ResNet-110. ``disable`` has no effect: no unit is reversible."""
    return CifarResNet(basic_branch, (18, 18, 18), (16, 16, 32, 64), num_classes)


def resnet164(num_classes: int = 10, *, disable: bool = False) -> CifarResNet:
    """Return ResNet-164. ``disable`` has no effect: no unit is reversible."""
    return CifarResNet(bottleneck_branch, (18, 18, 18), (16, 16, 32, 64), num_classes)


def revnet38(num_classes: int = 10, *, disable: bool = False, exact: bool = False) -> CifarResNet:
    """Return RevNet-38. ``disable`` and ``exact`` are those of ``CifarResNet``."""
    return CifarResNet(
        basic_branch, (3, 3, 3), (32, 32, 64, 112), num_classes, reversible=True, disable=disable, exact=exact
    )


def revnet110(num_classes: int = 10, *, disable: bool = False, exact: bool = False) -> CifarResNet:
    """Return RevNet-110. ``disable`` and ``exact`` are those of ``CifarResNet``."""
    return CifarResNet(
        basic_branch, (9, 9, 9), (32, 32, 64, 128), num_classes, reversible=True, disable=disable, exact=exact
    )


def revnet164(num_classes: int = 10, *, disable: bool = False, exact: bool = False) -> CifarResNet:
    """Return RevNet-164. ``disable`` and ``exact`` are those of ``CifarResNet``."""
    return CifarResNet(
        bottleneck_branch, (9, 9, 9), (32, 32, 64, 128), num_classes, reversible=True, disable=disable, exact=exact
    )


MODELS = {model.__name__: model for model in (resnet32, resnet110, resnet164, revnet38, revnet110, revnet164)}


def _unit(
    branch: BranchMaker,
    in_width: int,
    width: int,
    *,
    stride: int,
    activate: bool,
    reversible: bool,
    disable: bool,
    exact: bool,
) -> nn.Module:
    """Return a reversible unit, or a plain one where it strides, changes its width, or should not be reversible."""
    if not reversible or stride != 1 or in_width != width:
        return ResidualUnit(branch, in_width, width, stride, activate, full_precision=reversible)
    F, G = (branch(width // 2, width // 2, activate=activate) for _ in range(2))
    return InvertibleModuleWrapper(AdditiveCoupling(F, G, exact=exact), disable=disable)


def _activation(channels: int, wanted: bool = True) -> Sequence[nn.Module]:
    return (nn.BatchNorm2d(channels), nn.ReLU(inplace=True)) if wanted else ()
