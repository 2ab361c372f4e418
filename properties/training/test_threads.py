"""Training warns if several CPU threads are slower than one."""

import pytest
import torch

from memcnn.training import threads, trainer
from properties.support.runs import run


@pytest.fixture
def four_threads(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)


def test_the_warning_names_both_times_and_the_fix(four_threads):
    text = threads.warning(100, measure=lambda batch, count: {4: 0.5, 1: 0.02}[count])
    assert "takes 500 ms, and 20 ms with one thread" in text
    assert "--threads 1" in text and "OMP_NUM_THREADS=1" in text


@pytest.mark.parametrize("several", [0.005, 0.02, 0.029])
def test_threads_that_are_faster_or_hardly_slower_are_not_reported(four_threads, several):
    assert threads.warning(100, measure=lambda batch, count: several if count == 4 else 0.02) is None


def test_one_thread_is_not_measured(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert threads.warning(100, measure=None) is None


def test_the_measurement_leaves_threads_and_generator_as_they_were():
    before, state = torch.get_num_threads(), torch.get_rng_state()
    assert threads.branch_seconds(2, 2) > 0
    assert torch.get_num_threads() == before and torch.equal(torch.get_rng_state(), state)


@pytest.mark.usefixtures("tiny_runs")
def test_training_prints_the_warning_before_it_begins(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trainer.threads, "warning", lambda batch: f"slow at batch {batch}")
    run(tmp_path, progress=True)
    assert "Warning: slow at batch 8." in capsys.readouterr().err
