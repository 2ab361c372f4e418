"""Faults of log-determinants, in layers that invert and train as they should."""

import math
from functools import partial

import torch
from torch import Tensor, nn

from memcnn import (
    ActNorm,
    AdditiveCoupling,
    AffineAdapterExp,
    AffineAdapterSigmoid,
    AffineCoupling,
    InvertibleConv1x1,
    ReversibleSequential,
)
from memcnn.engine.couple import couple, merge, split
from memcnn.models.affine import scale, scale_log_det, unscale
from memcnn.models.log_det import constant_log_det
from properties.zoo.healthy import set_actnorm
from properties.zoo.specimen import branch, fault

FORWARD, INVERSE = "forward_log_det", "inverse_log_det"


class SignReversed(AffineCoupling):
    def forward_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, log_det = super().forward_log_det(x)
        return y, -log_det


class SignNotReversed(AffineCoupling):
    """The inverse returns the log-determinant of forward, without reversing its sign."""

    def inverse_log_det(self, y: Tensor) -> tuple[Tensor, Tensor]:
        x, log_det = super().inverse_log_det(y)
        return x, -log_det


class HalfMissing(AffineCoupling):
    """Leaves out the scale of G."""

    def forward_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x1, x2 = split(x, self.split_dim)
        y1, log_s1 = couple(x1, self.Fm, x2, forward=scale_log_det, inverse=unscale)
        y2 = couple(x2, self.Gm, y1, forward=scale, inverse=unscale)
        return merge(y1, y2, self.split_dim), log_s1


class MeanOverTheBatch(AffineCoupling):
    def forward_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, log_det = super().forward_log_det(x)
        return y, log_det.mean().expand(len(x))


class SumOverTheBatch(AffineCoupling):
    def forward_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, log_det = super().forward_log_det(x)
        return y, log_det.sum()


class MeanOverEntries(AffineCoupling):
    """Returns the mean over entries instead of the sum."""

    def forward_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, log_det = super().forward_log_det(x)
        return y, log_det / x[0].numel()


class ToBaseTwo(AffineCoupling):
    def forward_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, log_det = super().forward_log_det(x)
        return y, log_det / math.log(2)


class InSinglePrecision(InvertibleConv1x1):
    """Computes the determinant of W in float32, whatever the dtype of W."""

    def forward_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_det = torch.linalg.slogdet(self.weight().float()).logabsdet.to(x.dtype)
        return self(x), constant_log_det(x, log_det * x[0, 0].numel())

    def __init__(self, channels: int):
        super().__init__(channels)
        with torch.no_grad():
            self.triangles += 0.1


class OnePosition(ActNorm):
    """The factor H W is missing."""

    def forward_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self(x), constant_log_det(x, self.log_scale.sum())


class VolumeKept(ActNorm):
    """Scales, but inherits the log-determinant 0 of a layer that only permutes."""

    def forward_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self(x), constant_log_det(x)


class LastOnly(ReversibleSequential):
    """Returns the log-determinant of the last layer instead of the sum."""

    def forward_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for module in self:
            x, log_det = module.forward_log_det(x)
        return x, log_det


class SignedLog(AdditiveCoupling):
    """y1 = s x1 with a scale that may be negative, whose logarithm is not a number."""

    def __init__(self):
        super().__init__(branch(), branch())
        self.s = nn.Parameter(torch.tensor([1.5, -0.5, 2.0, -1.0]).view(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.s * super().forward(x)

    def inverse(self, y: Tensor) -> Tensor:
        return super().inverse(y / self.s)

    def forward_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self(x), constant_log_det(x, self.s.log().sum() * x[0, 0].numel())

    def inverse_log_det(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.inverse(y), constant_log_det(y, -self.s.abs().log().sum() * y[0, 0].numel())


class WithoutOffset(AffineCoupling):
    """log sigmoid(h), where the scale is sigmoid(h + 2)."""

    def forward_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x1, x2 = split(x, self.split_dim)
        y1, y2 = self.couple(x1, x2)
        h = [adapter.f(v).unflatten(1, (-1, 2))[:, :, 1] for adapter, v in ((self.Fm, x2), (self.Gm, y1))]
        return merge(y1, y2, self.split_dim), sum(v.sigmoid().log().flatten(1).sum(1) for v in h)


def affine(kind: type[AffineCoupling], adapter=AffineAdapterExp) -> AffineCoupling:
    return kind(branch(2, 4), branch(2, 4), adapter)


def as_set(kind: type[ActNorm]) -> ActNorm:
    layer = set_actnorm()
    layer.__class__ = kind
    return layer


log_det_fault = partial(fault, law="log_det", claim=FORWARD, says="the Jacobian")

FAULTS = [
    log_det_fault(
        "log-determinant with the sign reversed", "-log|s|", partial(affine, SignReversed), says="the sign is reversed"
    ),
    log_det_fault(
        "the inverse's log-determinant is forward's",
        "the sign again",
        partial(affine, SignNotReversed),
        claim=INVERSE,
        says="the sign is reversed",
    ),
    log_det_fault("one coupling's part missing", "log|s2| of G", partial(affine, HalfMissing)),
    log_det_fault("mean over the batch", "every sample is given the same", partial(affine, MeanOverTheBatch)),
    log_det_fault(
        "sum over the batch", "one value for all samples", partial(affine, SumOverTheBatch), says="one value a sample"
    ),
    log_det_fault(
        "mean over the entries",
        "as for bits per dimension",
        partial(affine, MeanOverEntries),
        says="0.0208. times as much",
    ),
    log_det_fault("logarithm to base two", "bits, not nats", partial(affine, ToBaseTwo), says="1.443 times as much"),
    log_det_fault(
        "log-determinant in single precision",
        "slogdet of W in float32",
        lambda: InSinglePrecision(4),
        says="float32",
    ),
    log_det_fault(
        "positions not counted", "the factor H W is missing", partial(as_set, OnePosition), says="0.08333 times as much"
    ),
    log_det_fault("log-determinant of zero", "of a layer that scales", partial(as_set, VolumeKept)),
    log_det_fault(
        "the last layer's log-determinant",
        "not the sum over the chain",
        lambda: LastOnly(affine(AffineCoupling), affine(AffineCoupling)),
    ),
    log_det_fault("logarithm of a negative scale", "log s, not log|s|", SignedLog, says="nan", stores=True),
    log_det_fault(
        "offset of the sigmoid forgotten",
        "log sigmoid(h), not of h + 2",
        partial(affine, WithoutOffset, AffineAdapterSigmoid),
    ),
]
