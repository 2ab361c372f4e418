"""Tests of the command ``python -m bench``: its measurements, report, budget and interruption."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from bench import folders, result
from properties.devices import needs_cuda
from properties.support import commands


def environment(threads: int) -> dict[str, str]:
    """Return an environment without pytest-xdist's variables, because a worker of xdist switches benchmarks off."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    return {**inherited, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}


def run_bench(*arguments: str | Path, threads: int = 1) -> subprocess.CompletedProcess[str]:
    """Run ``python -m bench`` in the repository, with OMP_NUM_THREADS set to ``threads``."""
    return commands.run("-m", "bench", *arguments, env=environment(threads))


def test_the_command_line_measures_and_summarises(tmp_path):
    done = run_bench(
        "--quick",
        "--device=cpu",
        "--threads=1",
        "--out",
        tmp_path,
        "-k",
        "depth-depth4 and (plain or reversible) or mode-depth2 and plain",
        threads=2,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SKIPPED" in done.stdout and "add --modes" in done.stdout
    (path,) = tmp_path.glob("*.json")
    results = result.load(path)
    memory = results[results.group == "memory"]
    assert list(memory.subject) == ["plain", "reversible"] and set(memory.depth) == {4}
    assert memory.activation_bytes.iloc[1] < memory.activation_bytes.iloc[0] / 3
    times = results[results.group == "time"]
    assert list(times.subject) == ["plain", "reversible", *["reversible", "plain"] * 2] and times.load.notna().all()
    assert {device["threads"] for device in results.device} == {1}
    assert "Peak activation memory against depth" in done.stdout and str(path) in done.stdout


@needs_cuda
def test_on_cuda_the_command_line_measures_time_and_memory(tmp_path):
    done = run_bench(
        "--quick",
        "--device=cuda",
        "--out",
        tmp_path,
        "-k",
        "depth-depth4 and (plain or reversible)",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*.json")
    results = result.load(path)
    memory, times = (results[results.group == group] for group in ("memory", "time"))
    assert list(memory.subject) == ["plain", "reversible"] and set(times.subject) == {"plain", "reversible"}
    assert memory.activation_bytes.iloc[1] < memory.activation_bytes.iloc[0] / 2
    assert (memory.peak_bytes <= memory.allocated_bytes).all()


def run_narrowed(folder: Path, budget: str) -> subprocess.CompletedProcess[str]:
    """Run the seven cases of the gate at depth 4 within a budget, with a report."""
    chosen = ["-k", "gate-depth4", "--budget", budget]
    return run_bench("--quick", "--device=cpu", *chosen, "--out", folder, "--report", folder / "report")


def test_no_case_is_begun_after_the_budget(tmp_path):
    done = run_narrowed(tmp_path, budget="0")
    assert "the budget is used up" in done.stdout and "7 skipped" in done.stdout, done.stderr
    assert done.returncode == 0 and not (tmp_path / "report").exists()


def test_a_run_of_some_cases_writes_a_report_only_on_request(tmp_path):
    done = run_narrowed(tmp_path, budget="9m")
    assert done.returncode == 0, done.stderr
    found = folders.read_environment(tmp_path / "report")
    assert found["device"]["type"] == "cpu" and found["device"]["clock"] == "wall" and found["commit"]
    assert len((tmp_path / "report" / "measurements.csv").read_text().splitlines()) == 1 + 7


def test_ctrl_c_keeps_what_has_been_measured(tmp_path):
    # both suites, so that enough is left to measure when the first interrupt is ignored; with -k no report is written
    command = ["-m", "bench", "--quick", "--device=cpu", "--out", tmp_path, "-k", "test_memory or test_time"]
    output = tmp_path / "output"
    process = commands.start(*command, env=environment(1), output=output, errors=os.devnull)
    while process.exitcode is None:
        # repeated while it still measures: Python ignores an interrupt in the callback of a weak reference
        if output.exists() and "PASSED" in output.read_text("utf-8"):
            os.kill(process.pid, signal.SIGINT)
            process.join(20)  # a second interrupt must not meet the table that the command prints at its end
        time.sleep(0.05)
    assert process.exitcode == pytest.ExitCode.INTERRUPTED
    (path,) = tmp_path.glob("*.json")
    assert len(result.load(path)) >= 1


def test_without_pytest_benchmark_the_suites_say_what_is_missing():
    done = commands.run("-m", "pytest", "bench", "-p", "no:benchmark", "-p", "no:cacheprovider", env=environment(1))
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "ERROR: the suites in bench need pytest-benchmark" in done.stderr and "Traceback" not in done.stderr
