"""Log-determinants, for training by maximum likelihood: log p(x) = log p(y) + log|det dy/dx|, y = f(x).

An invertible module may define two methods beside ``forward`` and ``inverse``:

    forward_log_det(x) -> (y, log_det)      y = forward(x), log_det = log|det dy/dx|
    inverse_log_det(y) -> (x, log_det)      x = inverse(y), log_det = log|det dx/dy|

``log_det`` has shape (N,), one value for each sample: the log-determinant of the Jacobian of the sample's entries in y
with respect to its entries in x, over all dimensions but the first. If a branch mixes samples, as batch normalisation
does, no Jacobian of a single sample exists; the sum of ``log_det`` over the batch is still the log-determinant of the
whole batch. Values are float32, or float64 for float64 inputs.
"""

import torch
from torch import Tensor

__all__ = ["constant_log_det", "sum_per_sample"]


def sum_per_sample(values: Tensor) -> Tensor:
    """Return the sum over all dimensions but the first: (N, ...) becomes (N,), in float32 or wider."""
    return values.flatten(1).sum(1, dtype=torch.promote_types(values.dtype, torch.float32))


def constant_log_det(x: Tensor, value: Tensor | float = 0.0) -> Tensor:
    """Return ``value`` for each sample of x, shape (N,), in float32 or wider. 0 means volume-preserving."""
    return x.new_full((len(x),), 1.0, dtype=torch.promote_types(x.dtype, torch.float32)) * value
