"""FrEIA 0.2: documented arguments raise

Crash. ``ActNorm(init_data=tensor)`` evaluates the truth value of the tensor. ``Split`` stores the return value of
``list.append``, None, if ``section_sizes`` leaves a remainder. ``HouseholderPerm`` with a condition multiplies a
batch of matrices with ``mm``. ``GaussianMixtureModel`` fills a float32 matrix even if its inputs have another dtype.
"""

import warnings

import torch
from FrEIA.modules import ActNorm, GaussianMixtureModel, HouseholderPerm, Split

warnings.simplefilter("ignore")
x = torch.randn(4, 6)
mixture = [v.double() for v in (torch.full((4, 2), 0.5), torch.randn(4, 2, 6), torch.randn(4, 2, 21))]
attempts = {
    "ActNorm(init_data=x)": lambda: ActNorm([(6,)], init_data=x),
    "Split(section_sizes=[1, 2])": lambda: Split([(6,)], section_sizes=[1, 2])((x,)),
    "HouseholderPerm(dims_c)": lambda: HouseholderPerm([(6,)], [(6, 2)], n_reflections=2)((x,), [torch.randn(4, 6, 2)]),
    "GaussianMixtureModel in float64": lambda: GaussianMixtureModel([(6,)], [(2,), (2, 6), (2, 21)])(
        (x.double(),), [*mixture, torch.zeros(4, dtype=torch.long)]
    ),
}
raised = 0
for name, attempt in attempts.items():
    try:
        attempt()
    except Exception as error:
        raised += 1
        print(f"{name}: {type(error).__name__}: {str(error)[:90]}")
assert raised == len(attempts)
