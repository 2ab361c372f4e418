"""Time against bytes of one chain: budgets, ``keep_every``, checkpoints, torch's memory budget, and ckptplan.

    python -m bench.budget                     8 blocks on 4 x 32 x 16 x 16: several minutes
    python -m bench.budget --quick             4 blocks, nothing compiled
    python -m bench.budget --peers FOLDER      also ckptplan, after pip install --target FOLDER ckptplan
    python -m bench.budget --unequal           12 blocks of three kinds, whose costs differ widely
    python -m bench.budget --prices            estimated and measured time of ten kinds of branches

All contenders hold the same blocks with the same weights. Every second block is cheap: its convolutions have kernel
size 1 instead of 3. With ``--unequal`` the blocks take turns: a 7 x 7 convolution, four times tanh, two 1 x 1
convolutions around a depthwise one. The first takes the most time per stored byte, the last the least. Times are CPU
seconds of interleaved steps, relative to plain autograd in the same round. Bytes are the peak of a training step above
parameters, gradients and batch. Two meters count them: one counts tensors, and sees none within compiled code; the
other asks the allocator, and includes the workspaces of kernels. If a contender fails, the command prints its name
and the reason, and measures the others. Prints Markdown.
"""

import copy
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from bench.cases import Branch, Checkpointed, step_on
from bench.measure import cpu_seconds_in_turn
from bench.result import spread
from bench.tables import add_csv_option, publish
from memcnn import AdditiveCoupling, ReversibleSequential, cli
from memcnn.memory import allocator_peak_bytes, measure_step_memory, tensor_peak_bytes
from memcnn.memory.tensors import storages_of
from memcnn.models.budget import price_of

SHARES = (0.0, 0.25, 0.5, 0.75)
"""Budgets: 0 stands for the least bytes that a chain needs, 1 for the bytes of plain autograd."""

UNEQUAL_SHARES = (0.0, 0.1, 0.25, 0.5)


def couplings(depth: int, channels: int = 32) -> list[AdditiveCoupling]:
    """Return the blocks; every second one is cheap."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return [AdditiveCoupling(*(branch(channels // 2, cheap=bool(i % 2)) for _ in range(2))) for i in range(depth)]


def branch(channels: int, *, cheap: bool) -> nn.Module:
    """Return F or G of ``bench.cases`` with GroupNorm in place of BatchNorm, which ckptplan refuses to checkpoint."""
    made = Branch(channels)
    for i in (1, 4):
        made[i] = nn.GroupNorm(4, channels)
    for i in (0, 3) if cheap else ():
        made[i] = nn.Conv2d(channels, channels, 1, bias=False)
    return made


def _conv(kernel_size: int) -> nn.Module:
    return nn.Conv2d(16, 16, kernel_size, padding=kernel_size // 2, bias=False)


def _depthwise() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(16, 64, 1), nn.SiLU(), nn.Conv2d(64, 64, 3, padding=1, groups=64), nn.SiLU(), nn.Conv2d(64, 16, 1)
    )


BRANCHES: dict[str, Callable[[], nn.Module]] = {
    "convolution 7": lambda: _conv(7),
    "convolution 3": lambda: _conv(3),
    "convolution 1": lambda: _conv(1),
    "twice convolution 3, GroupNorm": lambda: branch(16, cheap=False),
    "twice convolution 1, GroupNorm": lambda: branch(16, cheap=True),
    "tanh": nn.Tanh,
    "four times tanh": lambda: nn.Sequential(*(nn.Tanh() for _ in range(4))),
    "twice GELU": lambda: nn.Sequential(nn.GELU(), nn.GELU()),
    "GroupNorm, SiLU, depthwise": lambda: nn.Sequential(
        nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv2d(16, 16, 3, padding=1, groups=16)
    ),
    "inverted bottleneck": _depthwise,
}
"""Branches of 16 channels."""

UNEQUAL = ("convolution 7", "four times tanh", "inverted bottleneck")


def unequal(depth: int) -> list[AdditiveCoupling]:
    """Return blocks whose branches cycle through the kinds in ``UNEQUAL``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kinds = [BRANCHES[UNEQUAL[i % len(UNEQUAL)]] for i in range(depth)]
        return [AdditiveCoupling(kind(), kind()) for kind in kinds]


def prices(x: Tensor, rounds: int = 60) -> pd.DataFrame:
    """Return estimated and measured time per stored byte for each of ``BRANCHES``, the slowest first.

    The measured time is the 10 % quantile of interleaved evaluations without gradients.
    """
    blocks = {name: AdditiveCoupling(kind(), kind()) for name, kind in BRANCHES.items()}
    with torch.no_grad():
        seconds = cpu_seconds_in_turn({name: partial(block, x) for name, block in blocks.items()}, rounds)
    rows = []
    for name, block in blocks.items():
        price, fast = price_of(block, x.detach().requires_grad_(), {})[0], seconds[name].quantile(0.1)
        rows.append(
            {
                "branches": name,
                "stored bytes": price.stored_bytes,
                "estimated cost / byte": price.cost_per_byte,
                "measured ns / byte": 1e9 * fast / price.stored_bytes,
            }
        )
    return pd.DataFrame(rows).sort_values("measured ns / byte", ascending=False)


def prices_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows as text for readers."""
    shown = rows.copy()
    shown["stored bytes"] = [f"{size:,}" for size in rows["stored bytes"]]
    for column, form in (("estimated cost / byte", ".0f"), ("measured ns / byte", ".2f")):
        shown[column] = [format(value, form) for value in rows[column]]
    return shown


def eager(
    depth: int, x: Tensor, couplings: Callable[[int], list] = couplings, shares: Sequence[float] = SHARES
) -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """Yield the name of each eager chain, and a function that builds it."""
    blocks = partial(couplings, depth)
    yield "plain autograd", lambda: nn.Sequential(*blocks())
    yield "checkpoint per block", lambda: Checkpointed(*blocks())
    for k in (2, 4, None):
        yield f"keep_every={k}", lambda k=k: ReversibleSequential(*blocks(), keep_every=k)
    chain = ReversibleSequential(*blocks())
    # the second call measures step 4, which the drift watch samples
    least = max(step_bytes(chain, x, tensor_peak_bytes) for _ in range(2))
    most = step_bytes(ReversibleSequential(*blocks(), keep_every=1), x, tensor_peak_bytes)
    for share in shares:
        budget = least + int(share * (most - least))
        yield f"budget_bytes={budget:,}", lambda b=budget: ReversibleSequential(*blocks(), budget_bytes=b)


def compiled(depth: int) -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """Yield the name of each chain compiled with torch's activation memory budget, and a function that builds it."""

    def make(share: float) -> nn.Module:
        return Compiled(nn.Sequential(*couplings(depth)), share)

    for share in (1.0, 0.5, 0.0):
        yield f"torch.compile, activation_memory_budget={share}", lambda share=share: make(share)


class Compiled(nn.Module):
    """A module compiled under a memory budget: 1 stores as much as plain autograd does, 0 as little as possible.

    The backend partitions forward and backward pass as ``torch.compile`` does by default, and runs the kernels of eager
    mode, so that times differ by recomputation and not by generated code.
    """

    def __init__(self, module: nn.Module, activation_memory_budget: float):
        super().__init__()
        self.module, self.activation_memory_budget = module, activation_memory_budget
        torch._dynamo.reset()
        self.run = torch.compile(module, backend="aot_eager_decomp_partition")

    def forward(self, x: Tensor) -> Tensor:
        with torch._functorch.config.patch(activation_memory_budget=self.activation_memory_budget):
            return self.run(x)


def planned(depth: int, x: Tensor) -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """Yield the name of each chain of ckptplan, and a function that builds it.

    ckptplan measures bytes only on CUDA. Here it is given the bytes that ``saved_bytes`` counts.
    """

    def make(share: float) -> nn.Module:
        import ckptplan

        model = nn.ModuleList(couplings(depth))
        inputs = (x.detach().clone().requires_grad_(),)
        blocks = ckptplan.declare_blocks(model, [(f"block{i}", block) for i, block in enumerate(model)])
        profiles = ckptplan.profile_blocks(blocks, inputs, device="cpu", dtype=x.dtype)
        sizes = [saved_bytes(block, x) for block in model]
        profiles = [
            replace(profile, activation_bytes_estimate=size, timing_only=False)
            for profile, size in zip(profiles, sizes, strict=True)
        ]
        plan = ckptplan.plan_checkpoints(
            profiles,
            blocks,
            target_kind="activation_budget_bytes",
            target_value=int(share * sum(sizes)),
            planner="dynamic_programming",
        )
        return ckptplan.apply_plan(blocks, plan, inputs, None)

    for share in (0.75, 0.5, 0.25):
        yield f"ckptplan, {share} of the activations", lambda share=share: make(share)


def saved_bytes(block: nn.Module, x: Tensor) -> int:
    """Return the bytes of the activations that plain autograd saves in a block."""
    saved = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            saved.update({id(storage): storage for storage in storages_of(tensor)})
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        copy.deepcopy(block)(x.detach().requires_grad_())
    return sum(storage.nbytes() for storage in saved.values())


def step_bytes(model: nn.Module, x: Tensor, meter: Callable[[Callable[[], object]], int]) -> int:
    """Return the peak bytes of a step above parameters, gradients and batch."""
    step = step_on(x.detach().clone(), torch.ones_like(x), model, torch.enable_grad)
    step.run()
    return measure_step_memory(model, step.run, meter=meter).activation_bytes


def measure(makers: Sequence[tuple[str, Callable[[], nn.Module]]], x: Tensor, rounds: int) -> tuple[pd.DataFrame, list]:
    """Return bytes and seconds of each contender, and the names and reasons of those that failed."""
    rows, steps, failures = [], {}, []
    for name, make in makers:
        try:
            model = make()
            begun = time.process_time()
            tensors = None if isinstance(model, Compiled) else step_bytes(model, x, tensor_peak_bytes)
            allocated = step_bytes(model, x, allocator_peak_bytes)
            steps[name] = step_on(x.detach().clone(), torch.ones_like(x), model, torch.enable_grad).run
            steps[name]()
            rows.append({"chain": name, "tensors, bytes": tensors, "allocator, bytes": allocated})
            print(f"{name}: ready after {time.process_time() - begun:.0f} s", file=sys.stderr, flush=True)
        except Exception as error:  # a peer may raise anything
            failures.append((name, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"))
    times = cpu_seconds_in_turn(steps, rounds)
    for row in rows:
        row["time / plain"] = spread(times[row["chain"]] / times["plain autograd"], None)
        row["ms a step"] = f"{1e3 * times[row['chain']].median():.1f}"
    return pd.DataFrame(rows), failures


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows as text for readers."""
    shown = rows.copy()
    for column in ("tensors, bytes", "allocator, bytes"):
        shown[column] = ["" if pd.isna(size) else f"{int(size):,}" for size in rows[column]]
    return shown


def _print_prices(rows: pd.DataFrame, csv: Path | None) -> int:
    publish(rows, prices_table(rows), csv)
    agreement = rows["estimated cost / byte"].corr(rows["measured ns / byte"], method="spearman")
    print(f"\nRank correlation of estimated and measured: {agreement:.2f}")
    return 0


@cli.command("bench.budget")
def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; return 0, or 1 if a contender failed."""
    parser = cli.parser_from("bench.budget", __doc__, whole=True)
    parser.add_argument("--quick", action="store_true", help="4 blocks, 3 rounds, nothing compiled")
    parser.add_argument("--unequal", action="store_true", help="12 blocks of three kinds, nothing compiled")
    parser.add_argument("--prices", action="store_true", help="compare estimated with measured times, and nothing else")
    parser.add_argument("--peers", type=cli.input_folder, metavar="FOLDER", help="where pip installed ckptplan")
    add_csv_option(parser)
    args = parser.parse_args(arguments)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces every start and stop
    torch.set_num_threads(1)
    x = torch.randn(4, 32, 16, 16, generator=torch.Generator().manual_seed(1))
    if args.prices:
        return _print_prices(prices(x), args.csv)
    depth, rounds = (4, 3) if args.quick else (12, 11) if args.unequal else (8, 11)
    makers = list(eager(depth, x, unequal, UNEQUAL_SHARES) if args.unequal else eager(depth, x))
    if args.peers is not None:
        sys.path.append(str(args.peers))
        makers += planned(depth, x)
    if not args.quick and not args.unequal:
        makers += compiled(depth)
    rows, failures = measure(makers, x, rounds)
    print(f"{depth} blocks on {tuple(x.shape)}, median [quartiles] of {rounds} interleaved rounds.\n")
    publish(rows, table(rows), args.csv)
    for name, reason in failures:
        print(f"\nleft out: {name}: {reason}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
