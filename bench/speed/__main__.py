"""Measure the milliseconds of a training step of the six networks, and print them beside the floor of the device.

    python -m bench.speed                                      all six, batch 100
    python -m bench.speed --fast --group 4                     the fastest execution, alone and four runs together
    python -m bench.speed --networks resnet32 --compile        with torch.compile, which takes minutes to compile
    python -m bench.speed --tries                              on a CPU: also NCHW, unfused SGD, bfloat16, compiled
    python -m bench.speed --fast --tries                       on a GPU: the fastest, and options that may be faster
    python -m bench.speed --networks revnet38 --kernels        also the kernels of a step, by time

The rows go to speed.csv in the device's folder, where they replace earlier rows of the same network, execution, group
and batch. speed.md shows all rows of that file.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import pandas as pd
import torch

from bench import folders, measure
from bench.networks import add_networks_option
from bench.speed import floor, kernels, steps, text, timing
from bench.speed.steps import PLAIN, Way
from memcnn import cli
from memcnn.training.files import write_by_rename
from memcnn.training.options import count
from memcnn.training.recipe import PUBLISHED


@dataclass(frozen=True)
class Setup:
    """The conditions of a measurement.

    Attributes:
        device: where the steps run.
        batch: images a step.
        rates: precision -> (operations a second, bytes a second) that the device reaches.
        origin: the columns of speed.csv that name device, software, commit and date.
        limit: seconds for each network, after which no further round begins.
    """

    device: torch.device
    batch: int
    rates: dict[str, tuple[float, float]]
    origin: dict
    limit: float = timing.SECONDS


Functions = dict[Way, Callable[[int], None]]  # each runs a given number of training steps


def measured_rows(network: str, functions: Functions, setup: Setup) -> pd.DataFrame:
    """Time a network's training step for each of ``functions``, and return a row of speed.csv for each."""
    ways = list(functions)
    times, counts = timing.timed(functions, setup.device, setup.limit)
    rows = []
    for way in ways:
        each = times[way] / way.group
        needed = floor.work(network, batch=setup.batch, precision=way.execution.precision)
        flops, size = setup.rates[way.execution.precision]
        ratios = each / times[PLAIN] if PLAIN in times else pd.Series(dtype=float)
        rows.append({
            "network": network, "execution": str(way.execution), "group": way.group, "batch": setup.batch,
            **_quartiles("ms", 1e3 * each), "rounds": len(times), "steps": counts[way],
            **_quartiles("to_plain", ratios), "gflop": needed.flops / 1e9, "gb": needed.bytes / 1e9,
            "floor_ms": 1e3 * needed.floor_seconds(flops, size), "gflop_per_second": flops / 1e9,
            "gb_per_second": size / 1e9, **setup.origin,
        })  # fmt: skip
    return pd.DataFrame(rows)


def kernel_rows(network: str, functions: Functions, setup: Setup) -> pd.DataFrame:
    """Profile a network's training step for each of ``functions``, and return rows of kernels.csv."""
    tables = [
        kernels.profiled(run, way, setup.device).assign(
            network=network, execution=str(way.execution), group=way.group, batch=setup.batch
        )
        for way, run in functions.items()
    ]
    return pd.concat(tables, ignore_index=True)


def _quartiles(name: str, values: pd.Series) -> dict:
    low, middle, high = values.quantile([0.25, 0.5, 0.75])
    return {name: middle, f"{name}_low": low, f"{name}_high": high}


def variants_table(network: str, setup: Setup) -> pd.DataFrame:
    """Time the variants of the step on a CPU, and return their table as text."""
    functions = steps.cpu_variants(network, batch=setup.batch)
    times, _ = timing.timed(functions, setup.device, limit=4 * timing.SECONDS)
    first = times.columns[0]
    return pd.DataFrame([
        {"network": network, "step": name, "ms": _spread(1e3 * times[name]),
         "to the first": _spread(times[name] / times[first], 2), "n": len(times)}
        for name in times
    ])  # fmt: skip


def _spread(values: pd.Series, digits: int = 0) -> str:
    """Return median and quartiles as text."""
    low, middle, high = values.quantile([0.25, 0.5, 0.75])
    return text.interval(middle, low, high, digits)


def origin(device: torch.device, clock: str) -> dict:
    """Return the columns of speed.csv that name device, software, commit and date."""
    found = folders.environment(device, clock)
    about, software = found["device"], found["software"]
    return {
        "device_type": about["type"], "device": about["name"], "threads": about["threads"], "clock": clock,
        **{name: software.get(name) for name in ("torch", "cuda", "cudnn", "python")},
        "commit": found["commit"], "clean": found["clean"], "date": f"{datetime.now(timezone.utc):%Y-%m-%d}",
    }  # fmt: skip


def ways_of(given: argparse.Namespace, device: torch.device) -> list[Way]:
    """Return the executions and groups that the command line asks for."""
    if given.fast:
        return steps.fast_ways(device, group=given.group, tries=given.tries)
    return steps.all_ways(device, group=given.group, compiled=given.compile)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = cli.parser_from("bench.speed", f"{__doc__}\n{floor.EXPLANATION}", whole=True)
    add = parser.add_argument
    add_networks_option(parser)
    add("--batch", type=count, default=PUBLISHED.batch_size, help="images a step (default: %(default)s)")
    clock = "cpu counts this process's CPU time only: use it where other processes share the CPU (default: %(default)s)"
    add("--clock", choices=measure.CLOCKS, default="wall", help=clock)
    fast = "only the device's fastest execution, the same without our kernels, and the fastest deterministic one"
    add("--fast", action="store_true", help=fast)
    group = "on a GPU, also interleave the steps of N runs, each captured on its own stream"
    add("--group", type=count, default=1, metavar="N", help=group)
    add("--compile", action="store_true", help="also run torch.compile without a CUDA graph")
    add(
        "--seconds",
        type=cli.seconds,
        default=timing.SECONDS,
        metavar="S",
        help="time for each network (default: %(default)s)",
    )
    tries = (
        "on a CPU, also time the contiguous layout, unfused SGD, bfloat16 and torch.compile; on a GPU with --fast, "
        "compare the fastest execution with options that may be faster, instead of the other two"
    )
    add("--tries", action="store_true", help=tries)
    kernels_help = "also profile the steps: kernels.csv has calls and time of each kernel, kernels.md the largest"
    add("--kernels", action="store_true", help=kernels_help)
    folders.add_place_options(parser, "speed.csv and speed.md")
    return parser


@cli.command("bench.speed")
def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the executions, write speed.csv and speed.md, print the page; return the exit status.

    It is 1 if ``--kernels`` recorded nothing for a network, whose times are written all the same.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces every start and stop
    parser = build_parser()
    given = parser.parse_args(arguments)
    device, folder = folders.place_of(parser, given)
    try:
        text.read(folder)  # report files that cannot be extended before measuring anything
        if given.kernels:
            text.read_rows(folder / kernels.FILE, kernels.COLUMNS)
    except ValueError as error:
        parser.error(str(error))
    ways = ways_of(given, device)
    if given.group > 1 and all(way.group == 1 for way in ways):
        parser.error(f"--group: got {given.group} on {device.type}, wanted a GPU, where steps are captured")
    if given.tries and device.type != "cpu" and not given.fast:
        parser.error(
            f"--tries: got it without --fast on {device.type}, wanted --fast, whose execution the tries extend"
        )
    measure.source = measure.CLOCKS[given.clock]

    command = " ".join(["python -m bench.speed", *(sys.argv[1:] if arguments is None else arguments)])
    executions = {way.execution.precision: way.execution for way in ways}
    rates = {precision: floor.ceilings(device, execution) for precision, execution in executions.items()}
    setup = Setup(device, given.batch, rates, origin(device, given.clock), given.seconds)
    complete = True
    if given.kernels:
        kernels.prepare(device)
    for network in given.networks:
        print(f"{network} ...", file=sys.stderr, flush=True)
        functions = {way: steps.step_of(network, way, batch=setup.batch, device=device) for way in ways}
        text.add(folder, measured_rows(network, functions, setup))  # written now, in case a later network fails
        page = _write_page(folder, command)
        if given.kernels:
            complete &= _add_kernels(folder, network, functions, setup)
        del functions  # frees its models and graphs before the next network's are made
    if given.tries and device.type == "cpu":
        variants_table(given.networks[0], setup).to_csv(folder / text.TRIES, index=False)
        page = _write_page(folder, command)
    print(page)
    if given.kernels and complete:
        print((folder / kernels.PAGE).read_text())
    return 0 if complete else 1


def _add_kernels(folder: Path, network: str, functions: Functions, setup: Setup) -> bool:
    """Profile a network's steps and write their kernels. If the profiler records nothing, report it; return False."""
    try:
        kernels.add(folder, kernel_rows(network, functions, setup))
    except kernels.NothingRecorded as error:
        print(f"{network}: {error}", file=sys.stderr, flush=True)
        return False
    return True


def _write_page(folder: Path, command: str) -> str:
    """Write speed.md from the folder's data, and return it."""
    file = folder / text.TRIES
    variants = pd.read_csv(file, dtype=str) if file.is_file() else None
    page = text.page(text.read(folder), command, floor.EXPLANATION, variants)
    write_by_rename(folder / text.PAGE, page.encode())
    return page


if __name__ == "__main__":
    sys.exit(main())
