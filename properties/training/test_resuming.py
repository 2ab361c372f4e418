"""A run that was stopped or killed, and resumed, ends with the bits of an undisturbed run."""

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from memcnn.models.resnet import MODELS
from memcnn.training import checkpoint, saving
from memcnn.training.execution import Execution
from memcnn.training.recipe import override
from memcnn.training.record import RunRecord, load
from memcnn.training.state import MixedExecution
from memcnn.training.stopping import Stop
from properties.support.runs import (
    DATA,
    NAME,
    RECIPE,
    Slow,
    assert_same_run,
    checkpoint_of,
    curve_of,
    run,
    scalars,
    stopped_after,
    tiny,
    without,
)

pytestmark = pytest.mark.usefixtures("tiny_runs")


class Killed(BaseException):
    """Simulate a kill: nothing is saved after it."""


def run_in_parts(runs, parts: list[tuple[int, str]], checkpoint_seconds: float) -> RunRecord:
    """Interrupt a run once for each of ``parts``, resume it each time, and return its record when it is complete.

    Part (n, how) ends after the run has asked n times whether to stop: by a "stop", by a "kill", or by a
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
            patch.setattr(saving, "CHECKPOINT_SECONDS", checkpoint_seconds)
            patch.setattr(saving, "CHECKPOINT_SHARE", 1e9)
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
    run(runs)
    return runs / NAME


@given(
    parts=st.lists(
        st.tuples(st.integers(0, 21), st.sampled_from(["stop", "kill", "kill in saving"])), min_size=1, max_size=4
    ),
    checkpoint_seconds=st.sampled_from([20.0, 0.0]),
)
@example(parts=[(2, "stop"), (5, "kill in saving"), (1, "stop"), (0, "kill")], checkpoint_seconds=20.0)
@example(parts=[(5, "stop"), (0, "kill in saving")], checkpoint_seconds=20.0)  # before an evaluation, and after it
@example(parts=[(7, "kill"), (3, "kill in saving"), (1, "kill")], checkpoint_seconds=0.0)
def test_resuming_gives_the_same_bits(tmp_path_factory, uninterrupted, parts, checkpoint_seconds):
    runs = tmp_path_factory.mktemp("in-parts")
    assert run_in_parts(runs, parts, checkpoint_seconds) == load(runs / NAME)
    assert_same_run(runs / NAME, uninterrupted)
    assert [int(row["iteration"]) for row in curve_of(runs / NAME)] == [5, 10, 12]
    assert len(scalars(runs / NAME)) == 3 * 4


def test_tensorboard_shows_an_evaluation_as_soon_as_it_is_done(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(Stop, "reason", lambda self, needed_seconds: shown.append(len(scalars(tmp_path / NAME))))
    run(tmp_path)
    # asked before each iteration and each of three parts of an evaluation; four values an evaluation
    assert shown == [0] * 8 + [4] * 8 + [8] * 5


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


LONG = override(RECIPE, iterations=60, evaluate_every=60)
LONG_NAME = NAME.replace(RECIPE.name, LONG.name)


def killed_after(runs, questions: int) -> int:
    """Kill the long run when it has asked whether to stop for the given number of times.

    Returns:
        The iteration of its last checkpoint.
    """
    asked = iter(range(questions))

    def reason(self, *, needed_seconds):
        if next(asked, None) is None:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stop, "reason", reason)
        with pytest.raises(Killed):
            run(runs, recipe=LONG)
    return checkpoint_of(runs / LONG_NAME)["iteration"]


def test_a_kill_loses_no_more_than_the_time_between_two_checkpoints(tmp_path, monkeypatch):
    """Steps take 50 ms, checkpoints are 0.3 s apart: after at most six steps, or seven if one was about to begin."""
    monkeypatch.setitem(MODELS, "resnet32", lambda num_classes, *, disable: Slow())
    monkeypatch.setattr(saving, "CHECKPOINT_SECONDS", 0.3)
    monkeypatch.setattr(saving, "CHECKPOINT_SHARE", 1.0)
    done = killed_after(tmp_path, 31)
    assert 16 <= done < 31, "checkpoints of training are missing, or a kill loses nothing"
    record = load(tmp_path / LONG_NAME)
    assert (record.status, record.reason, record.iterations) == ("partial", None, done)
    assert record.segments[-1].last == done
    again = run(tmp_path, recipe=LONG)
    assert again.status == "complete" and [part.first for part in again.segments] == [0, done]


def test_checkpoints_take_a_small_share_of_the_time_where_saving_is_slow(tmp_path, monkeypatch):
    """After a checkpoint that takes 0.2 s the next one is due after 6.7 s, so not within three seconds of training."""
    save, saved = checkpoint.save, []

    def slow(*arguments):
        saved.append(arguments[2].iteration)
        time.sleep(0.2)
        save(*arguments)

    monkeypatch.setitem(MODELS, "resnet32", lambda num_classes, *, disable: Slow())
    monkeypatch.setattr(checkpoint, "save", slow)
    monkeypatch.setattr(saving, "CHECKPOINT_SECONDS", 0.1)
    run(tmp_path, recipe=LONG)
    assert len(saved) == 2 and saved[-1] == 60, saved


def stopped(runs, **options) -> RunRecord:
    """Stop the run after seven iterations."""
    with stopped_after(10):
        return run(runs, **options)


BF16 = Execution(precision="bf16")


def files_below(folder) -> dict:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_another_execution_is_refused_unless_it_is_allowed_and_then_recorded(tmp_path):
    assert stopped(tmp_path).iterations == 7
    before = files_below(tmp_path / NAME)
    message = "first 7 iterations were computed with float32 on cpu, but this command asks for bf16 .*--allow-mixed"
    with pytest.raises(MixedExecution, match=message):
        run(tmp_path, execution=BF16)
    assert files_below(tmp_path / NAME) == before
    record = run(tmp_path, execution=BF16, allow_mixed=True)
    parts = [(part.first, part.last, part.execution) for part in record.segments]
    assert parts == [(0, 7, "float32"), (7, 12, "bf16")]
    assert record.mixed and "mixed execution" in record.mark and load(tmp_path / NAME) == record
    assert record.train_seconds == sum(part.train_seconds for part in record.segments)


def test_an_execution_that_has_computed_nothing_is_not_mixed(tmp_path):
    assert run(tmp_path, budget_seconds=0).iterations == 0
    record = run(tmp_path, execution=BF16)
    assert not record.mixed and [part.execution for part in record.segments] == ["bf16"]


OLD_NAMES = {
    "official_data": "official data", "data_checksums": "data checksums",
    "batch_norm_images": "images that BatchNorm sees",
}  # fmt: skip


def as_in_version_2_dev(content: dict, *, segments: bool) -> dict:
    """Return a checkpoint as written before the classes ``Identity`` and ``State``; with or without segments."""
    identity = {OLD_NAMES.get(name, name): value for name, value in content["identity"].items() if value is not None}
    state = without(content["state"], "unassigned_seconds")
    state["train_seconds"] = sum(segment["train_seconds"] for segment in state["segments"])
    return {"identity": identity, "state": state if segments else without(state, "segments")}


@pytest.mark.parametrize("with_record", [True, False])
@pytest.mark.parametrize("segments", [True, False])
def test_a_checkpoint_of_an_earlier_version_is_resumed(tmp_path, uninterrupted, with_record, segments):
    seconds = stopped(tmp_path).train_seconds
    content = torch.load(tmp_path / NAME / "checkpoint.pt", weights_only=True)
    old = as_in_version_2_dev(content, segments=segments)
    names = "iteration interruptions memory model optimizer rows step_seconds train_seconds window"
    assert set(old["state"]) == set(names.split()) | ({"segments"} if segments else set())
    assert set(old["identity"]) == {"model", "dataset", "seed", "recipe", "engine", "official data", "data checksums"}
    checkpoint.write(tmp_path / NAME, old)
    if not with_record:
        (tmp_path / NAME / "record.json").unlink()
    record = run(tmp_path)
    parts = [(part.first, part.last, part.execution) for part in record.segments]
    assert parts == [(0, 7, "float32"), (7, 12, "float32")]
    assert record.segments[0].train_seconds == seconds
    expected = checkpoint_of(uninterrupted)
    torch.testing.assert_close(checkpoint_of(tmp_path / NAME)["model"], expected["model"], rtol=0, atol=0)


OLD_CHECKPOINT = Path(__file__).parent / "files" / "checkpoint_before_state.pt"


def test_a_committed_checkpoint_of_an_earlier_version_is_resumed(tmp_path, monkeypatch):
    """Commit 236d046 wrote the file after 7 iterations of the tiny run. The images may differ between machines."""
    identity, state = checkpoint.read(OLD_CHECKPOINT)
    assert (identity.model, identity.dataset, identity.seed, identity.engine) == ("resnet32", "cifar10", 0, True)
    assert identity.recipe == RECIPE.to_dict() and identity.official_data is False
    assert (state.iteration, state.last_evaluation, state.interruptions) == (7, 5, 0)
    assert [(part.first, part.last, part.execution) for part in state.segments] == [(0, 7, "float32")]
    assert state.window.tolist()[1] == 12 and state.memory["parameter_bytes"] == 11_096
    images = replace(DATA, checksums=identity.data_checksums)
    monkeypatch.setattr("memcnn.data.images.generate", lambda num_classes: images)
    (tmp_path / NAME).mkdir()
    (tmp_path / NAME / "checkpoint.pt").write_bytes(OLD_CHECKPOINT.read_bytes())
    record = run(tmp_path)
    assert record.status == "complete" and [part.first for part in record.segments] == [0, 7]
    assert record.segments[0].train_seconds == state.train_seconds
