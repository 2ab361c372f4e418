"""nflows 0.14: SqueezeTransform(3) cannot be inverted

Crash. Its inverse expects a number of channels that is divisible by 4, for every factor. One channel squeezed by 3
has 9 channels, and the inverse raises.
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
