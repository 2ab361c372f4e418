"""nflows 0.14: NaiveLinear has no inverse on current PyTorch

Crash. It calls ``torch.solve``, which PyTorch has removed. The fork in glasflow has replaced the call
(https://github.com/uofgravity/glasflow/issues/56).
"""

import torch
from nflows.transforms import NaiveLinear

linear = NaiveLinear(3)
y, _ = linear(torch.randn(2, 3))
try:
    linear.inverse(y)
except RuntimeError as error:
    print(str(error)[:130])
else:
    raise AssertionError
