"""iunets 0.1: InvertibleUpsampling1D does not run, and neither does the initialisation "random"

Crash. InvertibleUpsampling1D converts its stride to a pair, so that its kernel has two dimensions. ``init="random"``,
and with it ``method="householder"``, converts a tensor to the dtype named 'dtype'.
"""

import warnings

import torch
from iunets.layers import InvertibleDownsampling2D, InvertibleUpsampling1D

warnings.simplefilter("ignore")
raised = 0
for attempt in (
    lambda: InvertibleUpsampling1D(4)(torch.randn(1, 4, 8)),
    lambda: InvertibleDownsampling2D(2, init="random"),
    lambda: InvertibleDownsampling2D(2, method="householder"),
):
    try:
        attempt()
    except RuntimeError as error:
        raised += 1
        print(str(error)[:60], "...", str(error)[-40:])
assert raised == 3
