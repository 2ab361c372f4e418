"""The networks of MemCNN 1.5: its classes, arguments and state-dict keys, on this project's reversible blocks.

``memcnn.models.resnet`` exports them under their old names, so old code and old files keep working. New code has
``revnet38()`` and its siblings, whose weights ``memcnn.convert_state_dict`` makes from those of MemCNN 1.5.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from memcnn.attribution import warn_user
from memcnn.models.additive import AdditiveCoupling
from memcnn.models.revop import InvertibleModuleWrapper

__all__ = [
    "BasicBlock",
    "BasicBlockSub",
    "Bottleneck",
    "BottleneckSub",
    "ResNet",
    "RevBasicBlock",
    "RevBottleneck",
    "batch_norm",
    "conv3x3",
]


def conv3x3(in_planes: int, out_planes: int, stride: int = 1) -> nn.Conv2d:
    """Return a 3x3 convolution that keeps height and width (at stride 1) and has no bias."""
    return nn.Conv2d(in_planes, out_planes, kernel_size=3, stride=stride, padding=1, bias=False)


def batch_norm(x: int) -> nn.BatchNorm2d:
    """Return MemCNN 1.5's BatchNorm of ``x`` channels: momentum 0.99, eps 1e-3.

    TensorFlow's momentum of 0.99, which it was meant to match, is 0.01 in PyTorch.
    """
    return nn.BatchNorm2d(x, eps=1e-3, momentum=0.99)


class _Branch(nn.Module):
    """A residual branch: for each convolution ``conv<i>`` a BatchNorm ``bn<i>`` and a ReLU before it.

    Args:
        convolutions: the convolutions, in order.
        noactivation: leave out the first BatchNorm and ReLU.
    """

    def __init__(self, convolutions: Sequence[nn.Conv2d], noactivation: bool):
        super().__init__()
        self.noactivation = noactivation
        for i, convolution in enumerate(convolutions, 1):
            if i > 1 or not noactivation:
                self.add_module(f"bn{i}", batch_norm(convolution.in_channels))
            self.add_module(f"conv{i}", convolution)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        modules: dict[str, Any] = self._modules
        for name, module in modules.items():
            if name.startswith("bn"):
                x = self.relu(module(x))
            elif name.startswith("conv"):
                x = module(x)
        return x


class BasicBlockSub(_Branch):
    """The branch [BN, ReLU,] conv3x3(stride), BN, ReLU, conv3x3; the bracket is left out with ``noactivation``."""

    def __init__(self, inplanes: int, planes: int, stride: int = 1, noactivation: bool = False):
        super().__init__([conv3x3(inplanes, planes, stride), conv3x3(planes, planes)], noactivation)


class BottleneckSub(_Branch):
    """The branch [BN, ReLU,] conv1x1, BN, ReLU, conv3x3(stride), BN, ReLU, conv1x1 to ``4 * planes`` channels."""

    def __init__(self, inplanes: int, planes: int, stride: int = 1, noactivation: bool = False):
        first, last = (nn.Conv2d(*sizes, 1, bias=False) for sizes in ((inplanes, planes), (planes, 4 * planes)))
        super().__init__([first, conv3x3(planes, planes, stride), last], noactivation)


class _Unit(nn.Module):
    """A residual unit. A reversible one without ``downsample`` is a wrapped additive coupling.

    Args:
        inplanes: channels of the input.
        planes: channels of the output, before the bottleneck's ``expansion``.
        stride: stride of the first 3x3 convolution.
        downsample: the shortcut; None for the identity.
        noactivation: leave out the first BatchNorm and ReLU of each branch.
    """

    expansion: int
    branch: "type[BasicBlockSub | BottleneckSub]"
    branch_name: str
    reversible: bool

    def __init__(self, inplanes: int, planes: int, stride: int = 1, downsample: nn.Module | None = None,
                 noactivation: bool = False):  # fmt: skip
        super().__init__()
        if self.reversible and downsample is None:
            if stride != 1:
                raise ValueError(f"a {type(self).__name__} with stride {stride} needs downsample, a module for the "
                                 "shortcut, since it cannot be reversible; give it one, or stride=1")  # fmt: skip
            G, F = (self.branch(inplanes // 2, planes // 2, 1, noactivation) for _ in range(2))
            self.revblock = InvertibleModuleWrapper(AdditiveCoupling(F, G))
        else:
            self.add_module(self.branch_name, self.branch(inplanes, planes, stride, noactivation))
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        if self.reversible and self.downsample is None:
            return self.revblock(x)
        shortcut = x if self.downsample is None else self.downsample(x)
        return shortcut + getattr(self, self.branch_name)(x)


class BasicBlock(_Unit):
    """A residual unit of two 3x3 convolutions."""

    expansion, branch, branch_name, reversible = 1, BasicBlockSub, "basicblock_sub", False


class Bottleneck(_Unit):
    """A residual unit of a 1x1, a 3x3 and a 1x1 convolution, whose output has ``4 * planes`` channels."""

    expansion, branch, branch_name, reversible = 4, BottleneckSub, "bottleneck_sub", False


class RevBasicBlock(_Unit):
    """A reversible unit whose F and G are ``BasicBlockSub`` at half the width; with ``downsample`` a plain one."""

    expansion, branch, branch_name, reversible = 1, BasicBlockSub, "basicblock_sub", True


class RevBottleneck(_Unit):
    """A reversible unit whose F and G are ``BottleneckSub`` at half the width; with ``downsample`` a plain one."""

    expansion, branch, branch_name, reversible = 4, BottleneckSub, "bottleneck_sub", True


class ResNet(nn.Module):
    """The ResNet or RevNet of MemCNN 1.5, from images (N, 3, H, W) to logits (N, num_classes).

    Args:
        block: ``BasicBlock``, ``Bottleneck``, ``RevBasicBlock`` or ``RevBottleneck``.
        layers: number of units of each stage.
        num_classes: number of logits.
        channels_per_layer: width of the stem, then of each stage; 64, 64, 128, 256, ... if not given.
        strides: stride of the stem, then of each stage; all 2 if not given.
        init_max_pool: add a max pool of stride 2 after the stem.
        init_kernel_size: kernel size of the stem's convolution.
        batch_norm_fix: give BatchNorm the settings of ``batch_norm``; else those of PyTorch.
        implementation: accepted for compatibility; it has no effect.

    Raises:
        TypeError: ``block`` is not a class of units.
        ValueError: ``channels_per_layer`` or ``strides`` do not name the stem and every stage.
    """

    def __init__(self, block: type[_Unit], layers: Sequence[int], num_classes: int = 1000,
                 channels_per_layer: Sequence[int] | None = None, strides: Sequence[int] | None = None,
                 init_max_pool: bool = False, init_kernel_size: int = 7, batch_norm_fix: bool = True,
                 implementation: int = 0):  # fmt: skip
        super().__init__()
        if not isinstance(block, type):
            raise TypeError("block must be a class, such as BasicBlock or RevBasicBlock: got "
                            f"{getattr(block, '__name__', block)!r}; a network of branch functions is a "
                            "memcnn.models.resnet.CifarResNet")  # fmt: skip
        if implementation != 0:
            warn_user("implementation is deprecated and has no effect: there is one implementation", DeprecationWarning)
        if channels_per_layer is None:
            channels_per_layer = [64, *(64 * 2**stage for stage in range(len(layers)))]
        strides = [2] * (len(layers) + 1) if strides is None else strides
        for name, values in (("channels_per_layer", channels_per_layer), ("strides", strides)):
            if len(values) != len(layers) + 1:
                raise ValueError(f"{name} must name the stem and each of the {len(layers)} stages, so "
                                 f"{len(layers) + 1} numbers: got {len(values)}")  # fmt: skip
        self.batch_norm_fix = batch_norm_fix
        self.channels_per_layer = channels_per_layer
        self.strides = strides
        self.init_max_pool = init_max_pool
        self.conv1 = nn.Conv2d(3, channels_per_layer[0], init_kernel_size, strides[0], (init_kernel_size - 1) // 2,
                               bias=False)  # fmt: skip
        self.bn1 = batch_norm(channels_per_layer[0])
        self.relu = nn.ReLU()
        if init_max_pool:
            self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        widths = [channels_per_layer[0], *(planes * block.expansion for planes in channels_per_layer[1:])]
        for i, (inplanes, width) in enumerate(pairwise(widths), 1):
            stage = _stage(block, inplanes, width, layers[i - 1], strides[i], noactivation=i == 1)
            self.add_module(f"layer{i}", stage)
        self.bn_final = batch_norm(widths[-1])
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(widths[-1], num_classes)
        self.configure()
        self.init_weights()

    def init_weights(self) -> None:
        """Draw the convolutions' weights by He's rule (fan-out), and reset every BatchNorm."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()

    def configure(self) -> None:
        """Give every BatchNorm the momentum and eps that ``batch_norm_fix`` asks for."""
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum, module.eps = (0.99, 1e-3) if self.batch_norm_fix else (0.1, 1e-5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        if self.init_max_pool:
            x = self.maxpool(x)
        for i in range(1, len(self.channels_per_layer)):
            x = getattr(self, f"layer{i}")(x)
        x = self.relu(self.bn_final(x))
        return self.fc(self.avgpool(x).flatten(1))


def _stage(
    block: type[_Unit], inplanes: int, width: int, count: int, stride: int, *, noactivation: bool
) -> nn.Sequential:
    """Return ``count`` units; the first one strides, and changes the width from ``inplanes`` to ``width``."""
    downsample = None
    if stride != 1 or inplanes != width:
        downsample = nn.Sequential(nn.Conv2d(inplanes, width, 1, stride, bias=False), batch_norm(width))
    planes = width // block.expansion
    units = [block(inplanes, planes, stride, downsample, noactivation)]
    return nn.Sequential(*units, *(block(width, planes) for _ in range(1, count)))
