"""normflows 1.7.3: BatchNorm's log-determinant is infinite with many features

fault. It is the logarithm of one over the product of all standard deviations, and the product leaves the range of
float32: 64 features of standard deviation 0.1 have a product of 1e-64. (That it leaves out the derivatives of the
batch's statistics is said in its documentation, and that it has no inverse is plain.)
"""

import normflows as nf
import torch

torch.manual_seed(0)
z = 0.1 * torch.randn(256, 64)
_, log_det = nf.flows.BatchNorm()(z)
print("log-determinant", log_det[0].item(), "wanted", -z.std(0).log().sum().item())
assert log_det.isinf().all()
