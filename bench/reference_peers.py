"""Compare the reference networks with packages that have the same network: time, memory, errors.

    python -m bench.reference_peers FOLDER               all pairs; pip installed the peers into FOLDER with --target
    python -m bench.reference_peers FOLDER --only glow   some of them

The networks of a pair share their residual functions or, for flows, the form of their subnetworks. They differ in the
engine. Each row has three measurements. The first is the CPU time of a step relative to plain autograd on this
project's network: median and quartiles of interleaved rounds. The second is the peak bytes of tensors in a step,
without parameters and gradients, at 4 and at 16 blocks. The third is the worst error in float32: of gradients against
plain autograd in float64, or of inverse(forward(x)) for flows and U-Nets. If a contender fails, the command prints its
name and the reason, and measures the others. Prints Markdown.

    pip install --target FOLDER --no-deps momentumnet reformer-pytorch local-attention einops \\
        axial-positional-embedding product-key-memory colt5-attention hyper-connections iunets normflows FrEIA
"""

import copy
import sys
from collections.abc import Callable, Sequence

import pandas as pd
import torch
from torch import Tensor, nn

from bench.measure import cpu_seconds_in_turn
from bench.reference_pairs import INPUTS, PAIRS, Contender
from bench.result import spread
from bench.tables import add_csv_option, publish
from memcnn import cli
from memcnn.memory import measure_step_memory, tensor_peak_bytes
from memcnn.testing.tolerances import relative_error

DEPTHS = (4, 16)


def network_and_step(contender: Contender, depth: int, x: Tensor) -> tuple[nn.Module, Callable[[], None]]:
    """Return a network with the weights of seed 0, and its training step, which has run once to initialise layers."""
    torch.manual_seed(0)
    module = contender.make(depth)
    x = x.detach().clone().requires_grad_()

    def step() -> None:
        contender.loss(module, x).backward()

    step()
    return module, step


def error_of(contender: Contender, plain: Contender, x: Tensor, depth: int) -> float:
    """Return the relative error of inverse(forward(x)), or the worst one of the gradients."""
    module, _ = network_and_step(contender, depth, x)
    if contender.inverse is not None:
        with torch.no_grad():
            return relative_error(contender.inverse(module, x), x)
    reference = network_and_step(plain, depth, x)[0].double()
    gradients = []
    for one, network, given in ((contender, module, x), (plain, reference, x.double())):
        given = given.detach().clone().requires_grad_()
        network.zero_grad()
        one.loss(network, given).backward()
        gradients.append([given.grad, *(p.grad for p in network.parameters())])
    return max(relative_error(a.double(), b) for a, b in zip(*gradients, strict=True))


def compare(pair: str, rounds: int) -> tuple[list[dict], list[tuple[str, str]]]:
    """Return a row for each contender of a pair, and the names and reasons of those that failed."""
    torch.manual_seed(1)
    contenders, x = PAIRS[pair]()
    rows, steps, failures = {}, {}, []
    plain = contenders["plain autograd"]
    for name, contender in contenders.items():
        given = INPUTS.get((pair, name), copy.copy)(x)
        try:
            sizes = []
            for depth in DEPTHS:
                module, step = network_and_step(contender, depth, given)
                sizes.append(measure_step_memory(module, step, meter=tensor_peak_bytes).activation_bytes)
            steps[name] = network_and_step(contender, DEPTHS[0], given)[1]
            rows[name] = {
                "network": pair,
                "contender": name,
                "parameters": sum(p.numel() for p in module.parameters()),
                **{f"bytes at {depth}": size for depth, size in zip(DEPTHS, sizes, strict=True)},
                "worst error": error_of(contender, plain, given, DEPTHS[-1]),
                "of": "gradients" if contender.inverse is None else "round trip",
            }
        except Exception as error:  # a peer may raise anything
            failures.append((f"{pair}, {name}", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"))
            steps.pop(name, None)
    times = cpu_seconds_in_turn(steps, rounds)
    for name, row in rows.items():
        row["time / plain"] = spread(times[name] / times["plain autograd"], None) if "plain autograd" in times else ""
    return list(rows.values()), failures


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows as text for readers."""
    shown = rows.copy()
    for column in ("parameters", *(f"bytes at {depth}" for depth in DEPTHS)):
        shown[column] = [f"{int(size):,}" for size in rows[column]]
    shown["worst error"] = [f"{error:.1e}" for error in rows["worst error"]]
    return shown


@cli.command("bench.reference_peers")
def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; return 0, or 1 if a contender failed."""
    parser = cli.parser_from("bench.reference_peers", __doc__, whole=True)
    parser.add_argument("folder", type=cli.input_folder, help="where pip installed the peers")
    parser.add_argument("--only", nargs="+", choices=PAIRS, default=list(PAIRS), help="default: all")
    parser.add_argument("--rounds", type=cli.count, default=9, help="interleaved rounds (default: %(default)s)")
    add_csv_option(parser)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    sys.path.append(str(args.folder))
    rows: list[dict] = []
    failures: list[tuple[str, str]] = []
    for pair in args.only:
        try:
            found, failed = compare(pair, args.rounds)
        except ImportError as error:
            found, failed = [], [(pair, f"{error}; install it into {args.folder}")]
        rows += found
        failures += failed
        print(f"{pair}: done", file=sys.stderr, flush=True)
    frame = pd.DataFrame(rows)
    if rows:
        publish(frame, table(frame), args.csv)
    for name, reason in failures:
        print(f"\nleft out: {name}: {reason}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
