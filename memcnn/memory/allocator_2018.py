"""CUDA's caching allocator of PyTorch 0.2 to 1.0. The memory published in 2018 was counted by it.

* A request below 1 MiB took blocks of 512 bytes out of segments of 1 MiB.
* A larger request was rounded up to units of 128 KiB. It took the smallest free block that was large enough, else a
  new one. The block was split only if more than 1 MiB of it remained.
* ``memory_allocated`` was the sum of the blocks in use, so it counted the unused end of a block as well.

Later versions round large requests to 512 bytes, too. Source: aten/src/THC/THCCachingAllocator.cpp.
"""

import torch

from .tensors import TensorMeter

SMALL_BYTES = 2**20
SMALL_UNIT_BYTES, LARGE_UNIT_BYTES = 512, 2**17


class Meter2018(TensorMeter):
    """A tensor meter that also places each storage as that allocator did.

    Attributes:
        allocated_bytes: value that ``torch.cuda.memory_allocated`` would return now.
    """

    def __init__(self) -> None:
        super().__init__()
        self.allocated_bytes = 0
        self._free: list[_Block] = []
        self._used: dict[int, _Block] = {}

    def _count(self, storage: torch.UntypedStorage) -> None:
        super()._count(storage)
        key = id(storage)
        if storage.nbytes() and key not in self._used:
            self._used[key] = block = self._allocate(storage.nbytes())
            self.allocated_bytes += block.size

    def _forget(self, key: int) -> None:
        super()._forget(key)
        if (block := self._used.pop(key, None)) is not None:
            self.allocated_bytes -= block.size
            self._release(block)

    def _allocate(self, size: int) -> "_Block":
        unit = SMALL_UNIT_BYTES if size < SMALL_BYTES else LARGE_UNIT_BYTES
        size = -(-size // unit) * unit
        small = size <= SMALL_BYTES
        fitting = [block for block in self._free if block.small == small and block.size >= size]
        if fitting:
            block = min(fitting, key=lambda block: block.size)
            self._free.remove(block)
        else:
            block = _Block(SMALL_BYTES if small else size, small)
        if block.size - size >= (SMALL_UNIT_BYTES if small else SMALL_BYTES + 1):
            self._free.append(block.split(size))
        return block

    def _release(self, block: "_Block") -> None:
        for neighbour in (block.previous, block.next):
            if neighbour in self._free:
                self._free.remove(neighbour)
                first, second = (neighbour, block) if neighbour is block.previous else (block, neighbour)
                block = first.join(second)
        self._free.append(block)


class _Block:
    """A part of a segment, linked to its neighbours there."""

    def __init__(self, size: int, small: bool, previous: "_Block | None" = None, next_: "_Block | None" = None) -> None:
        self.size, self.small, self.previous, self.next = size, small, previous, next_

    def split(self, size: int) -> "_Block":
        """Keep the first ``size`` bytes in this block, and return the rest as a new one."""
        rest = _Block(self.size - size, self.small, self, self.next)
        if self.next is not None:
            self.next.previous = rest
        self.size, self.next = size, rest
        return rest

    def join(self, other: "_Block") -> "_Block":
        """Append the block behind this one, and return this one."""
        self.size, self.next = self.size + other.size, other.next
        if self.next is not None:
            self.next.previous = self
        return self
