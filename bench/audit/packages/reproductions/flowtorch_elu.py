"""flowtorch 0.8: ELU's inverse adds 1e-8 before the logarithm

Loss of precision. ``log1p(y + 1e-8)`` is meant to avoid log 0, but it shifts every negative value. In float64 the
inverse is wrong by 4e-8 at x = -1 and by 0.03 at x = -15, although y itself still determines x to 1e-9.
"""

import flowtorch.bijectors as fb
import torch

x = torch.tensor([-1.0, -10.0, -15.0], dtype=torch.float64)
layer = fb.ELU(shape=torch.Size((3,)))
y, _ = layer._forward(x, None)
print("inverse", layer._inverse(y, None)[0].tolist(), " log1p(y)", torch.log1p(y).tolist())
assert (layer._inverse(y, None)[0] - x)[2].abs() > 0.03 and (torch.log1p(y) - x)[2].abs() < 1e-8
