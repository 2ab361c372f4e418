"""nflows 0.14: SqueezeTransform(3) cannot undo itself

fault. Its inverse wants a channel count that 4 divides, whatever the factor: one channel squeezed by 3 has 9, and
raises.
"""

import torch
from nflows.transforms import SqueezeTransform

squeeze = SqueezeTransform(3)
y, _ = squeeze(torch.randn(1, 1, 6, 6))
print("squeezed to", tuple(y.shape))
try:
    squeeze.inverse(y)
except ValueError as error:
    print(error)
else:
    raise AssertionError
