"""Adapters that show the checks another side of a block: its inverse, its conditions, or its log-determinant."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


def method_of(module: nn.Module, name: str) -> Callable[..., Any]:
    """Return a method that the type ``nn.Module`` does not declare, such as ``inverse``.

    Raises:
        TypeError: the attribute is no method.
    """
    method = getattr(module, name)
    if not callable(method):
        raise TypeError(f"{type(module).__name__}.{name} must be a method: got {type(method).__name__}")
    return method


def inverse_of(module: nn.Module) -> Callable[..., Any]:
    """Return the method ``inverse`` of ``module``."""
    return method_of(module, "inverse")


class Inverted(nn.Module):
    """Swaps the directions of ``module``: ``forward`` is its inverse, and ``inverse`` its forward."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *outputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        return inverse_of(self.module)(*outputs)

    def inverse(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.module(*inputs)


class Conditioned(nn.Module):
    """(x, c) -> (y, c) and back, for a module whose ``forward(x, c)`` gives y and ``inverse(y, c)`` gives x.

    Args:
        module: has these two methods, for any number of values and conditions.
        conditions: the number of conditions, which are the last arguments.
    """

    def __init__(self, module: nn.Module, conditions: int):
        super().__init__()
        self.module, self.conditions = module, conditions

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self._with_conditions(self.module, inputs)

    def inverse(self, *outputs: Tensor) -> tuple[Tensor, ...]:
        return self._with_conditions(inverse_of(self.module), outputs)

    def _with_conditions(self, function: Callable, values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        results = function(*values)
        results = results if isinstance(results, (tuple, list)) else (results,)
        return (*results, *(condition.clone() for condition in values[-self.conditions :]))


class WithLogDet(nn.Module):
    """(x, total) -> (y, total + log|det|): a flow whose log-determinant takes part in the loss.

    Args:
        flow: has ``forward_log_det`` and ``inverse_log_det``, which return values and (N,) log-determinants.
    """

    def __init__(self, flow: nn.Module):
        super().__init__()
        self.flow = flow

    def forward(self, x: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        y, log_det = method_of(self.flow, "forward_log_det")(x)
        return y, total.to(log_det) + log_det

    def inverse(self, y: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        x, log_det = method_of(self.flow, "inverse_log_det")(y)
        return x, total.to(log_det) + log_det
