"""Runs that take turns in one process end as each does alone, whatever happens to the others."""

import itertools
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from memcnn.models.resnet import MODELS
from memcnn.training import checkpoint
from memcnn.training.execution import Execution
from memcnn.training.recipe import override
from memcnn.training.record import load
from memcnn.training.state import MixedExecution
from memcnn.training.stopping import Stop
from memcnn.training.together import train_together
from memcnn.training.trainer import BadArgument
from memcnn.training.turns import STEPS_BETWEEN_EVENTS, Clock, Lane
from properties.devices import needs_cuda
from properties.support.runs import (
    RECIPE,
    assert_same_run,
    checkpoint_of,
    job_of,
    place_of,
    run,
    stopped_after,
    tiny,
)

pytestmark = pytest.mark.usefixtures("tiny_runs")


def folder(runs, seed: int) -> Path:
    """Return the folder of the tiny run with that seed."""
    return job_of(seed=seed).folder(place_of(runs))


def together(runs, seeds, at_once: int = 2, *, stop: Stop | None = None, **changes) -> dict:
    """Train the seeds together, and return their outcomes in the order in which they ended."""
    jobs = [job_of(seed=seed, **changes) for seed in seeds]
    outcomes = train_together(jobs, at_once, stop=stop or Stop(), place=place_of(runs))
    return {one.seed: outcome for one, outcome in outcomes}


@pytest.fixture(scope="module")
def alone(tmp_path_factory, tiny_runs):
    """Return the folder of runs of three seeds, each trained alone."""
    runs = tmp_path_factory.mktemp("alone")
    for seed in (0, 1, 2):
        run(runs, seed=seed)
    return runs


def assert_as_alone(runs, alone, seed: int) -> None:
    """Assert that the run of a seed is complete and equals the one that was trained alone."""
    assert load(folder(runs, seed)).status == "complete"
    assert_same_run(folder(runs, seed), folder(alone, seed))


class Watched(nn.Module):
    """The tiny network. It appends its number to ``seen`` at each training pass."""

    def __init__(self, number: int, seen: list[int]) -> None:
        super().__init__()
        self.inner, self.number, self.seen = tiny(), number, seen

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.seen.append(self.number)
        return self.inner(images)


@pytest.fixture
def seen(monkeypatch):
    """Return a list. Each model appends its number to it at each training pass. The first model has number 0."""
    seen, numbers = [], itertools.count()
    monkeypatch.setitem(MODELS, "resnet32", lambda num_classes, *, disable: Watched(next(numbers), seen))
    return seen


def test_two_runs_end_with_the_bits_that_each_has_alone(tmp_path, alone):
    assert set(together(tmp_path, [0, 1])) == {0, 1}
    for seed in (0, 1):
        assert_as_alone(tmp_path, alone, seed)
        assert load(folder(tmp_path, seed)).shared_by == 2


@needs_cuda
@pytest.mark.parametrize("graph", [False, True], ids=["eager on cuda", "captured on cuda"])
def test_on_a_gpu_runs_that_take_turns_end_as_each_does_alone(tmp_path, graph):
    execution = Execution(graph=graph, deterministic=True)
    jobs = [job_of(seed=seed) for seed in (0, 1)]
    place = place_of(tmp_path / "together", device="cuda")
    outcomes = dict(train_together(jobs, 2, stop=Stop(), execution=execution, place=place))
    assert [outcome.status for outcome in outcomes.values()] == ["complete"] * 2, outcomes
    for one in jobs:
        run(tmp_path / "alone", seed=one.seed, device="cuda", execution=execution)
        alone = folder(tmp_path / "alone", one.seed)
        state, expected = checkpoint_of(one.folder(place)), checkpoint_of(alone)
        torch.testing.assert_close(state["model"], expected["model"], rtol=0, atol=0)


def test_runs_take_turns_step_by_step(tmp_path, seen):
    together(tmp_path, [0, 1])
    assert seen == [0, 1] * 12


def test_after_a_stop_of_all_the_runs_resume_together_with_the_same_bits(tmp_path, alone):
    for questions in (9, 30):
        with stopped_after(questions):
            outcomes = together(tmp_path, [0, 1, 2])
        assert {one.reason for one in outcomes.values() if one.status == "partial"} == {"interrupted"}
        for seed, record in outcomes.items():
            assert record == load(folder(tmp_path, seed))
            assert record.iterations == checkpoint_of(folder(tmp_path, seed))["iteration"]
    together(tmp_path, [0, 1, 2])
    for seed in (0, 1, 2):
        assert_as_alone(tmp_path, alone, seed)


def failing(how: str, at: int):
    """Return a network whose training pass number ``at`` fails."""

    class Failing(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(*tiny())
            self.passes = 0

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            self.passes += self.training
            if self.passes == at and how == "error":
                raise torch.OutOfMemoryError("no memory is left")
            return super().forward(images) * (torch.nan if self.passes == at else 1)

    return Failing()


@pytest.mark.parametrize("how", ["error", "nan"])
def test_a_run_that_fails_makes_room_for_the_next_and_the_other_continues(tmp_path, alone, monkeypatch, how):
    made = itertools.count()
    monkeypatch.setitem(
        MODELS, "resnet32", lambda num_classes, *, disable: failing(how, 8) if next(made) == 1 else tiny()
    )
    under_way = []

    def jobs():
        for seed in (0, 1, 2):
            under_way.append([load(folder(tmp_path, s)).status for s in (0, 1) if folder_exists(tmp_path, s)])
            yield job_of(seed=seed)

    ended = train_together(jobs(), 2, stop=Stop(), place=place_of(tmp_path))
    outcomes = {one.seed: outcome for one, outcome in ended}
    if how == "error":
        assert isinstance(outcomes[1], torch.OutOfMemoryError) and next(iter(outcomes)) == 1
    else:
        assert (outcomes[1].status, outcomes[1].reason) == ("failed", "loss is nan at iteration 8")
    assert under_way[2][0] == "partial", "the third run began before the first one was over"
    for seed in (0, 2):
        assert_as_alone(tmp_path, alone, seed)
    monkeypatch.setitem(MODELS, "resnet32", lambda num_classes, *, disable: tiny())
    run(tmp_path, seed=1)
    assert_as_alone(tmp_path, alone, 1)


def folder_exists(runs, seed: int) -> bool:
    return (folder(runs, seed) / "record.json").exists()


def test_bad_data_of_one_run_fail_only_this_run(tmp_path, alone):
    jobs = [job_of(seed=0), job_of(seed=1, recipe=override(RECIPE, batch_size=41)), job_of(seed=2)]
    ended = train_together(jobs, 2, stop=Stop(), place=place_of(tmp_path))
    outcomes = {one.seed: outcome for one, outcome in ended}
    assert isinstance(outcomes[1], BadArgument) and "there are only 40 images" in str(outcomes[1])
    for seed in (0, 2):
        assert_as_alone(tmp_path, alone, seed)


def test_one_signal_stops_all_and_nothing_is_begun_after_it(tmp_path, seen):
    class Signalling(list):
        def append(self, number: int) -> None:
            super().append(number)
            if len(self) == 12:
                os.kill(os.getpid(), signal.SIGTERM)

    marked, numbers = Signalling(), itertools.count()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "resnet32", lambda num_classes, *, disable: Watched(next(numbers), marked))
        outcomes = together(tmp_path, [0, 1, 2])
    assert {seed: record.reason for seed, record in outcomes.items()} == {0: "interrupted", 1: "interrupted"}
    assert len(marked) == 12, "a step was begun after the signal"
    assert not folder(tmp_path, 2).exists()


class Later:
    """An event that is done after three queries, or once it has been waited for."""

    waits = 0

    def __init__(self) -> None:
        self.asked = 0

    def query(self) -> bool:
        self.asked += 1
        return self.asked > 3

    def synchronize(self) -> None:
        Later.waits += 1
        self.asked = 3


def test_a_run_that_waits_for_the_gpu_delays_no_other_and_nothing_waits_for_the_whole_device(
    tmp_path, alone, monkeypatch
):
    """The test simulates the events of a GPU; the bits are the same."""

    def everything(*arguments):
        raise AssertionError("waited for all streams of the device")

    monkeypatch.setattr(torch.cuda, "synchronize", everything)
    monkeypatch.setattr(Lane, "mark", lambda self: Later())
    monkeypatch.setattr(Lane, "launched", lambda self: Later())
    Later.waits = 0
    outcomes = together(tmp_path, [0, 1])
    assert [outcome.status for outcome in outcomes.values()] == ["complete"] * 2, outcomes
    assert Later.waits > 0, "when all runs wait for events, the process must wait for one of them"
    for seed in (0, 1):
        assert_as_alone(tmp_path, alone, seed)


def test_the_other_runs_train_while_one_waits(tmp_path, monkeypatch, seen):
    """The first run waits for an event that is done when the second one has ended."""

    class UntilTheOtherEnds(Later):
        def query(self) -> bool:
            return seen.count(1) == 12

        def synchronize(self) -> None:
            raise AssertionError("waited although another run was ready")

    def launched(self):
        return UntilTheOtherEnds() if seen[-1] == 0 and seen.count(0) == 3 else None

    monkeypatch.setattr(Lane, "launched", launched)
    together(tmp_path, [0, 1])
    assert seen == [0, 1] * 3 + [1] * 9 + [0] * 9


def test_a_stream_waits_for_the_current_one_and_few_steps_are_queued(monkeypatch):
    calls = []

    class Event:
        def record(self, stream):
            calls.append(("event", stream))

    current = SimpleNamespace(name="current")
    stream = SimpleNamespace(name="own", wait_stream=lambda other: calls.append(("wait", other)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: ("turn", stream))
    lane = Lane(torch.device("cuda"), own_stream=True)
    assert calls == [("wait", current)]
    assert lane.turn() == ("turn", stream)
    waits = [lane.launched() for _ in range(4 * STEPS_BETWEEN_EVENTS)]
    assert [step for step, event in enumerate(waits, 1) if event] == [8, 12, 16]
    assert len(calls) == 5 and Lane(torch.device("cpu"), own_stream=True).launched() is None


def test_the_time_in_which_another_run_starts_is_not_training_time(tmp_path, monkeypatch):
    """The second run takes half a second to start, while the first one trains."""
    import time

    def slow(num_classes, *, disable):
        time.sleep(0.5)
        return tiny()

    makers = iter([tiny, slow])
    monkeypatch.setitem(MODELS, "resnet32", lambda num_classes, *, disable: next(makers)(num_classes, disable=disable))
    started = time.perf_counter()
    outcomes = together(tmp_path, [0, 1])
    assert time.perf_counter() - started > 0.5
    assert all(record.train_seconds < 0.4 for record in outcomes.values()), outcomes


def test_a_held_clock_stands_still(monkeypatch):
    now = [10.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    clock = Clock()
    with clock.held():
        now[0] += 5
    now[0] += 2
    assert clock.now() == 12


def test_a_run_in_another_execution_is_refused_in_a_group_too(tmp_path):
    recipe = override(RECIPE, learning_rate=0.01)
    together(tmp_path, [0], recipe=recipe, stop=Stop(deadline=0.0))
    with stopped_after(8):
        together(tmp_path, [0], recipe=recipe)
    bf16 = Execution(precision="bf16")
    jobs = [job_of(recipe=recipe)]
    [(_, refused)] = train_together(jobs, 1, stop=Stop(), execution=bf16, place=place_of(tmp_path))
    assert isinstance(refused, MixedExecution)
    assert checkpoint.read(jobs[0].folder(place_of(tmp_path)) / "checkpoint.pt")[1].segments[-1].execution == "float32"
