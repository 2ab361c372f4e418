"""Log-determinants, for training by maximum likelihood: log p(x) = log p(y) + log|det dy/dx|, y = f(x).

An invertible module may have, beside ``forward`` and ``inverse``,

    forward_log_det(x) -> (y, log_det)      y = forward(x), log_det = log|det dy/dx|
    inverse_log_det(y) -> (x, log_det)      x = inverse(y), log_det = log|det dx/dy|

with log_det of shape (N,), a value for each sample: the Jacobian is that of the sample's entries in y with respect to
its entries in x, over all dimensions but the first. Where a branch mixes samples, as batch normalisation does, there is
no Jacobian of one sample; the sum of log_det over the batch is still the log-determinant of the batch's. Values are at
least float32, whatever the dtype of x.
"""

import torch
from torch import Tensor

__all__ = ["constant_log_det", "sum_per_sample"]


def sum_per_sample(values: Tensor) -> Tensor:
    """(N, ...) summed to (N,)."""
    return values.flatten(1).sum(1, dtype=torch.promote_types(values.dtype, torch.float32))


def constant_log_det(x: Tensor, value: Tensor | float = 0.0) -> Tensor:
    """(N,) of ``value`` for the N samples of x; 0 is that of a map that preserves volume."""
    return x.new_full((len(x),), 1.0, dtype=torch.promote_types(x.dtype, torch.float32)) * value
