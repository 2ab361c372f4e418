"""FrEIA 0.2: LearnedElementwiseScaling reports the forward log-determinant for its inverse, and ignores init_scale

Wrong result. The inverse divides by exp(s), so its log-determinant is -sum(s). It returns +sum(s), against the
contract of ``InvertibleModule``. And s starts at log(init_scale) times zeros, which is 0. The pull request "Fixed bug
in LearnedElementwiseScaling" is merged (https://github.com/vislearn/FrEIA/pull/118), but release 0.2 has both errors.
"""

import torch
from FrEIA.modules import LearnedElementwiseScaling

layer = LearnedElementwiseScaling([(3,)], init_scale=2.0)
(y,), _ = layer((torch.ones(1, 3),))
print("init_scale=2 scales by", y[0].tolist())
layer.s.data.fill_(0.5)
_, forward = layer((torch.ones(1, 3),))
_, backward = layer((torch.ones(1, 3),), rev=True)
print("log-determinants:", forward.item(), "forward,", backward.item(), "inverse; wanted 1.5 and -1.5")
assert backward.item() == 1.5 and y.tolist() == [[1.0, 1.0, 1.0]]
