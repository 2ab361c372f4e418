"""zuko: a lazy transform returns a transform ``t`` when called; use ``t(x)``, ``t.inv`` and ``t.call_and_ladj(x)``."""

import zuko
from torch import Tensor

from bench.audit.packages.layers import Flow, Layer, Pair

PACKAGE = "zuko"


class Adapter(Flow):
    """An adapter for a LazyTransform, a module that builds the transform from its parameters."""

    def forward_log_det(self, x: Tensor) -> Pair:
        return self.layer().call_and_ladj(x)

    def inverse_log_det(self, y: Tensor) -> Pair:
        return self.layer().inv.call_and_ladj(y)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer()(x)

    def inverse(self, y: Tensor) -> Tensor:
        return self.layer().inv(y)


def flow(name: str, make, shape=(4, 3), **options) -> Layer:
    return Layer(name, lambda: Adapter(make().transform), shape, **options)


small = {"transforms": 1, "hidden_features": (16,)}
BISECTION = {
    "inverse": "the inverse is a bisection down to 1e-6 (its documentation)",
    "wrapped": "the inverse is a bisection down to 1e-6 (its documentation)",
}
LAYERS = [
    flow("NICE(3)", lambda: zuko.flows.NICE(3, **small)),
    flow("MAF(3)", lambda: zuko.flows.MAF(3, **small)),
    flow("MAF(3, passes=2)", lambda: zuko.flows.MAF(3, passes=2, **small)),
    flow("NSF(3)", lambda: zuko.flows.NSF(3, **small)),
    flow("NCSF(3)", lambda: zuko.flows.NCSF(3, **small), draw=lambda x: 3 * x.tanh()),
    flow("SOSPF(3)", lambda: zuko.flows.SOSPF(3, **small), known=BISECTION),
    flow("BPF(3)", lambda: zuko.flows.BPF(3, **small), known=BISECTION),
    flow("GF(3)", lambda: zuko.flows.GF(3, transforms=1), known=BISECTION),
    Layer(
        "GeneralCouplingTransform(4)",
        lambda: Adapter(zuko.flows.GeneralCouplingTransform(4, hidden_features=(16,))),
        (4, 4),
    ),
    Layer("ElementWiseTransform(3)", lambda: Adapter(zuko.flows.ElementWiseTransform(3)), (4, 3)),
]
