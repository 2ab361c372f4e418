"""Jacobians by backpropagation, many rows at once."""

import warnings

import torch
from torch import Tensor

LARGEST_SAMPLE = 1024
"""Entries of a sample, or of a batch whose samples mix, beyond which no Jacobian is computed."""
ROWS_AT_ONCE = 128
"""Number of rows of a Jacobian that one backward pass computes."""


def gradients_of_each(entries: Tensor, x: Tensor, *, batched: bool) -> Tensor:
    """Return the gradient with respect to x of each entry of a vector, shape (number of entries, *x.shape).

    Args:
        entries: the vector.
        x: what it was computed from.
        batched: compute ``ROWS_AT_ONCE`` gradients in one backward pass, where all operators allow that. Pass False
            for a graph with custom backward functions, which may count their calls.
    """
    if batched:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about operators that are computed one by one
                return torch.cat(
                    [
                        torch.autograd.grad(entries, x, basis, retain_graph=True, is_grads_batched=True)[0]
                        for basis in torch.eye(len(entries), dtype=x.dtype, device=x.device).split(ROWS_AT_ONCE)
                    ]
                )
        except RuntimeError:
            pass  # an operator cannot be computed for several gradients at once
    return torch.stack([torch.autograd.grad(entry, x, retain_graph=True)[0] for entry in entries.unbind()])
