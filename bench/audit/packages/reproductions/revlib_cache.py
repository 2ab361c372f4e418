"""RevLib 1.7.2: with memory_mode checkpoint or autograd_graph, two forward passes before a backward pass mix

Wrong result. The modules keep the values of one forward pass as attributes. Two micro-batches in one loss, a siamese
network or a second forward pass for logging give wrong gradients without a warning (or raise "Tensor not found"). The
default mode, autograd_function, is right.
"""

import copy

import revlib
import torch
from torch import nn

for mode in (revlib.MemoryModes.autograd_function, revlib.MemoryModes.checkpoint, revlib.MemoryModes.autograd_graph):
    torch.manual_seed(0)
    branches = [nn.Conv2d(1, 1, 3, padding=1) for _ in range(2)]
    net = revlib.ReversibleSequential(*branches, memory_mode=mode)
    batches, wanted = torch.randn(2, 1, 2, 4, 4), 0
    for x in batches:
        alone = copy.deepcopy(net)
        alone(x.clone().requires_grad_()).square().sum().backward()
        wanted = wanted + next(alone.parameters()).grad
    sum(net(x.clone().requires_grad_()).square().sum() for x in batches).backward()
    error = ((next(net.parameters()).grad - wanted).abs().max() / wanted.abs().max()).item()
    print(f"{mode.name}: relative error of a weight's gradient {error:.2g}")
    assert (error < 1e-5) == (mode is revlib.MemoryModes.autograd_function)
