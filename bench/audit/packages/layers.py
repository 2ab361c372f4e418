"""The description of a layer to check, and the adapter that gives it ``forward`` and ``inverse``."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Pair = tuple[Tensor, Tensor]  # values (N, ...) and log-determinants (N,)


@dataclass(frozen=True)
class Layer:
    """A layer of a public package, and its test inputs.

    Attributes:
        name: the call that creates the layer, as a user of the package writes it.
        make: returns the layer in an adapter; random parameters come from torch's and numpy's global generators.
        shape: shape of the input, (N, ...).
        draw: maps standard normal numbers of that shape to the layer's domain.
        perturb: add 0.2 times a normal number to every parameter, because many layers start as the identity.
        known: law -> statement of the package that the law does not hold; such a failure is "declared".
    """

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...] = (4, 6)
    draw: Callable[[Tensor], Tensor] = lambda x: x
    perturb: bool = True
    known: dict[str, str] | None = None


class Flow(nn.Module):
    """An adapter for a layer that returns its values and the log-determinant, in both directions."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward_log_det(self, x: Tensor) -> Pair:
        """Return the values (N, ...) and the log-determinants (N,)."""
        return self.pair(self.layer(x), x)

    def inverse_log_det(self, y: Tensor) -> Pair:
        """Return the inverse's values (N, ...) and log-determinants (N,)."""
        return self.pair(self.layer.inverse(y), y)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_log_det(x)[0]

    def inverse(self, y: Tensor) -> Tensor:
        return self.inverse_log_det(y)[0]

    @staticmethod
    def pair(returned: tuple, x: Tensor) -> Pair:
        """Return values and log-determinants; expand a single log-determinant to one for each sample."""
        values, log_det = returned
        log_det = torch.as_tensor(log_det, device=x.device)
        return values, log_det.expand(len(x)) if log_det.dim() == 0 or log_det.shape == (1,) else log_det


def flow(name: str, make: Callable[[], nn.Module], shape: tuple[int, ...] = (4, 6), **options) -> Layer:
    """Return the description of a layer that ``Flow`` adapts; ``options`` are further fields of ``Layer``."""
    return Layer(name, lambda: Flow(make()), shape, **options)


def dense(inputs: int, outputs: int, hidden: int = 16) -> nn.Module:
    """Return a smooth network on vectors."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, outputs))


def convolutional(inputs: int, outputs: int, hidden: int = 8) -> nn.Module:
    """Return a smooth network on images."""
    return nn.Sequential(nn.Conv2d(inputs, hidden, 3, padding=1), nn.Tanh(), nn.Conv2d(hidden, outputs, 3, padding=1))


def unit(x: Tensor) -> Tensor:
    """Map numbers into (0, 1)."""
    return 0.02 + 0.96 * torch.sigmoid(x)


def bounded(x: Tensor) -> Tensor:
    """Map numbers into (-1, 1)."""
    return 0.95 * torch.tanh(x)
