"""The affine coupling of RealNVP (Dinh et al., arXiv:1605.08803) and of Glow (Kingma, Dhariwal, arXiv:1807.03039)."""

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from memcnn.engine.couple import couple, merge, split
from memcnn.migration import absent_names
from memcnn.models.coupling import Coupling
from memcnn.models.keywords import keywords_taken, refuse_unknown, taken
from memcnn.models.log_det import sum_per_sample

__all__ = ["AffineAdapterExp", "AffineAdapterNaive", "AffineAdapterSigmoid", "AffineBlock", "AffineCoupling"]


class AffineCoupling(Coupling):
    """y1 = s1 * x1 + t1 with (s1, t1) = F(x2), y2 = s2 * x2 + t2 with (s2, t2) = G(y1), on the halves of x and y.

    Args:
        Fm: F, a module that returns a pair (scale, shift) for the other half. With ``adapter``, the adapter's argument.
        Gm: G, likewise; a deep copy of F if it is not given.
        adapter: called once with F and once with G; returns a module that returns (scale, shift). Pass one of the
            adapters below, ``functools.partial(AffineAdapterExp, bound=1.0)``, or a class of your own.
        implementation_fwd: accepted for compatibility; it has no effect.
        implementation_bwd: likewise.
        split_dim: the dimension along which x and y are halved.

    Raises:
        TypeError: ``Fm`` or ``Gm`` is not a module, or ``split_dim`` is not an integer.
    """

    def __init__(
        self,
        Fm: nn.Module,
        Gm: nn.Module | None = None,
        adapter: Callable[[nn.Module], nn.Module] | None = None,
        implementation_fwd: int | None = None,
        implementation_bwd: int | None = None,
        split_dim: int = 1,
    ):
        super().__init__(Fm, Gm, implementation_fwd, implementation_bwd, split_dim)
        if adapter is not None:
            self.Fm, self.Gm = adapter(self.Fm), adapter(self.Gm)

    def couple(self, x1: Tensor, x2: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        y1 = self._change(x1, self.Fm, x2, kwargs, scale, unscale)
        y2 = self._change(x2, self.Gm, y1, kwargs, scale, unscale)
        return y1, y2

    def uncouple(self, y1: Tensor, y2: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        x2 = self._change(y2, self.Gm, y1, kwargs, unscale, scale)
        x1 = self._change(y1, self.Fm, x2, kwargs, unscale, scale)
        return x1, x2

    def forward_log_det(self, x: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return y, and log|det dy/dx| = sum log|s1| + sum log|s2| of each sample, shape (N,)."""
        self._check_per_sample(x)
        refuse_unknown(self, kwargs)
        x1, x2 = split(x, self.split_dim)
        y1, log_s1 = self._change(x1, self.Fm, x2, kwargs, scale_log_det, unscale)
        y2, log_s2 = self._change(x2, self.Gm, y1, kwargs, scale_log_det, unscale)
        return merge(y1, y2, self.split_dim), log_s1 + log_s2

    def inverse_log_det(self, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return x, and log|det dx/dy| of each sample, shape (N,)."""
        self._check_per_sample(y)
        refuse_unknown(self, kwargs)
        y1, y2 = split(y, self.split_dim)
        x2, log_s2 = self._change(y2, self.Gm, y1, kwargs, unscale_log_det, scale)
        x1, log_s1 = self._change(y1, self.Fm, x2, kwargs, unscale_log_det, scale)
        return merge(x1, x2, self.split_dim), log_s1 + log_s2

    @staticmethod
    def _change(
        a: Tensor, branch: nn.Module, b: Tensor, kwargs: dict[str, object], forward: Callable, inverse: Callable
    ) -> Any:
        return couple(a, branch, b, forward=forward, inverse=inverse, kwargs=taken(branch, kwargs))


class AffineBlock(AffineCoupling):
    """Deprecated name of ``AffineCoupling``, for code that was written for MemCNN 1.5.

    Args:
        Fm: F, as for ``AffineCoupling``.
        Gm: G, likewise; a deep copy of F if it is not given.
        implementation_fwd: accepted for compatibility; it has no effect.
        implementation_bwd: likewise.
    """

    def __init__(
        self, Fm: nn.Module, Gm: nn.Module | None = None, implementation_fwd: int = 1, implementation_bwd: int = 1
    ):
        warnings.warn("AffineBlock is deprecated: use AffineCoupling", DeprecationWarning, stacklevel=2)
        super().__init__(Fm, Gm)


def scale(a: Tensor, h: tuple[Tensor, Tensor]) -> Tensor:
    """Return s * a + t, where (s, t) = h."""
    s, t = _scale_and_shift(h)
    return a * s + t


def unscale(a: Tensor, h: tuple[Tensor, Tensor]) -> Tensor:
    """Return (a - t) / s, where (s, t) = h."""
    s, t = _scale_and_shift(h)
    return (a - t) / s


def scale_log_det(a: Tensor, h: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return s * a + t, and the sum of log|s| over each sample, shape (N,)."""
    return scale(a, h), sum_per_sample(_log(h[0], a))


def unscale_log_det(a: Tensor, h: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return (a - t) / s, and the sum of -log|s| over each sample, shape (N,)."""
    return unscale(a, h), sum_per_sample(-_log(h[0], a))


def _log(s: Tensor, a: Tensor) -> Tensor:
    return s.to(a.dtype).abs().log().expand_as(a)


def _scale_and_shift(h: Any) -> tuple[Tensor, Tensor]:
    """Return the scale and the shift in the result of a branch; raise a TypeError if it is no pair."""
    if not isinstance(h, (tuple, list)) or len(h) != 2:  # a tensor could be unpacked too, along its batch
        got = type(h).__name__ if not isinstance(h, (tuple, list)) else f"{len(h)} values"
        raise TypeError(
            "F and G of an affine coupling must return a pair (scale, shift): "
            f"got {got}; give the coupling an adapter, such as adapter=AffineAdapterNaive"
        )
    return h[0], h[1]


class AffineAdapter(nn.Module):
    """Base class: a module that computes (scale, shift) from the one tensor that ``module`` returns."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.f = module

    def keywords_taken(self, names: Iterable[str]) -> set[str]:
        """Return those of the names that the module takes as keyword arguments."""
        return keywords_taken(self.f, names)


class AffineAdapterNaive(AffineAdapter):
    """s = exp(h), t = h, where h = f(x) has the shape of x. The scale overflows for large h."""

    def forward(self, x: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        t = self.f(x, **kwargs)
        return t.exp(), t


class AffineAdapterSigmoid(AffineAdapter):
    """s = sigmoid(h1 + 2), t = h0, where h0 and h1 are the even and odd entries of f(x)
    along the dimension that f doubles.

    The scale lies between 0 and 1. It is 0.88 where f returns 0, as in Glow.
    """

    def forward(self, x: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        t, h = by_turns(self.f(x, **kwargs), x)
        return torch.sigmoid(h + 2), t


class AffineAdapterExp(AffineAdapter):
    """log s = bound * tanh(h1 / bound), t = h0, with h0 and h1 as for ``AffineAdapterSigmoid``.

    The scale lies between exp(-bound) and exp(bound); it is 1 where f returns 0, and never overflows or reaches 0.
    RealNVP learns the bound; here it is fixed.
    """

    def __init__(self, module: nn.Module, *, bound: float = 2.0):
        super().__init__(module)
        if not bound > 0:
            raise ValueError(f"bound must be positive, the largest |log s|: got {bound}")
        self.bound = bound

    def forward(self, x: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        t, h = by_turns(self.f(x, **kwargs), x)
        return (self.bound * torch.tanh(h / self.bound)).exp(), t

    def extra_repr(self) -> str:
        return f"bound={self.bound}"


def by_turns(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the even and the odd entries of h along the one dimension where h is twice as large as x.

    Both results have the shape of x.
    """
    dims = [dim for dim, (got, size) in enumerate(zip(h.shape, x.shape, strict=False)) if got != size]
    if h.dim() != x.dim() or len(dims) != 1 or h.shape[dims[0]] != 2 * x.shape[dims[0]]:
        raise ValueError(
            "the adapted module must double one dimension of its input, for a scale and a shift: it gave "
            f"shape {tuple(h.shape)} for shape {tuple(x.shape)}; let it put out twice as many channels"
        )
    return h.unflatten(dims[0], (-1, 2)).unbind(dims[0] + 1)


__getattr__ = absent_names(__name__)
