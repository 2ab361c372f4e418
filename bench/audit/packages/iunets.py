"""iunets: invertible downsampling and upsampling by learned orthogonal matrices, with ``forward`` and ``inverse``."""

import iunets.layers as il

from bench.audit.packages.layers import Layer, dense

PACKAGE = "iunets"
SHAPES = {1: (3, 2, 8), 2: (3, 2, 4, 4), 3: (2, 2, 4, 4, 4)}


def resampling(dim: int, method: str) -> list[Layer]:
    n, c, *side = SHAPES[dim]
    down, up = (getattr(il, f"Invertible{kind}sampling{dim}D") for kind in ("Down", "Up"))
    return [
        Layer(f"InvertibleDownsampling{dim}D(2, method={method!r})", lambda: down(2, method=method), SHAPES[dim]),
        Layer(
            f"InvertibleUpsampling{dim}D({c * 2**dim}, method={method!r})",
            lambda: up(c * 2**dim, method=method),
            (n, c * 2**dim, *(s // 2 for s in side)),
        ),
    ]


def mixing(dim: int, method: str) -> Layer:
    make = getattr(il, f"InvertibleChannelMixing{dim}D")
    return Layer(f"InvertibleChannelMixing{dim}D(2, method={method!r})", lambda: make(2, method=method), SHAPES[dim])


LAYERS = [
    *(layer for method in ("cayley", "exp") for dim in (1, 2, 3) for layer in resampling(dim, method)),
    *(mixing(dim, method) for method in ("cayley", "exp") for dim in (1, 2)),
    Layer(
        'InvertibleDownsampling2D(2, init="random")', lambda: il.InvertibleDownsampling2D(2, init="random"), SHAPES[2]
    ),
    Layer(
        'InvertibleDownsampling2D(2, method="householder")',
        lambda: il.InvertibleDownsampling2D(2, method="householder"),
        SHAPES[2],
    ),
    Layer("create_standard_module(4)", lambda: il.create_standard_module((4, 4, 4), dim=2), (3, 4, 4, 4)),
    Layer("StandardAdditiveCoupling(F, 3)", lambda: il.StandardAdditiveCoupling(dense(3, 3), 3)),
    Layer("StandardAdditiveCoupling(F, 2)", lambda: il.StandardAdditiveCoupling(dense(3, 2), 2), (4, 5)),
]
