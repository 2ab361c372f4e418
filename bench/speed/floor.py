"""The floor: the shortest time in which a device can run a training step, from operations, bytes and measured rates."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from bench.speed.timing import seconds
from memcnn.memory import training_step
from memcnn.models.resnet import MODELS
from memcnn.training.execution import Execution

EXPLANATION = """\
The floor is the time that a step's arithmetic and memory traffic take at the rates that this machine reaches. Each
convolution and matrix product, in the forward pass, the recomputation and the backward pass, takes the longer of two
times: its operations at the rate of a large matrix product, or its bytes at the rate of a large copy (inputs read once,
outputs written once). The update reads weights, momenta and gradients once, and writes weights and momenta once.
Everything else (normalisation, activation functions, couplings, augmentation) counts as free, as if it were fused into
these operations."""

CEILING_REPEATS = 7
UPDATE_BYTES = 20
"""Bytes of an update per float32 weight: it reads weight, momentum and gradient, and writes weight and momentum."""


@dataclass(frozen=True)
class Work:
    """The work of one training step.

    Attributes:
        parts: (operations, bytes) of each convolution and matrix product.
        update_bytes: the bytes that the update reads and writes.
    """

    parts: tuple[tuple[int, int], ...]
    update_bytes: int

    @property
    def flops(self) -> int:
        """Operations of all convolutions and matrix products."""
        return sum(flops for flops, _ in self.parts)

    @property
    def bytes(self) -> int:
        """Bytes that the step reads and writes."""
        return self.update_bytes + sum(size for _, size in self.parts)

    def floor_seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """Return the floor in seconds at these rates."""
        parts = sum(max(flops / flops_per_second, size / bytes_per_second) for flops, size in self.parts)
        return parts + self.update_bytes / bytes_per_second


class Counter(TorchDispatchMode):
    """Records (operations, bytes) of every convolution and matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[tuple[int, int]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        if (count := flop_registry.get(function.overloadpacket)) is not None:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
            size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            self.parts.append((count(*args, **kwargs, out_val=out), size))
        return out


def work(network: str, *, batch: int, precision: str) -> Work:
    """Count the work of a training step on fake tensors, without computing anything.

    Args:
        network: a name in ``MODELS``.
        batch: images a step.
        precision: "bf16" counts the step under bfloat16 autocast.
    """
    with FakeTensorMode():
        model, *_, step = training_step(
            MODELS[network],
            lambda: (torch.zeros(batch, 3, 32, 32), torch.zeros(batch, dtype=torch.int64)),
            loss=F.cross_entropy,
            optimizer=None,
            autocast=torch.bfloat16 if precision == "bf16" else None,
        )
        with Counter() as counter:
            step()
    return Work(tuple(counter.parts), UPDATE_BYTES * sum(parameter.numel() for parameter in model.parameters()))


def ceilings(device: torch.device, execution: Execution) -> tuple[float, float]:
    """Return the best operations a second of a large matrix product, and bytes a second of a large copy."""
    size, numbers = (8192, 2**28) if device.type == "cuda" else (2048, 2**25)
    dtype = torch.bfloat16 if execution.precision == "bf16" else torch.float32
    left, right = torch.randn(2, size, size, device=device, dtype=dtype)
    source, target = torch.randn(2, numbers, device=device)
    with execution.settings(device):
        products = [seconds(lambda: left @ right) for _ in range(CEILING_REPEATS)]
        copies = [seconds(lambda: target.copy_(source)) for _ in range(CEILING_REPEATS)]
    return 2 * size**3 / min(products), 2 * source.nbytes / min(copies)
