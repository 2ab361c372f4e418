"""ODE blocks: solvers of y' = f(t, y) with fixed steps. Each step is invertible up to rounding.

* ``ReversibleHeun``: Kidger, Foster, Li, Lyons, "Efficient and Accurate Gradients for Neural SDEs", arXiv:2105.13493,
  algorithm 1 without noise. Beside y it carries y^, which starts as y:

      y^[n+1] = 2 y[n] - y^[n] + h f(t[n], y^[n])
      y[n+1]  = y[n] + h/2 f(t[n], y^[n]) + h/2 f(t[n+1], y^[n+1])

  With u = y[n] + h/2 f(t[n], y^[n]) this is u, then y^[n+1] = 2 u - y^[n], then y[n+1] = u + h/2 f(t[n+1], y^[n+1]):
  three couplings. The second evaluation of a step is the first of the next, so that N steps evaluate f N + 1 times.
* ``Leapfrog``: x' = v, v' = f(t, x), in steps of half a kick, drift, half a kick (Störmer-Verlet), as in reversible
  residual networks that discretise a wave equation (Chang et al., arXiv:1709.03698, section 4).

Gradients are those of the discrete solution, because backward rebuilds the same steps. Solving an adjoint equation
separately would add an error of its own.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from memcnn.engine.couple import couple
from memcnn.models.coupling import Coupling
from memcnn.models.streams import reversible_chain

__all__ = ["Leapfrog", "ReversibleHeun"]


class _Field(nn.Module):
    """``factor * f(t, y)`` at a fixed time, as a branch."""

    def __init__(self, f: nn.Module, t: float, factor: float):
        super().__init__()
        self.f, self.t, self.factor = f, t, factor

    def forward(self, y: Tensor) -> Tensor:
        return self.factor * self.f(y.new_tensor(self.t), y)


class _Kick(Coupling):
    """y1 = x1 + F(x2), y2 = x2 or, with a reflection, y2 = 2 y1 - x2; with a drift h, y2 = x2 + h y1.

    The halves are (y, y^) of Heun's method and (v, x) of the leapfrog.
    """

    def __init__(self, field: _Field, dim: int, *, reflect: bool = False, drift: float | None = None):
        super().__init__(field, nn.Identity(), split_dim=dim)
        self.reflect, self.drift = reflect, drift

    def couple(self, x1: Tensor, x2: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        y1 = couple(x1, self.Fm, x2, forward=torch.add, inverse=torch.sub)
        if self.reflect:
            return y1, couple(x2, self.Gm, y1, forward=_reflect, inverse=_reflect)
        if self.drift is not None:
            drift, back = _drifts(self.drift)
            return y1, couple(x2, self.Gm, y1, forward=drift, inverse=back)
        return y1, x2

    def uncouple(self, y1: Tensor, y2: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        x2 = y2
        if self.reflect:
            x2 = couple(y2, self.Gm, y1, forward=_reflect, inverse=_reflect)
        elif self.drift is not None:
            drift, back = _drifts(self.drift)
            x2 = couple(y2, self.Gm, y1, forward=back, inverse=drift)
        return couple(y1, self.Fm, x2, forward=torch.sub, inverse=torch.add), x2


def _drifts(h: float) -> tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]:
    """Return x + h v and its inverse in x, as functions of x and v."""
    return lambda x, v: x + h * v, lambda x, v: x - h * v


def _reflect(a: Tensor, b: Tensor) -> Tensor:
    """Return 2 b - a, which is its own inverse in a."""
    return 2 * b - a


class _Solver(nn.Module):
    """N steps as a chain of N + 1 kicks: the first and the last are half as large as those between."""

    def __init__(
        self,
        f: nn.Module,
        steps: int,
        interval: tuple[float, float] = (0.0, 1.0),
        *,
        dim: int = 1,
        disable: bool = False,
    ):
        super().__init__()
        if not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps must be a whole number of at least 1: got {steps!r}")
        start, end = interval
        self.h, self.dim = (end - start) / steps, dim
        kicks = []
        for n in range(steps + 1):
            field = _Field(f, start + n * self.h, self.h / 2 if n in (0, steps) else self.h)
            kicks.append(_Kick(field, dim, **(self._move() if n < steps else {})))
        self.blocks = reversible_chain(kicks, disable)

    def _move(self) -> dict[str, Any]:
        """Return the options of ``_Kick`` for the change of its second half between two kicks."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"steps={len(self.blocks) - 1}, h={self.h:.6g}"

    def _solved(self, first: Tensor, second: Tensor) -> tuple[Tensor, ...]:
        return self.blocks(torch.cat((first, second), self.dim)).chunk(2, self.dim)

    def _undone(self, first: Tensor, second: Tensor) -> tuple[Tensor, ...]:
        return self.blocks.inverse(torch.cat((first, second), self.dim)).chunk(2, self.dim)


class ReversibleHeun(_Solver):
    """Solve y' = f(t, y) by the reversible Heun method, of second order.

    The state dict lists the parameters of f ``steps + 1`` times; ``f.state_dict()`` lists them once.

    Args:
        f: called as ``f(t, y)`` with t a scalar tensor and y (N, ...); returns a tensor of the shape of y.
        steps: number of steps of equal size.
        interval: the first and the last time; the last may be the smaller one.
        dim: the dimension along which y and y^ are concatenated within the chain.
        disable: store every activation.

    Raises:
        ValueError: ``steps`` is not a whole number of at least 1.
    """

    def forward(self, y: Tensor) -> Tensor:
        """Return the solution at the last time for the value y, (N, ...), at the first."""
        return self.solve(y)[0]

    def solve(self, y: Tensor, y_hat: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return y and y^ at the last time for those at the first, all of one shape; None: y^ starts as y."""
        y, y_hat = self._solved(y, y if y_hat is None else y_hat)
        return y, y_hat

    def inverse(self, y: Tensor, y_hat: Tensor) -> tuple[Tensor, Tensor]:
        """Return y and y^ at the first time for those at the last, as ``solve`` returns them."""
        y, y_hat = self._undone(y, y_hat)
        return y, y_hat

    def _move(self) -> dict[str, Any]:
        return {"reflect": True}


class Leapfrog(_Solver):
    """Solve x' = v, v' = f(t, x) by the Störmer-Verlet method, which is of second order and preserves volume.

    The arguments are those of ``ReversibleHeun``; f is called as ``f(t, x)`` and returns the acceleration.
    """

    def forward(self, x: Tensor, v: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return position and velocity at the last time for those at the first, all of one shape; None: v is 0."""
        v, x = self._solved(torch.zeros_like(x) if v is None else v, x)
        return x, v

    def inverse(self, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return position and velocity at the first time for those at the last."""
        v, x = self._undone(v, x)
        return x, v

    def _move(self) -> dict[str, Any]:
        return {"drift": self.h}
