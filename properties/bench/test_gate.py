"""The gate passes results that did not become worse, and fails results that did."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from bench import gate, measure
from bench.cases import Chain
from memcnn import AdditiveCoupling
from properties.support import commands
from properties.support.results import MACHINE, measured, row, written

ROOT = Path(__file__).resolve().parents[2]
BASELINE = ROOT / "bench" / "baselines" / "cpu.json"
CASE = Chain("gate", "reversible", 4, 2, 8, 8)
PLAIN = dataclasses.replace(CASE, subject="plain")


def run(base: Path, now: Path, *options: str) -> int:
    return gate.main([str(base), str(now), *options])


def timed(path: Path, pairs: list[tuple[float, float]], **machine) -> Path:
    """Write a result with these repeats of (plain, reversible) seconds, and return its path."""
    rows = [
        row("time", case, seconds, repeat=repeat, **machine)
        for repeat, pair in enumerate(pairs)
        for case, seconds in zip((PLAIN, CASE), pair, strict=True)
    ]
    return written(path, rows)


@pytest.fixture(scope="module")
def rows_now() -> list[dict]:
    return [measured(case) for case in gate.gated()]


def test_memory_and_evaluations_are_those_of_the_baseline(rows_now, tmp_path, capsys):
    base = json.loads(BASELINE.read_text("utf-8"))["benchmarks"][0]["extra_info"]["software"]["torch"]
    if base.partition("+")[0] != torch.__version__.partition("+")[0]:
        pytest.skip(
            f"the baseline is that of torch {base}: python -m bench -k gate, then "
            "python -m bench.gate bench/baselines/cpu.json FILE.json --save"
        )
    assert run(BASELINE, written(tmp_path / "now.json", rows_now)) == 0, capsys.readouterr().out
    assert "missing" not in (text := capsys.readouterr().out) and "48 figures of 16 cases" in text


def test_a_planted_growth_of_memory_by_5_percent_fails(rows_now, tmp_path, monkeypatch, capsys):
    """The planted fault: each of four blocks holds a tensor of 1.25 % of the peak during the step."""
    base = written(tmp_path / "base.json", rows_now)
    peak = measure.memory(CASE, torch.device("cpu"))["peak_bytes"]
    forward = AdditiveCoupling.couple

    def hoarding(self, x1, x2):
        if not hasattr(self, "hoard"):
            self.hoard = None
        self.hoard = torch.empty(int(peak * 0.05 / 4), dtype=torch.uint8)  # in each of the four blocks
        return forward(self, x1, x2)

    monkeypatch.setattr(AdditiveCoupling, "couple", hoarding)
    now = written(tmp_path / "now.json", [measured(CASE)])
    assert run(base, now, "--fail", "peak_bytes:1%") == 1
    text = capsys.readouterr().out
    assert f"FAIL {CASE}: peak_bytes {peak:,} -> " in text and "(+5.0" in text and "limit +1 %" in text
    assert run(base, now, "--fail", "peak_bytes:6%", "--allow-missing", "*") == 0


def test_a_planted_extra_recomputation_fails(rows_now, tmp_path, monkeypatch, capsys):
    base = written(tmp_path / "base.json", rows_now)
    couple = AdditiveCoupling.couple

    def twice(self, x1, x2):
        with torch.no_grad():
            self.Fm(x2)
        return couple(self, x1, x2)

    monkeypatch.setattr(AdditiveCoupling, "couple", twice)
    now = written(tmp_path / "now.json", [measured(CASE)])
    assert run(base, now) == 1
    assert f"FAIL {CASE}: evaluations 16 -> 20 (+25.00 %, limit +0 %)" in capsys.readouterr().out


OTHER = dataclasses.replace(CASE, depth=5)


def test_a_missing_case_fails_unless_it_is_allowed(tmp_path, capsys):
    """A renamed case counts as a missing case and a new one."""
    base, now = (
        written(tmp_path / name, [row("memory", case, peak_bytes=1) for case in cases])
        for name, cases in (("base", (CASE, PLAIN)), ("now", (OTHER, PLAIN)))
    )
    assert run(base, now, "--fail", "peak_bytes:1%") == 1
    text = capsys.readouterr().out
    assert f"FAIL {CASE}: missing in NOW" in text and f"new in NOW (1): {OTHER}" in text
    for pattern in (str(CASE), "gate-*-reversible", "*"):
        assert run(base, now, "--fail", "peak_bytes:1%", "--allow-missing", pattern) == 0
        assert f"missing in NOW, as allowed (1): {CASE}" in capsys.readouterr().out
    assert run(base, now, "--fail", "peak_bytes:1%", "--allow-missing", "*-plain") == 1
    assert "note: --allow-missing '*-plain' names no missing case" in capsys.readouterr().out


def test_a_case_that_lost_a_figure_fails(tmp_path, capsys):
    base = written(tmp_path / "base", [row("memory", case, peak_bytes=1, evaluations=2) for case in (CASE, PLAIN)])
    now = written(
        tmp_path / "now",
        [row("memory", CASE, peak_bytes=1, evaluations=None), row("memory", PLAIN, peak_bytes=1, evaluations=2)],
    )
    assert run(base, now, "--fail", "peak_bytes:1%", "--fail", "evaluations:0%") == 1
    assert f"FAIL {CASE}: missing in NOW" in capsys.readouterr().out


@pytest.mark.parametrize("metric", ["ratio", "median"])
def test_a_case_without_time_fails(metric, tmp_path, capsys):
    gone = dataclasses.replace(CASE, subject="checkpoint")
    seconds = [row("time", case, 1.0, repeat=0) for case in (PLAIN, CASE, gone)]
    base, now = written(tmp_path / "base", seconds), written(tmp_path / "now", seconds[:2])
    assert run(base, now, "--fail", f"{metric}:10%") == 1
    assert f"FAIL {gone}: missing in NOW" in capsys.readouterr().out


def test_all_cases_renamed_fails(tmp_path):
    base, now = (written(tmp_path / str(case), [row("memory", case, peak_bytes=1)]) for case in (CASE, OTHER))
    assert run(base, now, "--fail", "peak_bytes:1%") == 1


def test_a_slower_ratio_fails_also_on_a_machine_that_is_twice_as_fast(tmp_path, capsys):
    base = timed(tmp_path / "base", [(1.0, 1.3), (1.1, 1.43), (2.0, 2.6)])
    now = timed(
        tmp_path / "now",
        [(0.5, 0.75), (0.55, 0.825), (1.0, 1.5)],
        device={**MACHINE["device"], "name": "another processor"},
    )
    assert run(base, now, "--fail", "median:10%") == 1
    text = capsys.readouterr().out
    assert f"FAIL {CASE}: median/plain 1.3 -> 1.5 (+15.38 %" in text
    assert "another processor" in text and "so median is compared as the ratio to plain autograd" in text
    assert run(base, now, "--fail", "ratio:20%") == 0


def test_seconds_are_compared_only_on_equal_machines(tmp_path, capsys):
    base = timed(tmp_path / "base", [(1.0, 1.3)] * 3)
    assert run(base, timed(tmp_path / "now", [(2.0, 2.6)] * 3), "--fail", "median:10%") == 1
    text = capsys.readouterr().out
    assert f"FAIL {CASE}: median 1.3 -> 2.6" in text and "so median is compared" not in text
    other = timed(tmp_path / "other", [(2.0, 2.6)] * 3, device={**MACHINE["device"], "threads": 2})
    assert run(base, other, "--fail", "median:10%") == 0


def test_time_within_the_spread_is_reported_and_does_not_fail(tmp_path, capsys):
    base = timed(tmp_path / "base", [(1.0, 1.2), (1.0, 1.3), (1.0, 1.9)])
    now = timed(tmp_path / "now", [(1.0, 1.25), (1.0, 1.5), (1.0, 1.6)])
    assert run(base, now, "--fail", "ratio:10%") == 0
    assert "held" in (text := capsys.readouterr().out) and "within the spread" in text


def test_bytes_of_different_kinds_of_device_are_misuse(tmp_path, capsys):
    base = written(tmp_path / "base", [row("memory", CASE, peak_bytes=1)])
    now = written(tmp_path / "now", [row("memory", CASE, peak_bytes=1, device={**MACHINE["device"], "type": "cuda"})])
    assert run(base, now, "--fail", "peak_bytes:1%") == 2
    assert "BASE ran on cpu, NOW on cuda" in capsys.readouterr().err


def test_a_saved_baseline_holds_what_is_exact_and_compares_with_the_run_it_came_from(rows_now, tmp_path):
    now, base = written(tmp_path / "now", [*rows_now, row("time", CASE, repeat=0)]), tmp_path / "base"
    assert run(base, now, "--save") == 0
    assert run(base, now) == 0 and "time" not in base.read_text() and "allocated_bytes" not in base.read_text()


def test_it_runs_as_a_script():
    done = commands.run("bench/gate.py", BASELINE, BASELINE)
    assert done.returncode == 0 and "0 failed" in done.stdout, done.stderr
