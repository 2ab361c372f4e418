"""nflows 0.14: HouseholderSequence gives NaN with more than two reflections a feature

fault. The vectors start as pairs of unit vectors; beyond 2 x features they are zero, and are normalised. With an odd
number the constructor raises instead. ``SVDLinear`` and ``QRLinear`` pass the number on.
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
