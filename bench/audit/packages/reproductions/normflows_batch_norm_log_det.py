"""normflows 1.7.3: BatchNorm's log-determinant is infinite with many features

Wrong result. The log-determinant is computed as the logarithm of one over the product of all standard deviations, and
the product underflows in float32: 64 features of standard deviation 0.1 have the product 1e-64. (The documentation
says that the derivatives of the batch statistics are left out. That the layer has no inverse is obvious.)
"""

import normflows as nf
import torch

torch.manual_seed(0)
z = 0.1 * torch.randn(256, 64)
_, log_det = nf.flows.BatchNorm()(z)
print("log-determinant", log_det[0].item(), "wanted", -z.std(0).log().sum().item())
assert log_det.isinf().all()
