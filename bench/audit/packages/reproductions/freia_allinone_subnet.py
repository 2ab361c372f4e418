"""FrEIA 0.2: AllInOneBlock scales its subnet's output in place, and with a learned permutation cannot be copied

Two errors. ``a *= 0.1`` writes into the tensor that the subnet returned. If the subnet ends in tanh or sigmoid, whose
backward pass needs its output, backward raises. With ``learned_householder_permutation`` the module keeps the matrix
of the last forward pass as a tensor with an autograd history. ``copy.deepcopy`` (for averaged weights, or in this
project's checks) then raises after a step.
"""

import copy

import torch
from FrEIA.modules import AllInOneBlock
from torch import nn

x = torch.randn(2, 4)
bounded = AllInOneBlock([(4,)], subnet_constructor=lambda i, o: nn.Sequential(nn.Linear(i, o), nn.Tanh()))
raised = 0
try:
    bounded((x,))[0][0].sum().backward()
except RuntimeError as error:
    raised += 1
    print(str(error)[:110])
turned = AllInOneBlock([(4,)], subnet_constructor=nn.Linear, learned_householder_permutation=2)
turned((x,))
try:
    copy.deepcopy(turned)
except RuntimeError as error:
    raised += 1
    print(str(error)[:110])
assert raised == 2
