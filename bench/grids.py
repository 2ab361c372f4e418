"""Exact mode of the momentum network: the errors of gradients on each grid, and the largest value that it allows.

    python -m bench.grids                                    a table, in a minute
    python -m bench.grids --csv reports/networks/grids.csv   the data of a table in docs/networks.md

Exact mode rounds the streams to multiples of a step (``memcnn.engine.exact``). Two errors are measured. The error of
inversion compares gradients with those of the same network with stored activations, which rounds to the same grid. The
error of the grid compares gradients with those in float64 without a grid, for ReLU and for GELU, which has no kink. Two
rows without a grid are for comparison: plain float32, and plain bfloat16 autocast. Prints Markdown.
"""

import sys
from collections.abc import Sequence
from contextlib import nullcontext

import pandas as pd
import torch
from torch import Tensor, nn

from bench.reference import residual_function
from bench.tables import add_csv_option, publish
from memcnn import cli
from memcnn.engine.exact import Grid
from memcnn.models.momentum import MomentumNet
from memcnn.testing.tolerances import relative_error

GAMMA, DEPTH, WIDTH = 0.97, 16, 16
EXPONENTS = (6, 8, 10, 12, 14, 16, 18)


def network(exact: bool | float, activation: type[nn.Module] = nn.ReLU, *, disable: bool = False) -> MomentumNet:
    """Return the network of ``bench.reference_peers``, always with the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        functions = [residual_function(WIDTH) for _ in range(DEPTH)]
    for function in functions:
        for i, layer in enumerate(function):
            function[i] = activation() if isinstance(layer, nn.ReLU) else layer
    return MomentumNet(*functions, gamma=GAMMA, exact=exact, disable=disable)


def gradients(net: nn.Module, x: Tensor, *, autocast: bool = False) -> list[Tensor]:
    """Return the gradients of input and parameters, in float64."""
    x = x.detach().clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        y = net(x)
    y.to(x.dtype).square().mean().backward()
    return [x.grad.double(), *(p.grad.double() for p in net.parameters())]


def errors(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> tuple[float, float]:
    """Return the worst error of an entry, relative to its tensor's largest entry, and the worst error in norm."""
    pairs = list(zip(actual, expected, strict=True))
    return max(relative_error(a, b) for a, b in pairs), max(float((a - b).norm() / b.norm()) for a, b in pairs)


def compare(x: Tensor, exponents: Sequence[int] = EXPONENTS) -> pd.DataFrame:
    """Return a row for each grid, and for plain autograd without one in float32 and under autocast."""
    unrounded = {
        kind: gradients(network(False, kind, disable=True).double(), x.double()) for kind in (nn.ReLU, nn.GELU)
    }
    rows = []
    for exponent in exponents:
        step = 2.0**-exponent
        found = {kind: gradients(network(step, kind), x) for kind in unrounded}
        stored = gradients(network(step, disable=True), x)
        rows.append(
            {"grid": f"2^-{exponent}", "largest value": Grid(step).limit(x.dtype)}
            | {"inversion": errors(found[nn.ReLU], stored)[0]}
            | _against(found, unrounded)
        )
    for name, autocast in (("none, float32", False), ("none, bfloat16 autocast", True)):
        found = {kind: gradients(network(False, kind, disable=True), x, autocast=autocast) for kind in unrounded}
        rows.append({"grid": name} | _against(found, unrounded))
    return pd.DataFrame(rows)


def _against(found: dict, unrounded: dict) -> dict[str, float]:
    """Return the errors of gradients against those without a grid, as columns."""
    both = {kind: errors(found[kind], unrounded[kind]) for kind in unrounded}
    return {"entry": both[nn.ReLU][0], "norm": both[nn.ReLU][1], "norm, GELU": both[nn.GELU][1]}


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows as text for readers."""

    def shown(values: pd.Series, form: str) -> list[str]:
        return ["" if pd.isna(value) else format(value, form) for value in values]

    return pd.DataFrame(
        {
            "grid": rows["grid"],
            "largest value in float32": shown(rows["largest value"], ",.0f"),
            "error of inversion": shown(rows["inversion"], ".1g"),
            "error of the grid, worst entry": shown(rows["entry"], ".1e"),
            "worst norm": shown(rows["norm"], ".1e"),
            "worst norm with GELU": shown(rows["norm, GELU"], ".1e"),
        }
    )


@cli.command("bench.grids")
def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; return 0."""
    parser = cli.parser_from("bench.grids", __doc__, whole=True)
    add_csv_option(parser)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = compare(torch.randn(8, WIDTH, 16, 16, generator=torch.Generator().manual_seed(1)))
    publish(rows, table(rows), args.csv)
    return 0


if __name__ == "__main__":
    sys.exit(main())
