"""Triton kernels for the layers of narrow networks on a GPU.

    from memcnn import kernels

    model = resnet32().to("cuda", memory_format=torch.channels_last)
    kernels.use_narrow_convolutions(model)  # same parameters and state-dict keys
    ...                                     # train under bfloat16 autocast
    for measurement in kernels.measured():
        print(measurement)

``use_narrow_convolutions``: output, input gradient and weight gradient of 3x3 convolutions with 16, 32 or 64 channels,
on which cuDNN is slow. Each kernel is used for a shape only if it was measured to be faster there.

``use_fused_norms``: BatchNorm and ReLU in front of a convolution. No GPU has timed it yet.

Microseconds of a weight gradient in bfloat16, 100 images, on an H200 (PyTorch 2.11, cuDNN 9.19 free to choose its
algorithm; ``python -m bench.narrow_conv --benchmark``):

========  =======  =====  ====
channels  image    cuDNN  ours
========  =======  =====  ====
16        32 x 32  35.4   9.3
32        16 x 16  22.1   10.8
64        8 x 8    18.6   8.9
64        16 x 16  20.9   13.8
32        32 x 32  47.1   20.0
========  =======  =====  ====

A captured and compiled training step of ResNet-32 took 2.57 ms without the kernel for weight gradients and 1.82 ms with
it. The kernel for output and input gradient has not run on a GPU yet.

Without Triton, without a GPU, and for layers that the kernels do not support, ``narrow_conv2d`` is
``torch.nn.functional.conv2d``.
"""

from memcnn.kernels.batch_norm import BatchNormReLU2d, SkippedReLU, use_fused_norms
from memcnn.kernels.choice import Choices, Measurement, choosing, measured
from memcnn.kernels.convolution import NarrowConv2d, narrow_conv2d, use_narrow_convolutions
from memcnn.kernels.devices import has_triton

__all__ = [
    "BatchNormReLU2d",
    "Choices",
    "Measurement",
    "NarrowConv2d",
    "SkippedReLU",
    "choosing",
    "has_triton",
    "measured",
    "narrow_conv2d",
    "use_fused_norms",
    "use_narrow_convolutions",
]
