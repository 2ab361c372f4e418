"""iunets 0.1: the gradient of its matrix exponential is wrong for small matrices

Wrong result. ``method="exp"`` runs a scaling-and-squaring algorithm with its own Frechet derivative. The values are
right. Near the zero matrix, where the gradient of exp(A) equals that of A, the gradient is 2/3 of the right one. For
larger matrices it is wrong by other amounts, and for some it is right. No report was found.
"""

import torch
from iunets.expm import expm

torch.manual_seed(0)
A = (1e-6 * torch.randn(3, 3, dtype=torch.float64)).requires_grad_()
G = torch.randn(3, 3, dtype=torch.float64)
(right,) = torch.autograd.grad((torch.matrix_exp(A) * G).sum(), A)
(got,) = torch.autograd.grad((expm.apply(A) * G).sum(), A)
print("values differ by", (torch.matrix_exp(A) - expm.apply(A)).abs().max().item())
print("gradient / wanted:", (got / right).flatten().tolist())
assert torch.allclose(got / right, torch.full_like(A, 2 / 3), atol=0.01)
