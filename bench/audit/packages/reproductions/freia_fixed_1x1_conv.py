"""FrEIA 0.2: Fixed1x1Conv(M) multiplies by the transpose of M, FixedLinearTransform(M) by M

Wrong values, but a consistent layer: its inverse and log-determinant belong to the transpose as well. The
documentation says that M is the kernel of the convolution.
"""

import torch
from FrEIA.modules import Fixed1x1Conv, FixedLinearTransform

M, x = torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([[1.0, 1.0]])
(linear,), _ = FixedLinearTransform([(2,)], M=M)((x,))
(image,), _ = Fixed1x1Conv([(2, 1, 1)], M=M)((x.view(1, 2, 1, 1),))
print("FixedLinearTransform", linear.flatten().tolist(), " Fixed1x1Conv", image.flatten().tolist())
convolved = torch.conv2d(x.view(1, 2, 1, 1), M[..., None, None])
print("M x", (M @ x[0]).tolist(), " conv2d with kernel M", convolved.flatten().tolist())
assert image.flatten().tolist() == (M.T @ x[0]).tolist() != (M @ x[0]).tolist()
