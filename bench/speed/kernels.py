"""The kernels of a training step, by ``torch.profiler``: how often each runs, and how long. On a CPU, the operators."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Protocol

import pandas as pd
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.speed import text
from bench.speed.steps import Way
from bench.speed.text import KEYS
from bench.tables import markdown
from memcnn.training.files import write_by_rename

FILE, PAGE = "kernels.csv", "kernels.md"
COLUMNS = [*KEYS, "kernel", "calls", "us"]
STEPS = 5
SHOWN = 12
"""Number of kernels of an execution that the page shows."""
LONGEST, WIDTH = 400, 100
"""Longest names in the file and on the page. The names of C++ templates have thousands of characters."""


class NothingRecorded(RuntimeError):
    """The profiler recorded no kernel."""


class Event(Protocol):
    """A row of ``profile.key_averages()``: all calls of one kernel or operator."""

    key: str
    count: int
    device_type: DeviceType
    self_cpu_time_total: float
    self_device_time_total: float


def prepare(device: torch.device) -> None:
    """Start and stop the profiler. Call it before a step is captured.

    A CUDA graph that was captured before the profiler's first start can make the GPU fail or hang when it is replayed
    under the profiler (https://github.com/pytorch/pytorch/issues/75504).
    """
    with _profiler(device):
        pass


def profiled(run: Callable[[int], None], way: Way, device: torch.device) -> pd.DataFrame:
    """Profile a few training steps one by one, and return the kernels of one of them; see ``rows``.

    The number of calls varies. In some uncaptured steps the engine watches for drift, which takes more calls, so the
    step with the fewest calls is returned. Captured steps all make the same calls, but the profiler can lose some, so a
    step with the most frequent number is returned. Of several such steps the shortest is returned.

    Args:
        run: ``run(1)`` runs a training step of each run of the group.
        way: the execution, and the size of the group.
        device: where the steps run.

    Raises:
        NothingRecorded: the profiler recorded no kernel.
    """
    run(1)
    tables = [profiled_step(run, way.group, device) for _ in range(STEPS)]
    counts = pd.Series([table["calls"].sum() for table in tables])
    if not counts.any():
        raise NothingRecorded(f"the profiler recorded no kernel in {STEPS} steps; try again, or leave out --kernels")
    usual = counts.mode().max() if way.execution.graph else counts[counts > 0].min()
    return min((table for table, count in zip(tables, counts, strict=True) if count == usual), key=_microseconds)


def _microseconds(table: pd.DataFrame) -> float:
    return table["us"].sum()


def _profiler(device: torch.device) -> profile:
    activity = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    return profile(activities=[activity], acc_events=True)  # PyTorch 2.11 warns without acc_events


def profiled_step(run: Callable[[int], None], group: int, device: torch.device) -> pd.DataFrame:
    """Profile ``run(1)``, a training step of each of ``group`` runs, and return its kernels; see ``rows``."""
    is_gpu = device.type == "cuda"
    wait = partial(torch.cuda.synchronize, device) if is_gpu else lambda: None
    wait()
    with _profiler(device) as profiler:
        run(1)
        wait()
    return rows(profiler.key_averages(), group, on_gpu=is_gpu)


def rows(events: Iterable[Event], steps: int, *, on_gpu: bool) -> pd.DataFrame:
    """Return a table of the kernels, those that take most time first.

    Args:
        events: all events of the profile; on a GPU, those of the CPU are left out.
        steps: number of training steps in the profile.
        on_gpu: whether the steps ran on a GPU.

    Returns:
        ``kernel``: its name; ``calls``: its calls in a step; ``us``: the microseconds of these calls together, on a CPU
        without the operators that it calls.
    """
    wanted = DeviceType.CUDA if on_gpu else DeviceType.CPU
    found = [
        {
            "kernel": event.key[:LONGEST],
            "calls": event.count / steps,
            "us": (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / steps,
        }
        for event in events
        if event.device_type == wanted
    ]
    table = pd.DataFrame(found, columns=["kernel", "calls", "us"]).groupby("kernel", as_index=False, sort=False).sum()
    return table.sort_values("us", ascending=False, kind="stable", ignore_index=True)


def add(folder: Path, table: pd.DataFrame) -> None:
    """Add rows to kernels.csv, replace earlier rows of the same case, and write kernels.md."""
    text.add_rows(folder / FILE, table, COLUMNS)
    write_by_rename(folder / PAGE, page(text.read_rows(folder / FILE, COLUMNS)).encode())


def page(table: pd.DataFrame) -> str:
    """Return the kernels that take most time as a Markdown page, with a table for each execution."""
    parts = [
        "# Kernels of a training step",
        f"By `python -m bench.speed --kernels`: one of {STEPS} steps; on a CPU operators. "
        f"The time of a kernel is that of all its calls in the step. [{FILE}]({FILE}) has all rows.",
    ]
    for (network, execution, group, batch), rows in table.groupby(KEYS, sort=False):
        together = f", {group} runs together" if group > 1 else ""
        parts += [f"## {network}: {execution}{together}, batch {batch}", markdown(shown(rows))]
    return "\n\n".join(parts) + "\n"


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """Return the kernels of one execution as text: those that take most time, the others together, and the sum."""
    ordered = table.sort_values("us", ascending=False, kind="stable")
    first, others = ordered.iloc[:SHOWN], ordered.iloc[SHOWN:]
    lines = [*zip("`" + first["kernel"].str[:WIDTH] + "`", first["calls"], first["us"], strict=True)]
    if len(others):
        lines.append((f"{len(others)} others", others["calls"].sum(), others["us"].sum()))
    total = table["us"].sum()
    lines.append(("sum", table["calls"].sum(), total))
    return pd.DataFrame(
        {"kernel": kernel, "calls": f"{calls:,.4g}", "us": f"{us:,.0f}", "%": f"{100 * us / total:.0f}"}
        for kernel, calls, us in lines
    )
