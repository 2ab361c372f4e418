"""normflows 1.7.3: Residual(reduce_memory=True), the default, applies the first weight to all samples in backward

Wrong result. ``MemoryEfficientLogDetEstimator.backward`` multiplies the gradients of all log-determinants by
``grad_logdetgrad[0]``. This is right if all samples have the same weight, as in a mean likelihood. With weights,
masks or a loss that is not a sum the gradient is wrong, without a warning. The code comes from residual-flows
(rtqichen). No report was found.
"""

import normflows as nf
import torch

torch.manual_seed(0)
net = nf.nets.LipschitzMLP([3, 16, 3], init_zeros=False, lipschitz_const=0.9)
flow = nf.flows.Residual(net, reverse=False, n_power_series=20, reduce_memory=False)
weights, gradients = torch.tensor([1.0, 2.0, 3.0]), {}
for in_forward in (False, True):
    flow.iresblock.grad_in_forward = in_forward  # what reduce_memory switches on, with the same estimator
    torch.manual_seed(1)
    x = torch.linspace(-1, 1, 9).view(3, 3).requires_grad_()
    (weights * flow(x)[1]).sum().backward()
    gradients[in_forward] = x.grad
ratio = gradients[False] / gradients[True]
print("plain gradient / memory-efficient gradient, by sample:", ratio.mean(1).tolist(), "wanted 1, 1, 1")
assert torch.allclose(ratio, weights[:, None].expand(3, 3), rtol=1e-3)
