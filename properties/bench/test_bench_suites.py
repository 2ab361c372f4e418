"""The benchmark compares equal work, and its summary says what was measured."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from bench import summary
from bench.cases import SUBJECTS, Case
from memcnn.testing.memory import measure_step_memory

ROOT = Path(__file__).resolve().parents[2]


def small(subject: str, depth: int) -> Case:
    return Case(depth, subject, batch=2, channels=4, side=6)


def gradients(subject: str) -> list[torch.Tensor]:
    case = small(subject, 3)
    model = case.model("cpu")
    case.step(model, "cpu")()
    return [parameter.grad for parameter in model.parameters()]


@pytest.fixture
def in_float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("subject", ["checkpoint", "reversible"])
def test_every_subject_computes_the_gradients_of_plain(subject, in_float64):
    for ours, plain in zip(gradients(subject), gradients("plain"), strict=True):
        torch.testing.assert_close(ours, plain)


def test_the_subjects_store_what_their_names_say():
    def added_bytes(subject):
        """By eight further blocks."""
        peaks = []
        for depth in (4, 12):
            model = small(subject, depth).model("cpu")
            peaks.append(measure_step_memory(model, small(subject, depth).step(model, "cpu")).activation_bytes)
        return peaks[1] - peaks[0]

    x_bytes = 2 * 4 * 6 * 6 * 4
    assert added_bytes("checkpoint") == 8 * x_bytes
    assert added_bytes("reversible") < x_bytes
    assert added_bytes("plain") > 16 * x_bytes


def benchmark(group: str, seconds: float = 0.0, **extra_info) -> dict:
    environment = {
        "batch": 2, "channels": 4, "side": 6, "commit": None, "clean": None,
        "device": {"type": "cpu", "name": "a processor", "threads": 1},
        "software": {"torch": "2.13.0", "python": "3.11.7", "memcnn": "2.0.0"},
    }  # fmt: skip
    stats = {"median": seconds, "rounds": 3}
    return {"group": group, "stats": stats, "extra_info": {"depth": 4, "repeat": 0, **environment, **extra_info}}


def loaded(tmp_path: Path, *benchmarks: dict) -> pd.DataFrame:
    path = tmp_path / "result.json"
    path.write_text(json.dumps({"benchmarks": benchmarks}))
    return summary.load(path)


def test_a_ratio_is_taken_within_a_repeat_so_that_a_slowing_machine_does_not_distort_it(tmp_path):
    pairs = [(1.0, 1.5), (2.0, 2.4), (4.0, 8.0)]
    rows = [
        benchmark("time", seconds, subject=subject, repeat=repeat)
        for repeat, pair in enumerate(pairs)
        for subject, seconds in zip(("plain", "reversible"), pair, strict=True)
    ]
    table = summary.time_table(loaded(tmp_path, *rows))
    assert table.loc[(4, "reversible")].to_dict() == pytest.approx(
        {"median ms": 2400, "repeats": 3, "ratio to plain": 1.5, "lowest": 1.2, "highest": 2.0}
    )


def test_memory_is_told_in_mebibytes_with_the_subjects_in_their_order(tmp_path):
    rows = [
        benchmark("memory", subject=s, depth=d, activation_bytes=b * 2**20, tensor_activation_bytes=1)
        for s, d, b in [("plain", 16, 4), ("plain", 4, 1), ("checkpoint", 16, 3), ("checkpoint", 4, 2)]
    ]
    table = summary.memory_table(loaded(tmp_path, *rows))
    assert table.to_dict("split") == {
        "index": ["plain", "checkpoint"], "columns": [4, 16], "data": [[1.0, 4.0], [2.0, 3.0]],
    }  # fmt: skip


def test_a_narrowed_run_without_plain_has_no_ratio(tmp_path):
    text = summary.render(loaded(tmp_path, benchmark("time", 0.2, subject="reversible")))
    assert "| reversible |       200.0 |         1 |              nan |" in text
    assert "a processor (cpu, 1 threads), torch 2.13.0" in text
    assert "Memory" not in text


def test_the_command_line_measures_and_summarises(tmp_path):
    command = [sys.executable, "-m", "bench", "--quick", "--device=cpu", "-k", "memory and depth4", "--out", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*.json")
    results = summary.load(path)
    assert list(results.subject) == list(SUBJECTS) and set(results.depth) == {4}
    peaks = results.set_index("subject").activation_bytes
    assert peaks["reversible"] < peaks["checkpoint"] < peaks["plain"]
    assert (results.peak_bytes > results.activation_bytes).all()
    assert "Memory against depth" in done.stdout and str(path) in done.stdout
