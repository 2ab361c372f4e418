"""Tests of ``bench.compare``: it measures two commits in alternation, each with its own memcnn."""

import os
import shutil
from pathlib import Path

import pytest

from bench import compare
from bench.worker import Failed
from memcnn.cli import Misuse
from properties.support import commands

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(shutil.which("git") is None or not (ROOT / ".git").exists(), reason="needs a checkout: clone it")
def test_a_commit_is_compared_with_the_working_tree():
    arguments = "HEAD . --rounds=1 --device=cpu -k tiny-depth32-2x4x4-eager-rev".split()
    done = commands.run("-m", "bench.compare", *arguments, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "B is working tree" in done.stdout
    assert "tiny-depth32-2x4x4-eager-reversible" in done.stdout and "128, the same" in done.stdout


class Scripted:
    """A worker with prepared answers; it fails if ``exact`` holds no numbers."""

    def __init__(self, seconds: list[float], log: list, **exact):
        self.seconds, self.log, self.exact = iter(seconds), log, exact

    def ask(self, question: str, case: str, device: str) -> dict:
        if question == "seconds":
            self.log.append(self)
            return {"seconds": next(self.seconds)}
        if not self.exact:
            raise Failed("B: KeyError: 'x'")
        return self.exact


def test_the_sides_alternate_and_ratios_are_taken_within_a_round():
    log = []
    a = Scripted([9.0, 1.0, 2.0, 4.0], log, peak_bytes=1000, evaluations=4)
    b = Scripted([9.0, 1.1, 2.4, 4.4], log, peak_bytes=1050, evaluations=4)
    row = compare.compared([a, b], "case", 3, "cpu")
    assert row["time B / A"] == "1.100 [1.100, 1.150]" and row["n"] == 3
    assert row["peak_bytes"] == "1,000 -> 1,050 (+5.00 %)" and row["evaluations"] == "4, the same"
    assert log == [a, b, b, a, a, b, b, a]


def test_a_side_that_fails_is_reported_and_not_timed():
    log = []
    a, b = Scripted([1.0] * 9, log, peak_bytes=1, evaluations=1), Scripted([1.0] * 9, log)
    assert compare.compared([a, b], "case", 3, "cpu")["time B / A"] == "failed: B: KeyError: 'x'"
    assert log == []


def test_an_unknown_commit_is_refused(tmp_path):
    with pytest.raises(Misuse, match="got 'no-such-commit', which names no commit of .*; wanted a hash, a branch"):
        compare.unpack("no-such-commit", tmp_path)
