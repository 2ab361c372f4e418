"""nflows 0.14: the slope of LogTanh jumps at the cut point

Wrong result. The documentation says that alpha matches the first derivative of tanh at the cut point. alpha is (1 -
tanh(tanh(c))) / c instead of c (1 - tanh(c)^2), so the density jumps by 17 % at c = 1. Inverse and log-determinant
are right for the function as it is.
"""

import torch
from nflows.transforms import LogTanh

x = torch.tensor([[1 - 1e-6], [1 + 1e-6]], dtype=torch.float64)
_, log_det = LogTanh(1.0)(x)
print("slope left of the cut", log_det[0].exp().item(), "right of it", log_det[1].exp().item())
assert log_det[0].exp() / log_det[1].exp() > 1.1
