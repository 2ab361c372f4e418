"""FrEIA 0.2: IResNetLayer's log-determinant has no gradient, and the inverse computes it at the wrong point

Wrong result. Without ``create_graph`` the estimate is a constant for autograd, so maximum likelihood trains the layer
as if it preserved volume. The inverse takes the Jacobian of the residual at its input y; it should take it at its
result x. The layer also sets requires_grad on the caller's tensor. No report was found.
"""

import torch
from FrEIA.modules import IResNetLayer

torch.manual_seed(0)
layer = IResNetLayer([(2,)], jacobian_iterations=60)
with torch.no_grad():  # a residual with a diagonal Jacobian, for which the random estimate is exact
    for linear in layer.layers:
        linear.weight.copy_(0.8 * torch.eye(*linear.weight.shape))
        linear.bias.zero_()
    layer.layers[-1].bias.fill_(3.0)
x = torch.tensor([[-3.0, -3.0]])
(y,), forward = layer((x,))
(back,), backward = layer((y.detach(),), rev=True)
jacobian = torch.autograd.functional.jacobian(lambda v: layer((v,), jac=False)[0][0][0], x)[:, 0]
print("forward ", forward.item(), " inverse ", backward.item(), " wanted +-", torch.linalg.slogdet(jacobian)[1].item())
print("x", x[0].tolist(), "y", y[0].tolist(), "inverse(y)", back[0].tolist())
print("forward has a gradient:", forward.requires_grad, "; the caller's x requires one:", x.requires_grad)
assert (forward + backward).abs() > 0.1 and not forward.requires_grad and x.requires_grad
