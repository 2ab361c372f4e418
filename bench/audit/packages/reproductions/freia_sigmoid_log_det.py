"""FrEIA 0.2: InvertibleSigmoid returns the log-determinant of an image with the wrong shape

Wrong result. It sums over the first dimension after the batch only. An image of shape (N, C, H, W) gives (N, H, W)
values, which then broadcast against the (N,) values of other layers. Vectors are right.
"""

import torch
from FrEIA.modules import InvertibleSigmoid

(_,), log_det = InvertibleSigmoid([(2, 3, 3)])((torch.zeros(4, 2, 3, 3),))
print("log-determinant has shape", tuple(log_det.shape), "wanted (4,)")
assert log_det.shape == (4, 3, 3)
