"""normflows 1.7.3: circular spline flows map every linear feature outside the bound to zero

Wrong result. With a list of tails, ``unconstrained_rational_quadratic_spline`` starts from zeros and never copies the
values outside the interval. (With a single kind of tails it does.) So ``CircularCoupledRationalQuadraticSpline`` and
``CircularAutoregressiveRationalQuadraticSpline`` map all values beyond ``tail_bound`` to 0, with log-determinant 0.
The map is not invertible, and the density is wrong for ordinary Gaussian data beyond 3 standard deviations. No report
was found.
"""

import normflows as nf
import torch

torch.manual_seed(0)
z = torch.tensor([[0.5, 2.0], [0.5, 4.0], [0.5, 5.0]])
for name in ("CircularCoupledRationalQuadraticSpline", "CircularAutoregressiveRationalQuadraticSpline"):
    flow = getattr(nf.flows, name)(2, 1, 8, [0], tail_bound=3)  # feature 0 is an angle, feature 1 is not
    x, log_det = flow(z)
    back, _ = flow.inverse(x)
    print(name, "sends", z[:, 1].tolist(), "to", x[:, 1].tolist(), "and back to", back[:, 1].tolist())
    assert x[1:, 1].tolist() == [0.0, 0.0]
