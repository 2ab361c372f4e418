"""iunets 0.1: the gradient of the Cayley transform, the default of every learned resampling, has the wrong sign

Wrong result. For a skew matrix A and Q = (I + A)^-1 (I - A) the gradient of <G, Q> is -2 (I - A)^-1 G (I - A)^-1.
``cayley.backward`` returns 2 (I - A)^-1 G (I + A)^-1 Q instead. At A = 0 this is the negative of the right gradient;
for other A the ratio is not constant. So training moves the orthogonal kernels of ``InvertibleDownsampling``,
``InvertibleUpsampling`` and ``InvertibleChannelMixing`` uphill. The file in the repository is the same. No report was
found.
"""

import torch
from iunets.cayley import cayley

torch.manual_seed(0)
W = (1e-6 * torch.randn(3, 3, dtype=torch.float64)).requires_grad_()
G, identity = torch.randn(3, 3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
A = W - W.T
ours = torch.linalg.solve(identity + A, identity - A)
theirs = cayley.apply(A)
print("values differ by", (ours - theirs).abs().max().item())
(right,) = torch.autograd.grad((ours * G).sum(), W, retain_graph=True)
(got,) = torch.autograd.grad((theirs * G).sum(), W)
print("gradient:", got[0].tolist())
print("wanted:  ", right[0].tolist())
assert torch.allclose(ours, theirs) and torch.allclose(got, -right, rtol=1e-3) and not torch.allclose(got, right)
