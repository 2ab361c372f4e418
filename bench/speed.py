"""Milliseconds of a training step of the six networks in each execution, beside the floor that the device sets.

    python -m bench.speed                                      all six, batch 100
    python -m bench.speed --fast --group 4                     the fastest execution, alone and four runs together
    python -m bench.speed --networks resnet32 --compile        with torch.compile, which takes minutes to compile
    python -m bench.speed --tries                              also what was tried on a CPU: layout, SGD, bfloat16

Rows are added to speed.csv in the device's folder, in the place of earlier ones, and speed.md is made of them.

The floor is what the arithmetic and the memory of a step must take at the rates that this machine reaches: each
convolution and matrix product, forward, recomputed and backward, takes its operations at the rate of a large matrix
product or its bytes (inputs read once, outputs written once) at the rate of a large copy, whichever takes longer; the
update reads weights, momenta and gradients once and writes the first two. All else (normalisation, activation,
couplings, augmentation) is taken to be free, as if fused into these.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from bench import folders, measure, speed_text
from memcnn import data as cifar
from memcnn.memory import training_step
from memcnn.models.resnet import MODELS
from memcnn.training.execution import Execution
from memcnn.training.files import write_by_rename
from memcnn.training.options import count
from memcnn.training.recipe import PUBLISHED, override
from memcnn.training.step import TrainingStep

LEAST_ROUNDS, MOST_ROUNDS, SECONDS = 3, 15, 15.0  # of a network: rounds until the seconds are over
ROUND_SECONDS = 0.2  # of a way to run a step on a GPU
CEILING_REPEATS = 7
UPDATE_BYTES = 20  # of a float32 weight: weight, momentum and gradient read, weight and momentum written
ON_GPU = (
    Execution(precision="tf32"),
    Execution(precision="bf16"),
    Execution(graph=True),
    Execution(precision="tf32", graph=True),
    Execution(precision="bf16", graph=True),
)
COMPILED = (Execution(compile=True),)


@dataclass(frozen=True)
class Way:
    """An execution of the step, and the number of training runs whose steps are interleaved."""

    execution: Execution
    group: int = 1


@dataclass(frozen=True)
class Work:
    """The work of a step: (operations, bytes) of each convolution and product, and the bytes of the update."""

    parts: tuple[tuple[int, int], ...]
    update_bytes: int

    @property
    def flops(self) -> int:
        return sum(flops for flops, _ in self.parts)

    @property
    def bytes(self) -> int:
        return self.update_bytes + sum(size for _, size in self.parts)

    def floor_seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        parts = sum(max(flops / flops_per_second, size / bytes_per_second) for flops, size in self.parts)
        return parts + self.update_bytes / bytes_per_second


class Counter(TorchDispatchMode):
    """Records (operations, bytes) of every convolution and matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[tuple[int, int]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        if (count := flop_registry.get(function.overloadpacket)) is not None:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
            size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            self.parts.append((count(*args, **kwargs, out_val=out), size))
        return out


def work(network: str, *, batch: int, precision: str) -> Work:
    """Count on fake tensors what a step of a network has to do."""
    with FakeTensorMode():
        model, *_, step = training_step(
            MODELS[network],
            lambda: (torch.zeros(batch, 3, 32, 32), torch.zeros(batch, dtype=torch.int64)),
            loss=F.cross_entropy,
            optimizer=None,
            autocast=torch.bfloat16 if precision == "bf16" else None,
        )
        with Counter() as counter:
            step()
    return Work(tuple(counter.parts), UPDATE_BYTES * sum(parameter.numel() for parameter in model.parameters()))


def ceilings(device: torch.device, execution: Execution) -> tuple[float, float]:
    """Return the best operations a second of a large matrix product, and bytes a second of a large copy."""
    size, numbers = (8192, 2**28) if device.type == "cuda" else (2048, 2**25)
    dtype = torch.bfloat16 if execution.precision == "bf16" else torch.float32
    left, right = torch.randn(2, size, size, device=device, dtype=dtype)
    source, target = torch.randn(2, numbers, device=device)
    with execution.settings(device):
        products = [seconds(lambda: left @ right) for _ in range(CEILING_REPEATS)]
        copies = [seconds(lambda: target.copy_(source)) for _ in range(CEILING_REPEATS)]
    return 2 * size**3 / min(products), 2 * source.nbytes / min(copies)


PLAIN = Way(Execution())


def seconds(run: Callable[[], object]) -> float:
    """Return the seconds of a call, with the work that it leaves to the GPU."""
    started = measure.clock()
    run()
    return measure.clock() - started


def step_of(network: str, way: Way, *, batch: int, device: torch.device) -> Callable[[int], None]:
    """Return a function that runs so many steps of each of the way's training runs, interleaved.

    A step is the one that training takes, on made-up images, at a rate that leaves the weights about where they are. In
    a group each run has its own weights and its own stream, so that kernels of several steps run at the same time.
    """
    data = cifar.generate(10, train=4 * batch, test=1).to(device)
    plan = cifar.epoch_plan(0, 0, 4 * batch, pad=PUBLISHED.pad, flip=True).to(device)
    part = plan.part(0, batch)
    recipe = override(PUBLISHED, batch_size=batch)
    members = []
    for _ in range(way.group):
        model = MODELS[network]().to(device, memory_format=torch.channels_last)
        step = TrainingStep(model, recipe, data, way.execution)
        members.append((step, _new_stream(device) if way.group > 1 else None))

    def run(count: int) -> None:
        with way.execution.settings(device):
            for _ in range(count):
                for step, stream in members:
                    with nullcontext() if stream is None else torch.cuda.stream(stream):
                        step(part, 1e-4)

    return run


def _new_stream(device: torch.device) -> "torch.cuda.Stream":
    """Return a stream that begins when all that is under way on the current one is done."""
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
    return stream


def tried(network: str, *, batch: int) -> dict[str, Callable[[int], None]]:
    """Return the step as it is for a CPU, and with each of its choices made otherwise."""

    def step(*, outermost: bool = False, fused: bool = True, bf16: bool = False, compiled: bool = False) -> Callable:
        layout = torch.contiguous_format if outermost else torch.channels_last
        model = MODELS[network]().to(memory_format=layout)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, weight_decay=2e-4, fused=fused)
        images = torch.randn(batch, 3, 32, 32).contiguous(memory_format=layout)
        labels = torch.arange(batch) % 10
        forward = torch.compile(model) if compiled else model

        def run(count: int) -> None:
            for _ in range(count):
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    loss = F.cross_entropy(forward(images), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

        return run

    return {
        "as it is": step(),
        "channels outermost": step(outermost=True),
        "SGD tensor by tensor": step(fused=False),
        "bfloat16": step(bf16=True),
        "torch.compile": step(compiled=True),
    }


def timed(steps: dict, device: torch.device, limit: float = SECONDS) -> tuple[pd.DataFrame, dict]:
    """Time each of the functions in turn, so that drift affects all equally.

    Args:
        steps: functions that run so many steps.
        device: where they run; on a GPU a round queues many steps.
        limit: seconds after which no further round begins.

    Returns:
        Seconds of one call for one step, with a column for each function and a row for each round; and the number of
        steps that a round took.
    """
    counts = {}
    for name, run in steps.items():
        run(1)  # compiles, captures and lets cuDNN choose
        if device.type == "cpu":
            counts[name] = 1
        else:
            counts[name] = max(1, round(ROUND_SECONDS / measure.warm_up(partial(run, 1), least=3)))
    rounds: list[dict] = []
    started = measure.clock()
    while len(rounds) < LEAST_ROUNDS or (len(rounds) < MOST_ROUNDS and measure.clock() - started < limit):
        rounds.append({name: seconds(partial(run, counts[name])) / counts[name] for name, run in steps.items()})
    return pd.DataFrame(rounds), counts


def rows(
    network: str,
    ways: Sequence[Way],
    rates: dict,
    *,
    batch: int,
    device: torch.device,
    where: dict,
    limit: float = SECONDS,
) -> pd.DataFrame:
    """Measure a network's step in each way, and return a row of speed.csv for each.

    Args:
        network: one of the six.
        ways: how the step is run.
        rates: operations and bytes a second that the device reaches, by precision.
        batch: images of a step.
        device: where it runs.
        where: the columns that say where and with what it was measured.
        limit: seconds after which no further round begins.
    """
    times, counts = timed({way: step_of(network, way, batch=batch, device=device) for way in ways}, device, limit)
    table = []
    for way in ways:
        each = times[way] / way.group
        needed = work(network, batch=batch, precision=way.execution.precision)
        flops, size = rates[way.execution.precision]
        ratios = each / times[PLAIN] if PLAIN in times else pd.Series(dtype=float)
        table.append({
            "network": network, "execution": str(way.execution), "group": way.group, "batch": batch,
            **_quartiles("ms", 1e3 * each), "rounds": len(times), "steps": counts[way],
            **_quartiles("to_plain", ratios), "gflop": needed.flops / 1e9, "gb": needed.bytes / 1e9,
            "floor_ms": 1e3 * needed.floor_seconds(flops, size), "gflop_per_second": flops / 1e9,
            "gb_per_second": size / 1e9, **where,
        })  # fmt: skip
    return pd.DataFrame(table)


def _quartiles(name: str, values: pd.Series) -> dict:
    low, middle, high = values.quantile([0.25, 0.5, 0.75])
    return {name: middle, f"{name}_low": low, f"{name}_high": high}


def spread(values: pd.Series, digits: int = 0) -> str:
    """Return median and quartiles as text."""
    low, middle, high = (f"{value:,.{digits}f}" for value in values.quantile([0.25, 0.5, 0.75]))
    return f"{middle} ({low} to {high})"


def tries(network: str, *, batch: int, device: torch.device) -> pd.DataFrame:
    """Time the choices that were tried for a CPU, as finished text."""
    times, _ = timed(tried(network, batch=batch), device, limit=4 * SECONDS)
    first = times.columns[0]
    return pd.DataFrame([
        {"step": name, "ms": spread(1e3 * times[name]), "to the first": spread(times[name] / times[first], 2),
         "n": len(times)}
        for name in times
    ])  # fmt: skip


def where_and_with_what(device: torch.device, clock: str) -> dict:
    """Return the columns of speed.csv that say where and with what a row was measured."""
    found = folders.environment(device, clock)
    about, software = found["device"], found["software"]
    return {
        "device_type": about["type"], "device": about["name"], "threads": about["threads"], "clock": clock,
        **{name: software.get(name) for name in ("torch", "cuda", "cudnn", "python")},
        "commit": found["commit"], "clean": found["clean"], "date": f"{datetime.now(timezone.utc):%Y-%m-%d}",
    }  # fmt: skip


def ways_of(given: argparse.Namespace, device: torch.device) -> list[Way]:
    """Return what the command line asks for: each execution alone, and the captured ones in a group as well."""
    if given.fast:
        fastest = Execution.fastest(device)
        others = [replace(fastest, narrow_convolutions=False), Execution.fastest(device, deterministic=True)]
        executions = dict.fromkeys(execution.on(device)[0] for execution in (fastest, *others))
        grouped = [fastest]
    else:
        executions = dict.fromkeys([
            PLAIN.execution, *(ON_GPU if device.type == "cuda" else ()), *(COMPILED if given.compile else ())
        ])  # fmt: skip
        grouped = [execution for execution in executions if execution.graph]
    groups = [Way(execution, given.group) for execution in grouped if given.group > 1 and execution.graph]
    return [*map(Way, executions), *groups]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bench.speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--networks", default=",".join(MODELS), metavar="A,B,...", help="of %(default)s")
    add("--batch", type=count, default=PUBLISHED.batch_size, help="images a step (default: %(default)s)")
    add("--device", help="cpu, cuda, cuda:1 ... (default: cuda where there is one, else cpu)")
    add("--clock", choices=measure.CLOCKS, default="wall", help="cpu: of this process alone, where others use the CPU")
    fast = "only the fastest execution of the device, the same without our kernel, and the fastest deterministic one"
    add("--fast", action="store_true", help=fast)
    add("--group", type=count, default=1, metavar="N", help="also N captured steps on N streams, interleaved; on a GPU")
    add("--compile", action="store_true", help="also through torch.compile, without a CUDA graph")
    add("--seconds", type=float, default=SECONDS, metavar="S", help="to measure a network for (default: %(default)s)")
    add("--tries", action="store_true", help="also what was tried on a CPU")
    add("--out", type=Path, metavar="FOLDER", help="of speed.csv and speed.md (default: reports/bench/<device>)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser = build_parser()
    given = parser.parse_args(arguments)
    networks = given.networks.split(",")
    if unknown := sorted(set(networks) - set(MODELS)):
        parser.error(f"--networks: got {', '.join(unknown)}, wanted some of {', '.join(MODELS)}")
    try:
        device = folders.chosen(given.device)
        folder = given.out or folders.folder_of(device)
        speed_text.read(folder)  # a file that cannot be added to is found before anything is measured
    except ValueError as error:
        parser.error(str(error))
    ways = ways_of(given, device)
    if given.group > 1 and all(way.group == 1 for way in ways):
        parser.error(f"--group: got {given.group} on {device.type}, wanted a GPU, where steps are captured")
    measure.source = measure.CLOCKS[given.clock]

    command = " ".join(["python -m bench.speed", *(sys.argv[1:] if arguments is None else arguments)])
    executions = {way.execution.precision: way.execution for way in ways}
    rates = {precision: ceilings(device, execution) for precision, execution in executions.items()}
    where = where_and_with_what(device, given.clock)
    for network in networks:
        print(f"{network} ...", file=sys.stderr, flush=True)
        new = rows(network, ways, rates, batch=given.batch, device=device, where=where, limit=given.seconds)
        table = speed_text.add(folder, new)  # at once: what is measured is kept if a later network fails
        _write_page(folder, table, command)
    if given.tries:
        tries(networks[0], batch=given.batch, device=device).to_csv(folder / speed_text.TRIES, index=False)
    print(_write_page(folder, table, command))
    return 0


def _write_page(folder: Path, table: pd.DataFrame, command: str) -> str:
    file = folder / speed_text.TRIES
    tried_out = pd.read_csv(file, dtype=str) if file.is_file() else None
    text = speed_text.page(table, command, "The floor is" + __doc__.partition("The floor is")[2].rstrip(), tried_out)
    write_by_rename(folder / speed_text.PAGE, text.encode())
    return text


if __name__ == "__main__":
    sys.exit(main())
