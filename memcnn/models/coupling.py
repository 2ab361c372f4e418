"""What the additive and the affine coupling have in common."""

import copy
import warnings

from torch import Tensor, nn


class Coupling(nn.Module):
    """Holds F (``Fm``), G (``Gm``) and ``split_dim``; ``forward`` and ``inverse`` are written with split, lift, merge."""

    def __init__(self, Fm: nn.Module, Gm: nn.Module | None = None, implementation_fwd: int | None = None,
                 implementation_bwd: int | None = None, split_dim: int = 1):
        super().__init__()
        for name, module in (("Fm", Fm), ("Gm", Gm)):
            if not isinstance(module, nn.Module) and (name == "Fm" or module is not None):
                raise TypeError(f"{name} must be an nn.Module: got {type(module).__name__}; wrap a function in a module")
        if not isinstance(split_dim, int):
            raise TypeError(f"split_dim must be an integer, the dimension to halve: got {split_dim!r}")
        if implementation_fwd is not None or implementation_bwd is not None:
            warnings.warn("implementation_fwd and implementation_bwd are deprecated and have no effect: there is one "
                          "implementation", DeprecationWarning, stacklevel=3)
        self.Fm = Fm
        self.Gm = copy.deepcopy(Fm) if Gm is None else Gm
        self.split_dim = split_dim

    def extra_repr(self) -> str:
        return f"split_dim={self.split_dim}"

    def _check_per_sample(self, x: Tensor) -> None:
        if self.split_dim in (0, -x.dim()):
            raise ValueError(f"a coupling that splits the batch, split_dim={self.split_dim} of an input of shape "
                             f"{tuple(x.shape)}, has no log-determinant for each sample: choose another split_dim")
