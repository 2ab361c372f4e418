"""nflows 0.14: a cached linear transform keeps old weights in eval mode, and runs backward only once

Wrong result. With ``using_cache=True`` the transform keeps its weight until ``train()`` is called.
``load_state_dict`` in eval mode, for example from a checkpoint, changes the parameters but not the transform. The
cached weight also keeps its graph, so the second backward pass raises. In float64 the cached inverse of ``LULinear``
and ``QRLinear`` raises, because it solves with a float32 identity. nessai works around the first error
(https://github.com/mj-will/nessai/pull/167).
"""

import torch
from nflows.transforms import LULinear

torch.manual_seed(0)
x = torch.randn(2, 3)
loaded, other = LULinear(3, using_cache=True).eval(), LULinear(3, identity_init=False).eval()
with torch.no_grad():
    loaded(x)
    loaded.load_state_dict(other.state_dict())
    difference = (loaded(x)[0] - other(x)[0]).abs().max().item()
print("largest difference of two transforms with the same state:", difference)
cached = LULinear(3, using_cache=True).eval()
cached(x)[0].sum().backward()
try:
    cached(x)[0].sum().backward()
except RuntimeError as error:
    print(str(error)[:66])
else:
    raise AssertionError
try:
    LULinear(3, using_cache=True).double().eval().inverse(x.double())
except RuntimeError as error:
    print(str(error)[:48])
else:
    raise AssertionError
assert difference > 0.1
