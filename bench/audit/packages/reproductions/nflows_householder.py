"""nflows 0.14: HouseholderSequence returns NaN with more than two reflections for each feature

Wrong result. The vectors start as pairs of unit vectors. Vectors beyond 2 x features start as zero, and are then
normalised. An odd number makes the constructor raise instead. ``SVDLinear`` and ``QRLinear`` pass the number on.
"""

import torch
from nflows.transforms import HouseholderSequence, SVDLinear

print("6 reflections of 2 features:", HouseholderSequence(2, 6)(torch.randn(1, 2))[0].tolist())
y, _ = SVDLinear(2, num_householder=6)(torch.randn(1, 2))
assert y.isnan().all()
try:
    HouseholderSequence(2, 5)
except IndexError as error:
    print(error)
