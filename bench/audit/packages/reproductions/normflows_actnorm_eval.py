"""normflows 1.7.3: ActNorm initialises itself in eval mode, and moves its flag off the module's device

fault. The first batch sets scale and shift whatever the mode, under ``no_grad``, too: a model built, put in eval mode
and asked once is changed by the question. The flag is replaced by a new tensor on the CPU instead of being set. It is
registered as a buffer, so that ``load_state_dict`` restores it.
"""

import normflows as nf
import torch

torch.manual_seed(0)
flow = nf.flows.ActNorm(3).eval()
before, flag = flow.s.clone(), flow.data_dep_init_done
with torch.no_grad():
    flow(5 * torch.randn(8, 3))
print("s before", before.flatten().tolist(), "after", flow.s.flatten().tolist())
print("the flag is still the same tensor:", flow.data_dep_init_done is flag)
assert not torch.equal(before, flow.s) and flow.data_dep_init_done is not flag
