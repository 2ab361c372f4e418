"""The former place of ``memcnn.memory``: the names that were here can still be imported."""

from memcnn.memory import (
    CUDA_BLOCK_BYTES,
    PeakSplit,
    StepMemory,
    TensorMeter,
    allocator_peak_bytes,
    measure_peak_split,
    measure_step_memory,
    tensor_peak_bytes,
)

__all__ = [
    "CUDA_BLOCK_BYTES",
    "PeakSplit",
    "StepMemory",
    "TensorMeter",
    "allocator_peak_bytes",
    "measure_peak_split",
    "measure_step_memory",
    "tensor_peak_bytes",
]
