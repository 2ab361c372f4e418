"""A run that is stopped, or killed, and taken up again ends with the bits of one that was not."""

import os
import signal
import time

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from memcnn.models.resnet import MODELS
from memcnn.training import checkpoint
from memcnn.training.recipe import override
from memcnn.training.record import RunRecord, load
from memcnn.training.stopping import Stop
from properties.training.runs import NAME, RECIPE, Slow, checkpoint_of, curve_of, run, scalars, tiny, without

pytestmark = pytest.mark.usefixtures("tiny_runs")


class Killed(BaseException):
    """In place of a kill: nothing is saved after it."""


def run_in_parts(runs, parts: list[tuple[int, str]]) -> RunRecord:
    """A run ended as often as `parts` says, then finished.

    Part (n, how) is ended after it has asked n times whether to stop: by a "stop", by a "kill", or by a
    "kill in saving" the next checkpoint.
    """
    for questions, how in [*parts, (10**9, "stop")]:
        asked, save = iter(range(questions)), checkpoint.save

        def reason(self, *, needed_seconds, asked=asked, how=how):
            if next(asked, None) is not None or how == "kill in saving":
                return None
            if how == "kill":
                raise Killed
            return "interrupted"

        def save_or_die(*arguments, asked=asked, how=how, save=save):
            if how == "kill in saving" and next(asked, None) is None:
                raise Killed
            save(*arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Stop, "reason", reason)
            patch.setattr(checkpoint, "save", save_or_die)
            try:
                record = run(runs)
            except Killed:
                continue
            if record.status == "complete":
                return record
            assert record.reason == "interrupted"
            assert record == load(runs / NAME)
            assert record.iterations == checkpoint_of(runs / NAME)["iteration"]
    raise AssertionError("the run never ended")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, tiny_runs):
    runs = tmp_path_factory.mktemp("uninterrupted")
    return runs, run(runs)


@given(
    parts=st.lists(
        st.tuples(st.integers(0, 21), st.sampled_from(["stop", "kill", "kill in saving"])), min_size=1, max_size=4
    )
)
@example(parts=[(2, "stop"), (5, "kill in saving"), (1, "stop"), (0, "kill")])
@example(parts=[(5, "stop"), (0, "kill in saving")])  # stopped just before an evaluation, killed just after it
def test_resuming_gives_the_same_bits(tmp_path_factory, uninterrupted, parts):
    runs = tmp_path_factory.mktemp("in-parts")
    expected_runs, expected_record = uninterrupted
    record = run_in_parts(runs, parts)

    state, expected = checkpoint_of(runs / NAME), checkpoint_of(expected_runs / NAME)
    torch.testing.assert_close(state["model"], expected["model"], rtol=0, atol=0)
    torch.testing.assert_close(state["optimizer"], expected["optimizer"], rtol=0, atol=0)
    rows, expected_rows = curve_of(runs / NAME), curve_of(expected_runs / NAME)
    assert [without(row, "train_seconds") for row in rows] == [without(row, "train_seconds") for row in expected_rows]
    assert [int(row["iteration"]) for row in rows] == [5, 10, 12]
    of_the_session = ("train_seconds", "interruptions", "commit", "clean", "segments")
    assert without(vars(record), *of_the_session) == without(vars(expected_record), *of_the_session)
    assert scalars(runs / NAME) == scalars(expected_runs / NAME)
    assert len(scalars(runs / NAME)) == 3 * 4


def test_tensorboard_shows_an_evaluation_as_soon_as_it_is_done(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(Stop, "reason", lambda self, needed_seconds: shown.append(len(scalars(tmp_path / NAME))))
    run(tmp_path)
    # asked before each iteration and each of three parts of an evaluation; four values an evaluation
    assert shown == [0] * 8 + [4] * 8 + [8] * 5


def test_time_adds_up_over_interruptions_and_each_is_counted(tmp_path):
    seconds = []
    for questions in (3, 4):
        with pytest.MonkeyPatch.context() as patch:
            asked = iter([None] * questions)
            patch.setattr(Stop, "reason", lambda self, needed_seconds, asked=asked: next(asked, "interrupted"))
            record = run(tmp_path)
            seconds.append(record.train_seconds)
    assert (record.iterations, record.interruptions) == (5, 1)
    record = run(tmp_path)
    assert 0 < seconds[0] < seconds[1] < record.train_seconds
    assert record.interruptions == 2
    times = [float(row["train_seconds"]) for row in curve_of(tmp_path / NAME)]
    assert times == sorted(times) and times[-1] == record.train_seconds


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_at_the_end_of_the_iteration(tmp_path, monkeypatch, number):
    seen = []

    class Signalling(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny()

        def forward(self, images):
            if self.training:
                seen.append(signal.getsignal(signal.SIGINT))
                if len(seen) == 5:  # the first call measures memory
                    os.kill(os.getpid(), number)
            return self.inner(images)

    monkeypatch.setitem(MODELS, "resnet32", lambda num_classes, *, disable: Signalling())
    before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    record = run(tmp_path)
    assert (record.status, record.reason, record.iterations) == ("partial", "interrupted", 4)
    assert checkpoint_of(tmp_path / NAME)["iteration"] == 4
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == before
    assert run(tmp_path).status == "complete"


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


def test_training_time_leaves_out_evaluation_and_start_up(tmp_path, monkeypatch):
    monkeypatch.setitem(MODELS, "resnet32", lambda num_classes, *, disable: Slow(evaluation_seconds=0.2))
    started = time.monotonic()
    record = run(tmp_path)
    elapsed = time.monotonic() - started
    # twelve iterations of 50 ms; nine parts of evaluation of 200 ms, and one more iteration to measure memory
    assert 12 * 0.05 <= record.train_seconds < elapsed - 9 * 0.2 - 0.05
