"""Blocks as users write them by hand, without a coupling: affine maps, rotations, shuffles, fixed points."""

import torch
from torch import Tensor, nn

from properties.zoo.specimen import Specimen, dropping, halves, whole


class AffineByHand(nn.Module):
    """y2 = x2 exp(s(x1)) + t(x1), with dropout in s and t: under autocast the scale is a bfloat16."""

    def __init__(self):
        super().__init__()
        self.s, self.t = dropping(), dropping()

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = halves(x)
        s, t = self.s(x1).tanh(), self.t(x1)
        return whole(x1, x2 * s.exp() + t)

    def inverse(self, y: Tensor) -> Tensor:
        y1, y2 = halves(y)
        s, t = self.s(y1).tanh(), self.t(y1)
        return whole(y1, (y2 - t) * (-s).exp())


class TurnedAndScaled(nn.Module):
    """y = exp(g) Q x. Autocast makes the product of the inverse, which is its last operation, bfloat16."""

    def __init__(self):
        super().__init__()
        self.w, self.gain = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.zeros(4))

    def rotation(self) -> Tensor:
        skew = self.w.triu(1) - self.w.triu(1).T
        eye = torch.eye(4, dtype=skew.dtype, device=skew.device)
        return torch.linalg.solve(eye + skew, eye - skew)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.rotation() * self.gain.exp()

    def inverse(self, y: Tensor) -> Tensor:
        return (y * (-self.gain).exp()) @ self.rotation().T


HEALTHY = [
    Specimen("affine map by hand, dropout", AffineByHand),
    Specimen("rotation with a gain, by hand", TurnedAndScaled),
]
