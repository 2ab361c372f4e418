"""Milliseconds of a training step of the six networks, however it is executed, beside the floor that the device sets.

    python -m bench.speed                                      all six, batch 100
    python -m bench.speed --networks resnet32 --compile        with torch.compile, which takes minutes to compile
    python -m bench.speed --tries                              also what was tried on a CPU: layout, SGD, bfloat16
    python -m bench.speed --out reports/speed.md               written down as well

The floor is what the arithmetic and the memory of a step must take at the rates that this machine reaches: each
convolution and matrix product, forward, recomputed and backward, takes its operations at the rate of a large matrix
product or its bytes (inputs read once, outputs written once) at the rate of a large copy, whichever takes longer; the
update reads weights, momenta and gradients once and writes the first two. All else (normalisation, activation,
couplings, augmentation) is taken to be free, as if fused into these.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from bench import measure
from memcnn import data as cifar
from memcnn.models.resnet import MODELS
from memcnn.testing.prediction import training_step
from memcnn.training.environment import device_info, git_state, software_versions
from memcnn.training.execution import Execution
from memcnn.training.recipe import PUBLISHED, override
from memcnn.training.step import TrainingStep

LEAST_ROUNDS, MOST_ROUNDS, SECONDS = 3, 15, 15.0  # of a network: rounds until the seconds are over
CEILING_REPEATS = 7
UPDATE_BYTES = 20  # of a float32 weight: weight, momentum and gradient read, weight and momentum written
PLAIN = Execution()
ON_GPU = (
    Execution(precision="tf32"),
    Execution(precision="bf16"),
    Execution(graph=True),
    Execution(precision="tf32", graph=True),
    Execution(precision="bf16", graph=True),
)
COMPILED = (Execution(compile=True),)


@dataclass(frozen=True)
class Work:
    """Of the convolutions and products of a step: (operations, bytes) of each; and the bytes of the update."""

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
    """What a step of a network has to do, counted on fake tensors."""
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
    """Operations a second of a large matrix product, and bytes a second, moved by a large copy: the best."""
    size, numbers = (8192, 2**28) if device.type == "cuda" else (2048, 2**25)
    dtype = torch.bfloat16 if execution.precision == "bf16" else torch.float32
    left, right = torch.randn(2, size, size, device=device, dtype=dtype)
    source, target = torch.randn(2, numbers, device=device)
    with execution.settings(device):
        products = [seconds(lambda: left @ right) for _ in range(CEILING_REPEATS)]
        copies = [seconds(lambda: target.copy_(source)) for _ in range(CEILING_REPEATS)]
    return 2 * size**3 / min(products), 2 * source.nbytes / min(copies)


def seconds(run: Callable[[], object]) -> float:
    started = measure.clock()
    run()
    return measure.clock() - started


def step_of(network: str, execution: Execution, *, batch: int, device: torch.device) -> Callable[[], None]:
    """A step on made-up images, at a rate that leaves the weights about where they are."""
    data = cifar.generate(10, train=4 * batch, test=1).to(device)
    plan = cifar.epoch_plan(0, 0, 4 * batch, pad=PUBLISHED.pad, flip=True).to(device)
    model = MODELS[network]().to(device, memory_format=torch.channels_last)
    step = TrainingStep(model, override(PUBLISHED, batch_size=batch), data, execution)
    part = plan.part(0, batch)

    def run() -> None:
        with execution.settings(device):
            step(part, 1e-4)

    return run


def tried(network: str, *, batch: int) -> dict[str, Callable[[], None]]:
    """The step without one of the choices made for a CPU, or with one that was not."""

    def step(*, outermost: bool = False, fused: bool = True, bf16: bool = False, compiled: bool = False) -> Callable:
        layout = torch.contiguous_format if outermost else torch.channels_last
        model = MODELS[network]().to(memory_format=layout)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, weight_decay=2e-4, fused=fused)
        images = torch.randn(batch, 3, 32, 32).contiguous(memory_format=layout)
        labels = torch.arange(batch) % 10
        forward = torch.compile(model) if compiled else model

        def run() -> None:
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


def timed(steps: dict, limit: float = SECONDS) -> pd.DataFrame:
    """Seconds of each step (columns) in each round (rows): one call of each in turn, after one that is not counted."""
    for run in steps.values():
        run()
    rounds: list[dict] = []
    started = measure.clock()
    while len(rounds) < LEAST_ROUNDS or (len(rounds) < MOST_ROUNDS and measure.clock() - started < limit):
        rounds.append({name: seconds(run) for name, run in steps.items()})
    return pd.DataFrame(rounds)


def spread(values: pd.Series, digits: int = 0) -> str:
    """Median and quartiles."""
    low, middle, high = (f"{value:,.{digits}f}" for value in values.quantile([0.25, 0.5, 0.75]))
    return f"{middle} ({low} to {high})"


def rows(network: str, executions: Sequence[Execution], rates: dict, *, batch: int, device: torch.device) -> list[dict]:
    steps = {execution: step_of(network, execution, batch=batch, device=device) for execution in executions}
    times = timed(steps)
    result = []
    for execution in executions:
        needed = work(network, batch=batch, precision=execution.precision)
        floor = needed.floor_seconds(*rates[execution.precision])
        ratios = times[execution] / times[PLAIN]
        result.append({
            "network": network,
            "execution": str(execution),
            "ms a step": spread(1e3 * times[execution], 0 if device.type == "cpu" else 2),
            "n": len(times),
            "to plain": "1" if execution == PLAIN else spread(ratios, 2),
            "GFLOP": f"{needed.flops / 1e9:,.0f}",
            "GB": f"{needed.bytes / 1e9:.2f}",
            "floor, ms": f"{1e3 * floor:,.{0 if device.type == 'cpu' else 2}f}",
            "times the floor": f"{times[execution].median() / floor:.1f}",
        })
    return result


def tries(network: str, *, batch: int) -> pd.DataFrame:
    times = timed(tried(network, batch=batch), limit=4 * SECONDS)
    first = times.columns[0]
    return pd.DataFrame([
        {"step": name, "ms": spread(1e3 * times[name]), "to the first": spread(times[name] / times[first], 2),
         "n": len(times)}
        for name in times
    ])  # fmt: skip


def header(device: torch.device, rates: dict, clock: str) -> str:
    about, versions, git = device_info(device), software_versions(), git_state()
    threads = "" if device.type == "cuda" else f", {about['threads']} thread{'s' * (about['threads'] > 1)}"
    lines = [
        f"{datetime.now(timezone.utc):%Y-%m-%d}: {about['name']}{threads}; torch {versions['torch']}, Python "
        f"{versions['python']}, commit {(git['commit'] or 'none')[:12]}. Clock: "
        + ("time of the process on the CPU, since others use it too" if clock == "cpu" else "wall") + "."
    ]
    for precision, (flops, size) in rates.items():
        lines.append(
            f"Ceilings in {precision}: {flops / 1e9:,.0f} GFLOP/s in a matrix product, {size / 1e9:.1f} GB/s in a "
            f"copy, the best of {CEILING_REPEATS}."
        )
    return " ".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="bench.speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--networks", default=",".join(MODELS), metavar="A,B,...", help="of %(default)s")
    add("--batch", type=int, default=PUBLISHED.batch_size, help="images a step (default: %(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default here: %(default)s")
    add("--clock", choices=measure.CLOCKS, default="wall", help="cpu: of this process alone, where others use the CPU")
    add("--compile", action="store_true", help="also through torch.compile")
    add("--tries", action="store_true", help="also what was tried on a CPU")
    add("--out", type=Path, metavar="FILE", help="write it as Markdown")
    given = parser.parse_args(arguments)
    networks = given.networks.split(",")
    if unknown := sorted(set(networks) - set(MODELS)):
        parser.error(f"--networks: got {', '.join(unknown)}, wanted some of {', '.join(MODELS)}")
    device = torch.device(given.device)
    measure.source = measure.CLOCKS[given.clock]

    executions = (PLAIN, *(ON_GPU if device.type == "cuda" else ()), *(COMPILED if given.compile else ()))
    rates = {execution.precision: ceilings(device, execution) for execution in executions if not execution.graph}
    table = []
    for network in networks:
        print(f"{network} ...", file=sys.stderr, flush=True)
        table += rows(network, executions, rates, batch=given.batch, device=device)
    command = " ".join(["python -m bench.speed", *(sys.argv[1:] if arguments is None else arguments)])
    parts = [
        "# Training at the speed of the hardware",
        f"Rerun: `{command}`",
        header(device, rates, given.clock),
        f"A training step of {given.batch} images, augmentation and update included; median and quartiles of n rounds, "
        "in which executions take turns.",
        _markdown(pd.DataFrame(table)),
        "The floor is" + __doc__.partition("The floor is")[2].rstrip(),
    ]
    if given.tries:
        parts += [f"## Tried on this CPU, {networks[0]}", _markdown(tries(networks[0], batch=given.batch))]
    text = "\n\n".join(parts) + "\n"
    print(text)
    if given.out:
        given.out.write_text(text)
    return 0


def _markdown(table: pd.DataFrame) -> str:
    return table.to_markdown(index=False, disable_numparse=True)


if __name__ == "__main__":
    sys.exit(main())
