"""The additive coupling of NICE (Dinh et al., arXiv:1410.8516) and of RevNets (Gomez et al., arXiv:1707.04585)."""

import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from memcnn.engine.couple import couple
from memcnn.engine.exact import Grid
from memcnn.migration import absent_names
from memcnn.models.coupling import Coupling
from memcnn.models.keywords import taken
from memcnn.models.log_det import constant_log_det

__all__ = ["AdditiveBlock", "AdditiveCoupling"]


class AdditiveCoupling(Coupling):
    """y1 = x1 + F(x2), y2 = x2 + G(y1), where x1, x2 and y1, y2 are the halves of x and y along ``split_dim``.

    Args:
        Fm: F, a module that keeps the shape of a half.
        Gm: G, likewise; a deep copy of F if it is not given.
        split_dim: the dimension along which x and y are halved.
        exact: round x, F(x2) and G(y1) to a grid, which makes the inversion exact: True, or the grid's step, a power of
            two (True means 2^-10). See ``memcnn.engine.exact``.
    """

    def __init__(
        self,
        Fm: nn.Module,
        Gm: nn.Module | None = None,
        implementation_fwd: int | None = None,
        implementation_bwd: int | None = None,
        split_dim: int = 1,
        *,
        exact: bool | float | Grid = False,
    ):
        super().__init__(Fm, Gm, implementation_fwd, implementation_bwd, split_dim)
        self.grid = Grid.of(exact)

    def couple(self, x1: Tensor, x2: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        y1 = self._add(x1, self.Fm, x2, kwargs)
        y2 = self._add(x2, self.Gm, y1, kwargs)
        return y1, y2

    def uncouple(self, y1: Tensor, y2: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        x2 = self._subtract(y2, self.Gm, y1, kwargs)
        x1 = self._subtract(y1, self.Fm, x2, kwargs)
        return x1, x2

    def _add(self, a: Tensor, branch: nn.Module, b: Tensor, kwargs: dict[str, object]) -> Tensor:
        """Return ``a + branch(b, **kwargs)``."""
        plus, minus = self._sums()
        return couple(
            a,
            branch,
            b,
            forward=plus,
            inverse=minus,
            verify=self.grid is not None,
            kwargs=taken(branch, kwargs) if kwargs else kwargs,
        )

    def _subtract(self, a: Tensor, branch: nn.Module, b: Tensor, kwargs: dict[str, object]) -> Tensor:
        """Return ``a - branch(b, **kwargs)``."""
        plus, minus = self._sums()
        return couple(
            a,
            branch,
            b,
            forward=minus,
            inverse=plus,
            verify=self.grid is not None,
            kwargs=taken(branch, kwargs) if kwargs else kwargs,
        )

    def _sums(self) -> tuple[Callable, Callable]:
        return (self.grid.add, self.grid.sub) if self.grid is not None else (_plus, _minus)

    def forward_log_det(self, x: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return y, and log|det dy/dx| of each sample, shape (N,): 0, since F and G only shift."""
        self._check_per_sample(x)
        return self(x, **kwargs), constant_log_det(x)

    def inverse_log_det(self, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return x, and log|det dx/dy| of each sample, shape (N,): 0."""
        self._check_per_sample(y)
        return self.inverse(y, **kwargs), constant_log_det(y)


class AdditiveBlock(AdditiveCoupling):
    """Deprecated name of ``AdditiveCoupling``, for code that was written for MemCNN 1.5.

    Args:
        Fm: F, as for ``AdditiveCoupling``.
        Gm: G, likewise; a deep copy of F if it is not given.
        implementation_fwd: accepted for compatibility; it has no effect.
        implementation_bwd: likewise.
    """

    def __init__(
        self, Fm: nn.Module, Gm: nn.Module | None = None, implementation_fwd: int = 1, implementation_bwd: int = 1
    ):
        warnings.warn("AdditiveBlock is deprecated: use AdditiveCoupling", DeprecationWarning, stacklevel=2)
        super().__init__(Fm, Gm)


def _plus(a: Tensor, h: Tensor) -> Tensor:
    return a + _fitting(h, a)


def _minus(a: Tensor, h: Tensor) -> Tensor:
    return a - _fitting(h, a)


def _fitting(h: Tensor, a: Tensor) -> Tensor:
    """Return h if it has the shape of a or can be broadcast to it, else raise a ValueError."""
    if isinstance(h, Tensor) and (
        h.shape == a.shape
        or (
            h.dim() <= a.dim()
            and all(size in (1, wanted) for size, wanted in zip(reversed(h.shape), reversed(a.shape), strict=False))
        )
    ):
        return h
    got = f"shape {tuple(h.shape)}" if isinstance(h, Tensor) else f"a {type(h).__name__}"
    raise ValueError(f"F and G of an additive coupling must keep the shape of a half, {tuple(a.shape)}: got {got}")


__getattr__ = absent_names(__name__)
