"""Kernels of our own, for layers on which the library's are slow, used only where they were measured to be faster.

    from memcnn import kernels

    model = resnet32().to("cuda", memory_format=torch.channels_last)
    kernels.use_narrow_convolutions(model)  # same parameters and state-dict keys
    ...                                     # train under bfloat16 autocast
    for measurement in kernels.measured():
        print(measurement)

Importing this package does not import Triton. Without Triton, without a GPU, and for layers that the kernel does not
support, ``narrow_conv2d`` is ``torch.nn.functional.conv2d``.
"""

from memcnn.kernels.choice import Choices, Measurement, choosing, measured
from memcnn.kernels.convolution import NarrowConv2d, has_triton, narrow_conv2d, use_narrow_convolutions

__all__ = [
    "Choices",
    "Measurement",
    "NarrowConv2d",
    "choosing",
    "has_triton",
    "measured",
    "narrow_conv2d",
    "use_narrow_convolutions",
]
