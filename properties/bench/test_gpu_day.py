"""Tests of ``bench.gpu_day``: it runs all stages, even after one has failed or exceeded its limit."""

import time

import pytest
import torch

from bench import folders, gpu_day, measured_memory
from bench.gpu_day import KINDS, Stage
from bench.speed.__main__ import build_parser as speed_parser
from memcnn.models.resnet import MODELS

SLEEP = ("-n1", "-r1", "import time; time.sleep(60)")
ENVIRONMENT = {
    "device": {"type": "cuda", "name": "NVIDIA H200"},
    "software": {"torch": "2.11.0", "cuda": "13.0", "cudnn": "9", "python": "3.12.3"},
    "commit": "0" * 40,
    "clean": True,
}


@pytest.fixture
def a_gpu(monkeypatch):
    """Let the command find a GPU."""
    monkeypatch.setattr(folders, "choose_device", torch.device)
    monkeypatch.setattr(folders, "environment", lambda device, clock: ENVIRONMENT)


def test_a_stage_that_fails_or_hangs_does_not_keep_the_others_from_running(a_gpu, tmp_path, monkeypatch, capsys):
    planned = [
        Stage("tests", "good", "platform", (), 60),
        Stage("speed", "bad", "json.tool", ("/nowhere.json",), 60),
        Stage("memory", "endless", "timeit", SLEEP, 1.5),
        Stage("suites", "last", "platform", (), 60),
    ]
    monkeypatch.setattr(gpu_day, "stages", lambda folder, device, group: planned)
    started = time.monotonic()
    assert gpu_day.main(["--out", str(tmp_path)]) == 1
    assert time.monotonic() - started < 30
    text = (tmp_path / "gpu-day.md").read_text()
    outcomes = [line.split("|")[3].strip() for line in text.splitlines() if "`python -m" in line]
    assert outcomes == ["done", "failed (status 2)", "over its limit", "done"]
    assert "NVIDIA H200; torch 2.11.0, CUDA 13.0, cuDNN 9, Python 3.12.3, commit 000000000000. Clock: wall." in text
    log = (tmp_path / "cuda-tests.txt").read_text().splitlines()
    assert log[0] == "python -m platform" and len(log) == 2
    assert "/nowhere.json" in capsys.readouterr().out


def test_the_budget_ends_the_running_stage_and_starts_no_other(a_gpu, tmp_path, monkeypatch):
    planned = [Stage("speed", "endless", "timeit", SLEEP, 60), Stage("suites", "late", "platform", (), 60)]
    monkeypatch.setattr(gpu_day, "stages", lambda folder, device, group: planned)
    assert gpu_day.main(["--out", str(tmp_path), "--budget", "3s"]) == 1
    text = (tmp_path / "gpu-day.md").read_text()
    assert "| over its limit |" in text and "| late | 0 | not started: the budget is used up |" in text


def test_the_stages_are_commands_that_their_programs_understand(tmp_path):
    found = gpu_day.stages(tmp_path, "cuda:1", 4)
    assert list(dict.fromkeys(stage.kind for stage in found)) == list(KINDS)
    assert f"together they allow {sum(stage.limit_seconds for stage in found) / 60:.0f} minutes" in gpu_day.__doc__
    parsed = [speed_parser().parse_args(stage.arguments) for stage in found if stage.kind == "speed"]
    assert [given.networks for given in parsed] == [[name] for name in MODELS]
    assert all(given.fast and given.group == 4 and given.out == tmp_path for given in parsed)
    (memory,) = [stage for stage in found if stage.kind == "memory"]
    with pytest.raises(SystemExit):  # the options are valid, but there is no such GPU
        measured_memory.main(list(memory.arguments))
