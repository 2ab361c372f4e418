"""The check that weights are finite, and the error for a loss or a weight that is not."""

import torch
from torch import nn


class NotFinite(Exception):
    """A loss or a weight is not finite; the message names it."""


def check_weights(model: nn.Module, iteration: int) -> None:
    """Raise NotFinite if a weight or a buffer of the model is not finite, with one transfer from the device."""
    values = {name: value for name, value in model.state_dict().items() if value.is_floating_point()}
    finite = torch.stack([value.isfinite().all() for value in values.values()]).tolist()
    for name, good in zip(values, finite, strict=True):
        if not good:
            raise NotFinite(f"{name} is not finite after iteration {iteration}")
