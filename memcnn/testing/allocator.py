"""The former place of ``memcnn.memory.allocator``: every name can still be imported from here."""

from memcnn.memory.allocator import CUDA_BLOCK_BYTES, allocator_peak_bytes, allocator_total_bytes, in_blocks

__all__ = ["CUDA_BLOCK_BYTES", "allocator_peak_bytes", "allocator_total_bytes", "in_blocks"]
