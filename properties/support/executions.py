"""Executions of a training step, small networks to run in them, and a mode that finds operations that wait."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from memcnn.models.resnet import CifarResNet, basic_branch
from memcnn.training.execution import Execution
from memcnn.training.recipe import override
from properties.support.runs import RECIPE

CPU = torch.device("cpu")
PLAIN, GRAPH, COMPILED, BF16 = Execution(), Execution(graph=True), Execution(compile=True), Execution(precision="bf16")
SMALL = override(RECIPE, learning_rate=0.02, milestones=(2, 4))


def small_revnet(num_classes: int = 10, *, disable: bool = False) -> CifarResNet:
    """Return a RevNet with three reversible units and one that strides.

    It has at least 8 channels. With fewer, oneDNN's strided 1x1 convolution of channels_last images writes out of
    bounds (https://github.com/uxlfoundation/oneDNN/issues/6035).
    """
    return CifarResNet(basic_branch, (2, 2), (8, 8, 16), num_classes, reversible=True, disable=disable)


def small_resnet(num_classes: int = 10, *, disable: bool = False) -> CifarResNet:
    """Return a ResNet with the units of ``small_revnet``."""
    return CifarResNet(basic_branch, (2, 2), (8, 8, 16), num_classes)


class Reading(TorchDispatchMode):
    """Records the operations whose result Python must wait for."""

    WAITING = ("_local_scalar_dense", "equal", "nonzero", "is_nonzero", "masked_select", "allclose", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in self.WAITING:
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))
