"""The additive coupling of NICE (Dinh et al., arXiv:1410.8516) and of RevNets (Gomez et al., arXiv:1707.04585)."""

import operator

from torch import Tensor, nn

from memcnn.models.coupling import Coupling
from memcnn.models.log_det import constant_log_det
from memcnn.models.tape import lift, merge, split

__all__ = ["AdditiveCoupling"]


class AdditiveCoupling(Coupling):
    """y1 = x1 + F(x2), y2 = x2 + G(y1), where x1, x2 and y1, y2 are the halves of x and y along ``split_dim``.

    Args:
        Fm: F, a module that keeps the shape of a half.
        Gm: G, likewise; a deep copy of F if it is not given.
        split_dim: the dimension along which x and y are halved.
    """

    def forward(self, x: Tensor) -> Tensor:
        """y of the shape of x, whose size along ``split_dim`` must be even."""
        x1, x2 = split(x, self.split_dim)
        y1 = add(x1, self.Fm, x2)
        y2 = add(x2, self.Gm, y1)
        return merge(y1, y2, self.split_dim)

    def inverse(self, y: Tensor) -> Tensor:
        """x of the shape of y."""
        y1, y2 = split(y, self.split_dim)
        x2 = subtract(y2, self.Gm, y1)
        x1 = subtract(y1, self.Fm, x2)
        return merge(x1, x2, self.split_dim)

    def forward_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y, and log|det dy/dx| of each sample, (N,): 0, since F and G only shift."""
        self._check_per_sample(x)
        return self(x), constant_log_det(x)

    def inverse_log_det(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """x, and log|det dx/dy| of each sample, (N,): 0."""
        self._check_per_sample(y)
        return self.inverse(y), constant_log_det(y)


def add(a: Tensor, branch: nn.Module, b: Tensor) -> Tensor:
    """a + branch(b)."""
    return lift(a, branch, b, operator.add, operator.sub)


def subtract(a: Tensor, branch: nn.Module, b: Tensor) -> Tensor:
    """a - branch(b)."""
    return lift(a, branch, b, operator.sub, operator.add)
