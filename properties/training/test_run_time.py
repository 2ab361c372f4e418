"""The times of a run: training time excludes all else and adds up over interruptions, and budgets are kept."""

import time

import pytest

from memcnn.models.resnet import MODELS
from memcnn.training.recipe import override
from properties.support.runs import NAME, RECIPE, Slow, curve_of, run, stopped_after

pytestmark = pytest.mark.usefixtures("tiny_runs")


def test_time_adds_up_over_interruptions_and_each_is_counted(tmp_path):
    seconds = []
    for questions in (3, 4):
        with stopped_after(questions):
            record = run(tmp_path)
            seconds.append(record.train_seconds)
    assert (record.iterations, record.interruptions) == (5, 1)
    record = run(tmp_path)
    assert 0 < seconds[0] < seconds[1] < record.train_seconds
    assert record.interruptions == 2
    times = [float(row["train_seconds"]) for row in curve_of(tmp_path / NAME)]
    assert times == sorted(times) and times[-1] == record.train_seconds


def test_a_budget_is_not_exceeded_but_used(tmp_path, monkeypatch):
    monkeypatch.setitem(MODELS, "resnet32", lambda num_classes, *, disable: Slow())
    recipe = override(RECIPE, iterations=1000, evaluate_every=1000)
    started = time.monotonic()
    record = run(tmp_path, recipe=recipe, budget_seconds=3.5)
    assert time.monotonic() - started < 3.5
    assert (record.status, record.reason) == ("partial", "budget exhausted")
    assert 2 <= record.iterations < 70
    assert run(tmp_path, recipe=recipe, budget_seconds=0).iterations == record.iterations


def test_an_evaluation_that_would_exceed_the_budget_is_left_for_the_next_time(tmp_path, monkeypatch):
    monkeypatch.setitem(MODELS, "resnet32", lambda num_classes, *, disable: Slow(evaluation_seconds=0.8))
    started = time.monotonic()
    record = run(tmp_path, budget_seconds=3.3)
    assert time.monotonic() - started < 3.3
    assert (record.iterations, record.test_iteration) == (5, None)
    monkeypatch.setitem(MODELS, "resnet32", lambda num_classes, *, disable: Slow())
    run(tmp_path)
    assert [row["iteration"] for row in curve_of(tmp_path / NAME)] == ["5", "10", "12"]


def test_training_time_excludes_evaluation_and_start(tmp_path, monkeypatch):
    monkeypatch.setitem(MODELS, "resnet32", lambda num_classes, *, disable: Slow(evaluation_seconds=0.2))
    started = time.monotonic()
    record = run(tmp_path)
    elapsed = time.monotonic() - started
    # twelve iterations of 50 ms; nine parts of evaluation of 200 ms, and one more iteration to measure memory
    assert 12 * 0.05 <= record.train_seconds < elapsed - 9 * 0.2 - 0.05
