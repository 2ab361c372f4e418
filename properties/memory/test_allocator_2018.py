"""The model of PyTorch's CUDA allocator of 2018 rounds requests and splits blocks as that allocator did."""

import torch

from memcnn.memory.allocator_2018 import Meter2018


def kilobytes(count: float) -> torch.Tensor:
    return torch.empty(int(1024 * count), dtype=torch.uint8)


def test_the_allocator_of_2018_rounds_and_does_not_split_small_rests():
    with Meter2018() as meter:
        held = [kilobytes(0.001), kilobytes(1.1)]
        assert meter.allocated_bytes == 512 + 1536
        held += [kilobytes(4096), kilobytes(1600)]  # 12.5 units
        assert meter.allocated_bytes == 2048 + 4096 * 1024 + 13 * 2**17
        held.clear()
        assert meter.allocated_bytes == 0
        held.append(kilobytes(1100))  # takes the smallest free block that is large enough, 13 units, and all of it
        assert meter.allocated_bytes == 13 * 2**17
        held.append(kilobytes(1500))  # takes a part of the block of 4096, because more than 1024 remain
        assert meter.allocated_bytes == 13 * 2**17 + 12 * 2**17
        del held[1]
        held.append(kilobytes(3500))  # the freed part has joined the rest of its block; the surplus of 596 stays in it
        assert meter.allocated_bytes == 13 * 2**17 + 4096 * 1024
        assert meter.current_bytes == 4600 * 1024
