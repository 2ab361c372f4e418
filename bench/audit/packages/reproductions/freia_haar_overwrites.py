"""FrEIA 0.2: HaarDownsampling's inverse and HaarUpsampling overwrite their input

Wrong result. ``x_perm *= self.fac_rev`` scales the caller's tensor in place, unless ``order_by_wavelet`` has made a
copy. Everything else that reads the tensor, such as a skip connection or a loss, sees the scaled values. A second
inversion of the same tensor gives another result. An input that is a leaf raises. No report was found.
"""

import torch
from FrEIA.modules import HaarDownsampling, HaarUpsampling

torch.manual_seed(0)
z = torch.randn(1, 4, 2, 2)
layer = HaarDownsampling([(1, 4, 4)])
before = z.clone()
(first,), _ = layer((z,), rev=True)
print("z is now", (z / before).unique().tolist(), "times what it was")
(second,), _ = layer((z,), rev=True)
print("a second inversion gives", (second / first).mean().item(), "times the first")
assert torch.equal(z, before / 4)
try:
    HaarUpsampling([(4, 2, 2)])((torch.randn(1, 4, 2, 2, requires_grad=True),))
except RuntimeError as error:
    print(error)
