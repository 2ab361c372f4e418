"""antsnormflows 1.0.0: BatchNorm's inverse is the identity

fault. It takes mean and variance of its own input, the normalised values, which are 0 and 1, and "undoes" those. Both
directions are offered as a flow with log-determinants.
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
