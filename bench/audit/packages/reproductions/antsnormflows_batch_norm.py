"""antsnormflows 1.0.0: BatchNorm's inverse is the identity

Wrong result. The inverse normalises its own input again. That input is already normalised, with mean 0 and variance
1, so nothing changes. The package offers both directions as a flow with log-determinants.
"""

import antsnormflows as an
import torch

torch.manual_seed(0)
x = 3 + 2 * torch.randn(16, 3)
layer = an.flows.BatchNorm()
y, _ = layer(x)
back, log_det = layer.inverse(y)
print("inverse(y) - y:", (back - y).abs().max().item(), " inverse(y) - x:", (back - x).abs().max().item())
assert torch.allclose(back, y, atol=1e-5)
