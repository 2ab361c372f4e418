"""Adapters from a package's calling convention to ``forward`` and ``inverse``, and the layers they are put around."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Pair = tuple[Tensor, Tensor]  # values (N, ...) and log-determinants (N,)


@dataclass(frozen=True)
class Layer:
    """A layer of somebody else's package, and the inputs on which it is tested.

    name: as a user of the package writes it.
    make: gives it behind an adapter; drawn parameters come from torch's and numpy's global generators.
    shape: of the input, (N, ...).
    draw: the inputs from standard normal numbers of that shape, for layers defined on a part of the line.
    perturb: add 0.2 times a normal number to every parameter, since many start as the identity.
    known: what the package itself says does not hold, by law: such a failure is a declared limitation.
    """

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...] = (4, 6)
    draw: Callable[[Tensor], Tensor] = lambda x: x
    perturb: bool = True
    known: dict[str, str] | None = None


class Flow(nn.Module):
    """A layer that gives its values together with the log-determinant, in both directions."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward_log_det(self, x: Tensor) -> Pair:
        return self.pair(self.layer(x), x)

    def inverse_log_det(self, y: Tensor) -> Pair:
        return self.pair(self.layer.inverse(y), y)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_log_det(x)[0]

    def inverse(self, y: Tensor) -> Tensor:
        return self.inverse_log_det(y)[0]

    @staticmethod
    def pair(returned: tuple, x: Tensor) -> Pair:
        """Expand a log-determinant that is one number for all samples to one value a sample."""
        values, log_det = returned
        log_det = torch.as_tensor(log_det, device=x.device)
        return values, log_det.expand(len(x)) if log_det.dim() == 0 or log_det.shape == (1,) else log_det


def dense(inputs: int, outputs: int, hidden: int = 16) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, outputs))


def convolutional(inputs: int, outputs: int, hidden: int = 8) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, hidden, 3, padding=1), nn.Tanh(), nn.Conv2d(hidden, outputs, 3, padding=1))


def unit(x: Tensor) -> Tensor:
    """Return values within (0, 1)."""
    return 0.02 + 0.96 * torch.sigmoid(x)


def bounded(x: Tensor) -> Tensor:
    """Return values within (-1, 1)."""
    return 0.95 * torch.tanh(x)
