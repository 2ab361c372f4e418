"""Exact mode: inversion without rounding, so that gradients are bit for bit those of stored activations.

The multiples of 2^-10 are a grid. float32 has 24 bits, so it represents each multiple up to 2^14 exactly, and sums in
this range have no rounding error. A coupling whose input, F(x2) and G(y1) are rounded to such a grid therefore inverts
exactly at any depth. Autograd treats the rounding as the identity.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memcnn.engine.capture import refuse_capture
from memcnn.engine.torch_private import has_values

DEFAULT_STEP = 2.0**-10


@dataclass(frozen=True)
class Grid:
    """Multiples of ``step``, a power of two, in a stream of float32 or float64."""

    step: float = DEFAULT_STEP

    def __post_init__(self) -> None:
        if not isinstance(self.step, float) or math.frexp(self.step)[0] != 0.5:
            raise ValueError(
                "the step of an exact coupling must be a float that is a power of two, such as 2.0**-10: "
                f"got {self.step!r}"
            )

    @classmethod
    def of(cls, exact: "bool | float | Grid") -> "Grid | None":
        """Return the grid that the argument ``exact`` of a coupling asks for.

        Return None for False, the default grid for True, else the grid of the given step, or the given grid.
        """
        if isinstance(exact, (bool, Grid)):
            return cls() if exact is True else exact or None
        return cls(exact)

    def limit(self, dtype: torch.dtype) -> float:
        """Return the largest N such that ``dtype`` represents every multiple of ``step`` between -N and N."""
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"an exact coupling needs a float32 or float64 input: got {dtype}; its branches may run "
                "in a lower precision, under torch.autocast for one"
            )
        return 2 * self.step / torch.finfo(dtype).eps

    def snap(self, x: Tensor) -> Tensor:
        """Return x rounded to the grid; its derivative is that of the identity.

        Raises:
            OverflowError: a value lies beyond ``limit``.
        """
        return self.checked(_Snap.apply(x, self.step))

    def add(self, a: Tensor, h: Tensor) -> Tensor:
        """Return a + h, where a is on the grid and h is rounded to it."""
        return self.checked(a + _Snap.apply(h.to(a.dtype), self.step))

    def sub(self, a: Tensor, h: Tensor) -> Tensor:
        """Return a - h, where a is on the grid and h is rounded to it."""
        return self.checked(a - _Snap.apply(h.to(a.dtype), self.step))

    def checked(self, x: Tensor) -> Tensor:
        """Return x. Raise an OverflowError if a value lies beyond ``limit``, where sums are no longer exact."""
        limit = self.limit(x.dtype)
        refuse_capture(x.device, "an exact coupling looks at its largest value", "use exact=False")
        size = x.detach().abs().amax() if x.numel() else x.new_zeros(())
        largest = size.item() if has_values(size) else 0.0
        if not largest <= limit:
            raise OverflowError(
                f"a value of {largest:.3g} in an exact coupling leaves the grid of {x.dtype} with step "
                f"{self.step:.3g}, which ends at {limit:.3g}: use a larger step, float64, or "
                "exact=False"
            )
        return x


class _Snap(torch.autograd.Function):
    """Rounds to the nearest multiple of ``step``. ``+ 0.0`` turns a negative zero into a positive one, as sums do."""

    @staticmethod
    def forward(x: Tensor, step: float) -> Tensor:
        return torch.round(x / step) * step + 0.0

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
