"""FrEIA 0.2: InvertibleSigmoid's log-determinant of an image is not one number a sample

fault. It sums over the first dimension after the batch only, so that an image of C x H x W gives N x H x W values,
which then broadcast against the other layers' N. Vectors are right.
"""

import torch
from FrEIA.modules import InvertibleSigmoid

(_,), log_det = InvertibleSigmoid([(2, 3, 3)])((torch.zeros(4, 2, 3, 3),))
print("log-determinant has shape", tuple(log_det.shape), "wanted (4,)")
assert log_det.shape == (4, 3, 3)
