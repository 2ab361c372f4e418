"""normflows 1.7.3: ActNorm initialises itself in eval mode, and moves its flag to the CPU

Wrong result. The first batch sets scale and shift in every mode, and also under ``no_grad``. If a new model is put
into eval mode, its first evaluation changes it. The layer replaces its flag by a new tensor on the CPU instead of
setting it. The flag is a buffer, so ``load_state_dict`` restores it.
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
