"""flowtorch: lazy bijectors with ``forward(x)``, ``inverse(y)`` and ``log_abs_det_jacobian(x, y)``."""

import flowtorch.bijectors as fb
import torch
from torch import Tensor

from bench.audit.packages.layers import Flow, Layer, Pair

PACKAGE = "flowtorch"


class Adapter(Flow):
    """An adapter for ``_forward`` and ``_inverse``, which take the parameters; both return log|dy/dx|."""

    def parameters_for(self, x: Tensor):
        return None if self.layer._params_fn is None else self.layer._params_fn(x, None)

    def forward_log_det(self, x: Tensor) -> Pair:
        y, log_det = self.layer._forward(x, self.parameters_for(x))
        return y, self.summed(log_det, x)

    def inverse_log_det(self, y: Tensor) -> Pair:

        x, log_det = self.layer._inverse(y, self.parameters_for(y))
        return x, -self.summed(log_det, y)

    @staticmethod
    def summed(log_det: Tensor, x: Tensor) -> Tensor:
        if log_det.shape == x.shape[1:]:
            log_det = log_det.expand(x.shape)
        return log_det.flatten(1).sum(1) if log_det.dim() > 1 else log_det


def flow(name: str, draw=lambda x: x, **options) -> Layer:
    words = ", ".join(f"{key}={value!r}" for key, value in options.items())
    return Layer(f"{name}({words})", lambda: Adapter(getattr(fb, name)(shape=torch.Size((6,)), **options)), draw=draw)


LAYERS = [
    flow("Affine"),
    flow("AffineFixed"),
    flow("ELU"),
    flow("Exp"),
    flow("LeakyReLU"),
    flow("Permute"),
    flow("Power", draw=lambda x: x.exp()),
    flow("Sigmoid"),
    flow("Softplus"),
    flow("Spline"),
    flow("Tanh"),
]
