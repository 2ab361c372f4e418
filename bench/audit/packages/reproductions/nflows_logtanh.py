"""nflows 0.14: LogTanh has a jump in its slope at the cut point

fault. Its documentation says that alpha matches the first derivative of tanh there. alpha is (1 - tanh(tanh(c))) / c
instead of c (1 - tanh(c)^2), so that the density jumps by 17 % at c = 1. Inverse and log-determinant fit the function
as it is.
"""

import torch
from nflows.transforms import LogTanh

x = torch.tensor([[1 - 1e-6], [1 + 1e-6]], dtype=torch.float64)
_, log_det = LogTanh(1.0)(x)
print("slope left of the cut", log_det[0].exp().item(), "right of it", log_det[1].exp().item())
assert log_det[0].exp() / log_det[1].exp() > 1.1
