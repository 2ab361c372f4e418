"""Benchmark results in the format of pytest-benchmark, invented or measured in this process."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from bench import measure

MACHINE = {
    "device": {"type": "cpu", "name": "a processor", "threads": 1, "cores": 2, "clock": "wall"},
    "software": {"torch": torch.__version__, "python": "3.11.7", "memcnn": "2.0.0"},
    "commit": None,
    "clean": None,
    "load": 0.5,
}


def row(group: str, case, seconds: float = 1.0, **more) -> dict:
    """Return one measurement of a case of ``bench``."""
    return {"group": group, "stats": {"median": seconds, "rounds": 1}, "extra_info": {**case.info(), **MACHINE, **more}}


def measured(case) -> dict:
    """Measure memory and evaluations of a case in this process."""
    cpu = torch.device("cpu")
    return row("memory", case, **measure.memory(case, cpu), **measure.evaluations(case, cpu))


def written(path: Path, rows: Sequence[dict]) -> Path:
    """Write results to a file, and return its path."""
    path.write_text(json.dumps({"benchmarks": list(rows)}))
    return path
