"""torch 2.13.0: a CPU with AVX-512 convolves bfloat16 volumes of depth 1 and 2 wrongly

Wrong result, caused by oneDNN 3.12 in torch. In ``channels_last_3d``, for a kernel of depth 3 and an input of depth
2, the gradient of the weight is computed from uninitialised memory, and is right only by chance. An input with one
channel of stride 1 is treated as channels_last; on a CPU with AVX512-BF16 its output is wrong, also at depth 1.
Contiguous inputs, float32 and float16 are right. Random networks under autocast found it: one half of the plain
twin's input had such strides, and the gradient was wrong. The tensor that the engine rebuilds is contiguous, and the
gradient was right. A similar error, for convolutions with strides, is known
(https://github.com/pytorch/pytorch/issues/169688).
"""

import torch
import torch.nn.functional as F

torch.manual_seed(0)
weight = torch.randn(16, 16, 3, 3, 3, dtype=torch.bfloat16, requires_grad=True)
x = torch.randn(2, 16, 2, 4, 4, dtype=torch.bfloat16)


def gradient(memory_format):
    unwritten = [torch.full((2**i,), 1e3) for i in range(4, 20)]
    del unwritten  # the next to ask for memory finds these values
    y = F.conv3d(x.to(memory_format=memory_format), weight, padding=1)
    return torch.autograd.grad(y.sum(), weight)[0].float()


right, got = gradient(torch.contiguous_format), gradient(torch.channels_last_3d)
gradient_error = ((got - right).abs().max() / right.abs().max()).item()
print(f"weight's gradient in channels_last_3d: relative error {gradient_error:.3g}")

weight = torch.randn(1, 1, 3, 3, 3, dtype=torch.bfloat16)
x = torch.randn(2, 1, 1, 4, 4, dtype=torch.bfloat16)
same = x.as_strided(x.shape, (16, 1, 16, 4, 1))
right, got = (F.conv3d(values, weight, padding=1).float() for values in (x, same))
error = ((got - right).abs().max() / right.abs().max()).item()
print(f"output for equal values, the one channel at a stride of 1: relative error {error:.3g}")
assert torch.equal(x, same) and gradient_error > 0.1 and error > 0.1
