"""The base class of the additive and the affine coupling."""

import copy
import warnings
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from memcnn import migration
from memcnn.engine.couple import merge, split
from memcnn.engine.exact import Grid
from memcnn.models.keywords import keywords_taken, refuse_unknown


class Coupling(nn.Module):
    """An invertible module of F (``Fm``) and G (``Gm``) on the halves of its input along ``split_dim``.

    A subclass defines ``couple``, which changes the halves, and ``uncouple``, which undoes that. Both are written with
    ``memcnn.engine.couple.couple``.

    Args:
        Fm: F.
        Gm: G; a deep copy of F if it is not given.
        implementation_fwd: accepted for compatibility; it has no effect.
        implementation_bwd: likewise.
        split_dim: the dimension along which the input is halved.

    Raises:
        TypeError: ``Fm`` or ``Gm`` is not a module, or ``split_dim`` is not an integer.
        NotImplementedError: ``implementation_fwd`` or ``implementation_bwd`` is none of MemCNN 1.5's numbers.
    """

    grid: Grid | None = None
    """The grid that both halves are rounded to in exact mode (``memcnn.engine.exact``); None otherwise."""

    def __init__(
        self,
        Fm: nn.Module,
        Gm: nn.Module | None = None,
        implementation_fwd: int | None = None,
        implementation_bwd: int | None = None,
        split_dim: int = 1,
    ):
        super().__init__()
        for name, module in (("Fm", Fm), ("Gm", Gm)):
            if not isinstance(module, nn.Module) and (name == "Fm" or module is not None):
                raise TypeError(f"{name} must be an nn.Module: got {type(module).__name__}; make a module of it")
        if not isinstance(split_dim, int):
            raise TypeError(f"split_dim must be an integer, the dimension to halve: got {split_dim!r}")
        if unknown := {implementation_fwd, implementation_bwd} - {None, -1, 0, 1}:
            raise NotImplementedError(
                f"unknown implementation {unknown.pop()!r}: leave implementation_fwd and "
                "implementation_bwd out, there is one implementation"
            )
        if {implementation_fwd, implementation_bwd} - {None, -1}:
            warnings.warn(
                "implementation_fwd and implementation_bwd are deprecated and have no effect: there is one "
                "implementation",
                DeprecationWarning,
                stacklevel=3,
            )
        self.Fm = Fm
        self.Gm = copy.deepcopy(Fm) if Gm is None else Gm
        self.split_dim = split_dim

    def __setstate__(self, state: dict) -> None:
        """Restore a pickle, which MemCNN 1.5 may have written: it kept ``implementation_fwd`` and ``_bwd`` as well."""
        super().__setstate__(migration.coupling_state(state))

    def couple(self, x1: Tensor, x2: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return y1 and y2, the halves of y."""
        raise NotImplementedError(f"{type(self).__name__} must define couple(x1, x2)")

    def uncouple(self, y1: Tensor, y2: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return x1 and x2, the halves of x."""
        raise NotImplementedError(f"{type(self).__name__} must define uncouple(y1, y2)")

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        """Return y, of the shape of x, whose size along ``split_dim`` must be even.

        Each keyword argument is handed to F, to G, or to both: to those whose ``forward`` takes it.
        """
        if kwargs:
            refuse_unknown(self, kwargs)
        halves = self.couple(*split(x, self.split_dim, self.grid), **kwargs)
        return merge(*halves, self.split_dim, self.grid)

    def inverse(self, y: Tensor, **kwargs: Any) -> Tensor:
        """Return x, of the shape of y. Keyword arguments as for ``forward``."""
        if kwargs:
            refuse_unknown(self, kwargs)
        halves = self.uncouple(*split(y, self.split_dim, self.grid), **kwargs)
        return merge(*halves, self.split_dim, self.grid)

    def keywords_taken(self, names: Iterable[str]) -> set[str]:
        """Return those of the names that F or G takes as keyword arguments."""
        return keywords_taken(self.Fm, names) | keywords_taken(self.Gm, names)

    def extra_repr(self) -> str:
        return f"split_dim={self.split_dim}"

    def _check_per_sample(self, x: Tensor) -> None:
        """Raise a ValueError if the coupling splits the batch."""
        if self.split_dim in (0, -x.dim()):
            raise ValueError(
                f"a coupling that splits the batch, split_dim={self.split_dim} of an input of shape "
                f"{tuple(x.shape)}, has no log-determinant for each sample: choose another split_dim"
            )
