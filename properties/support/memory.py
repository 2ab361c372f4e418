"""The peak bytes of a training step of a chain, an assertion about them, and a layer whose memory is known."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from memcnn.testing.laws import memory
from properties.support.twin import data, plain_twin


def step_bytes(chain: nn.Module, *, passes: int = 1) -> int:
    """Return the peak bytes of a step on (4, 8, 16, 16) images, beyond input, parameters and their gradients."""
    return memory.step_bytes(chain, maps(), passes=passes)


def maps() -> Tensor:
    """Return a batch of (4, 8, 16, 16) images in float32."""
    return data(4, 8, 16, 16, dtype=torch.float32)


def assert_flat(make: memory.MakeChain, *, least_maps: int, depths: tuple[int, int] = (4, 32), passes: int = 1) -> None:
    """Assert that a further block adds less than a hundredth of what it adds under plain backpropagation.

    Args:
        make: makes a chain of a given number of blocks; its ``plain_twin`` stores all activations.
        least_maps: the number of activations that plain backpropagation must store for a block, at least.
        depths: the numbers of blocks that are compared.
        passes: the number of backward passes over a retained graph.
    """
    stored = memory.bytes_per_block(lambda depth: plain_twin(make(depth)), maps(), depths=(2, 6), passes=passes)
    assert stored > least_maps * maps().nbytes, f"the twin must store at least {least_maps} maps a block"
    assert memory.bytes_per_block(make, maps(), depths=depths, passes=passes) < stored / 100


def linear(
    dtype: torch.dtype = torch.float32, *, rows: int = 5
) -> tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, Tensor]]]:
    """Return a function that makes a linear layer from 64 to 32 values, and one that makes its batch with labels."""

    def make():
        return nn.Linear(64, 32, dtype=dtype)

    def batch():
        return torch.ones(rows, 64, dtype=dtype), torch.zeros(rows, dtype=torch.int64)

    return make, batch
