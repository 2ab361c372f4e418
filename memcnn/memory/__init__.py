"""The memory of PyTorch code in bytes: measured exactly, or predicted without computing anything.

There are two meters, because each sees memory that the other does not:

* ``tensor_peak_bytes`` follows every tensor that an operator returns. It works on any device, and on fake and meta
  tensors. It sees neither the scratch memory that a kernel allocates and frees within one operator, nor that a storage
  was resized to 0, nor what other Python threads make. Its result does not depend on the machine or on the number of
  threads that PyTorch computes with.
* ``allocator_peak_bytes`` asks the allocator: on the CPU through the events that the profiler records, on CUDA through
  the counters of the caching allocator. It includes scratch memory, so its result is the larger one.

For training steps:

* ``measure_step_memory`` measures the bytes that a step adds to parameters and gradients.
* ``measure_peak_split`` measures the bytes of each kind of tensor at the peak of a step.
* ``predict_step_memory`` predicts the same split for a device that need not exist, ``step_flops`` the operations.
* ``largest_that_fits`` searches for the largest batch, depth or other size within a number of bytes.

This package imports nothing but torch and the standard library, so that it can measure other packages and older
commits.
"""

from .allocator import CUDA_BLOCK_BYTES, allocator_peak_bytes, allocator_total_bytes, in_blocks
from .fitting import largest_that_fits
from .prediction import predict_step_memory, step_flops, training_step
from .step import PeakSplit, StepMemory, measure_peak_split, measure_step_memory
from .tensors import TensorMeter, tensor_peak_bytes

__all__ = [
    "CUDA_BLOCK_BYTES",
    "PeakSplit",
    "StepMemory",
    "TensorMeter",
    "allocator_peak_bytes",
    "allocator_total_bytes",
    "in_blocks",
    "largest_that_fits",
    "measure_peak_split",
    "measure_step_memory",
    "predict_step_memory",
    "step_flops",
    "tensor_peak_bytes",
    "training_step",
]
