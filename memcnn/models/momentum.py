"""Momentum residual network: a residual network whose state moves with a velocity, which makes it invertible.

Sander, Ablin, Blondel, Peyré, "Momentum Residual Neural Networks", arXiv:2102.07870, equation (3):

    v[n+1] = gamma v[n] + (1 - gamma) f(x[n]),    x[n+1] = x[n] + v[n+1]

The inverse divides by gamma, so that for gamma < 1 an error of rounding grows by 1 / gamma in every block. The paper
keeps the bits that the products drop in an integer of its own (section 3.2, after Maclaurin et al., arXiv:1502.03492).
Here they stay in the stream: it holds w[n] = v[n] / gamma**n, for which the step is two additive couplings,

    w[n+1] = w[n] + c f(x[n]),  c = (1 - gamma) / gamma**(n+1),    x[n+1] = x[n] + gamma**(n+1) w[n+1],

and in exact mode both streams lie on a grid. Their sums are exact, and so is the inverse. This costs range instead of
memory: w grows by 1 / gamma in every block, and an ``OverflowError`` is raised when float32 can no longer hold it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from memcnn.engine.exact import Grid
from memcnn.models.additive import AdditiveCoupling
from memcnn.models.resnet import basic_branch
from memcnn.models.streams import in_full_precision, reversible_chain

__all__ = ["MomentumNet", "MomentumResNet", "Scaled", "momentum_resnet"]


class Scaled(nn.Module):
    """``factor * f(x)``.

    Args:
        f: a module of one tensor.
        factor: a number.
    """

    def __init__(self, f: nn.Module, factor: float):
        super().__init__()
        self.f, self.factor = f, factor

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the shape of f(x)."""
        return self.factor * self.f(x)

    def extra_repr(self) -> str:
        return f"factor={self.factor:.6g}"


class MomentumNet(nn.Module):
    """Residual functions f[0], f[1], ... with a velocity that starts at 0.

    Args:
        *functions: modules that keep the shape of their input.
        gamma: the momentum, 0 < gamma < 1.
        exact: invert without rounding: True, or the grid's step, as for ``AdditiveCoupling``. With False,
            rounding errors grow by ``gamma**-depth``.
        dim: the dimension along which velocity and state are concatenated within the chain.
        disable: keep the weights, but store every activation.

    Raises:
        ValueError: ``gamma`` is outside of this range.
    """

    def __init__(
        self,
        *functions: nn.Module,
        gamma: float = 0.9,
        exact: bool | float | Grid = True,
        dim: int = 1,
        disable: bool = False,
    ):
        super().__init__()
        if not 0 < gamma < 1:
            raise ValueError(f"gamma must lie between 0 and 1, the share of the velocity that is kept: got {gamma}")
        self.gamma, self.dim = gamma, dim
        couplings = (
            AdditiveCoupling(
                Scaled(f, (1 - gamma) / gamma ** (n + 1)),
                Scaled(nn.Identity(), gamma ** (n + 1)),
                split_dim=dim,
                exact=exact,
            )
            for n, f in enumerate(functions)
        )
        self.blocks = reversible_chain(couplings, disable)

    def forward(self, x: Tensor) -> Tensor:
        """Return the last state, of the shape of x.

        Raises:
            OverflowError: exact mode, and a value no longer fits the dtype's range on the grid.
        """
        return self.with_velocity(x)[0]

    def with_velocity(self, x: Tensor, v: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the last state and velocity for the first state x and velocity v (None: 0), all of one shape."""
        x = in_full_precision(x)
        streams = torch.cat((torch.zeros_like(x) if v is None else in_full_precision(v), x), self.dim)
        w, x = self.blocks(streams).chunk(2, self.dim)
        return x, self.gamma ** len(self.blocks) * w

    def inverse(self, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return the first state and velocity for the last ones, as ``with_velocity`` returns them."""
        streams = torch.cat((in_full_precision(v) / self.gamma ** len(self.blocks), in_full_precision(x)), self.dim)
        v, x = self.blocks.inverse(streams).chunk(2, self.dim)
        return x, v


class MomentumResNet(nn.Module):
    """Stem, stages of a ``MomentumNet`` each, strided convolutions between them, BN, ReLU, average pool, linear.

    Args:
        branch: makes f for a number of channels.
        units: number of residual functions of each stage.
        width: channels of the first stage; they double from stage to stage.
        num_classes: number of logits.
        gamma: as for ``MomentumNet``.
        exact: as for ``MomentumNet``.
        disable: keep the weights, but store every activation.
    """

    def __init__(
        self,
        branch: Callable[[int], nn.Module],
        units: tuple[int, ...],
        width: int = 16,
        num_classes: int = 10,
        *,
        gamma: float = 0.9,
        exact: bool | float | Grid = True,
        disable: bool = False,
    ):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1)]
        for stage, count in enumerate(units):
            if stage > 0:
                layers.append(nn.Conv2d(width, 2 * width, 3, stride=2, padding=1))
                width *= 2
            functions = (branch(width) for _ in range(count))
            layers.append(MomentumNet(*functions, gamma=gamma, exact=exact, disable=disable))
        self.layers = nn.Sequential(*layers)
        self.head = nn.Sequential(
            nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (N, num_classes) of images x (N, 3, H, W)."""
        return self.head(self.layers(x))


def momentum_resnet(num_classes: int = 10, *, units: tuple[int, ...] = (5, 5, 5), **options: Any) -> MomentumResNet:
    """Return a momentum network with ResNet-32's branches, for images (N, 3, 32, 32). Options as for the class."""
    return MomentumResNet(lambda width: basic_branch(width, width), units, 16, num_classes, **options)
