"""The additive coupling of NICE (Dinh et al., arXiv:1410.8516) and of RevNets (Gomez et al., arXiv:1707.04585)."""

import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from memcnn.engine.couple import couple
from memcnn.engine.direct import run_directly
from memcnn.engine.exact import Grid
from memcnn.engine.sums import AdditiveStep, minus, plus
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
        implementation_fwd: accepted for compatibility; it has no effect.
        implementation_bwd: likewise.
        split_dim: the dimension along which x and y are halved.
        exact: round x, F(x2) and G(y1) to a grid, which makes the inversion exact: True, or the grid's step, a power of
            two (True means 2^-10). See ``memcnn.engine.exact``.

    Raises:
        TypeError: ``Fm`` or ``Gm`` is not a module, or ``split_dim`` is not an integer.
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
        return self._apply_steps([x1, x2], kwargs, subtract=False)

    def uncouple(self, y1: Tensor, y2: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self._apply_steps([y1, y2], kwargs, subtract=True)

    def sums(self, *, subtract: bool) -> Sequence[AdditiveStep]:
        """Return the steps of ``couple``, or with ``subtract`` of ``uncouple``, if they are sums and nothing else.

        In exact mode, and where a subclass defines its own ``couple``, return an empty tuple.
        """
        method, own = (self.uncouple, AdditiveCoupling.uncouple) if subtract else (self.couple, AdditiveCoupling.couple)
        plain = self.grid is None and getattr(method, "__func__", None) is own
        return self._steps(subtract) if plain else ()

    def _steps(self, subtract: bool) -> Sequence[AdditiveStep]:
        modules: Any = self._modules  # faster than self.Fm
        steps = AdditiveStep(modules["Fm"], 0), AdditiveStep(modules["Gm"], 1)
        return steps[::-1] if subtract else steps

    def _apply_steps(self, halves: list[Tensor], kwargs: dict[str, object], *, subtract: bool) -> tuple[Tensor, Tensor]:
        """Return the halves after the steps of ``couple``, or with ``subtract`` of ``uncouple``."""
        steps = self._steps(subtract)
        if self.grid is None and not kwargs and run_directly(steps, halves, subtract=subtract):
            return halves[0], halves[1]
        sums = (self.grid.add, self.grid.sub) if self.grid is not None else (plus, minus)
        forward, inverse = reversed(sums) if subtract else sums
        for branch, changed in steps:
            halves[changed] = couple(
                halves[changed],
                branch,
                halves[1 - changed],
                forward=forward,
                inverse=inverse,
                verify=self.grid is not None,
                kwargs=taken(branch, kwargs) if kwargs else kwargs,
            )
        return halves[0], halves[1]

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


__getattr__ = absent_names(__name__)
