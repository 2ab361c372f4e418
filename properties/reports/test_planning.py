"""A plan shows the time that each missing cell needs. A budget goes to the longest cells that can finish."""

import itertools
from dataclasses import replace

import pytest
import torch

from bench import planning
from bench.placement import Cell, Settings, cells, devices, in_turns, on_devices
from bench.planning import Need, Needs, cells_to_start, choose, simulate
from bench.reproduce_table import main
from memcnn.training import timing
from memcnn.training.execution import Execution
from memcnn.training.recipe import PUBLISHED, SMOKE, override
from memcnn.training.record import load
from memcnn.training.timing import Cost, cost_of_records, timed
from memcnn.training.trainer import Job, Place
from properties.support.runs import RECIPE, run, tiny_training

CPU = torch.device("cpu")


def need(model: str, minutes: float, *, start: float = 30.0) -> Need:
    cost = Cost(start, 0.001, 1.0, "timed")
    return Need(Cell(model, "cifar10", 0), 0, 80_000, cost, cost, 60 * minutes, 60 * minutes)


NEEDS = [need("resnet32", 4), need("revnet38", 5), need("resnet110", 13), need("revnet110", 20)]


def test_the_longest_cell_that_can_finish_is_chosen_and_else_the_one_with_least_to_do():
    assert choose(NEEDS, 13.5 * 60) == (NEEDS[2], True)
    assert choose(NEEDS, 4.5 * 60) == (NEEDS[0], True)
    assert choose(NEEDS, 3 * 60) == (NEEDS[0], False)
    assert choose(NEEDS, 20) is None, "a start takes longer than that"
    assert choose([], 1e9) is None


@pytest.mark.parametrize(("budget", "lanes", "whole", "part"), [
    (13.5, 1, {"resnet110"}, None),
    (20, 1, {"revnet110"}, None),
    (24.5, 1, {"revnet110", "resnet32"}, None),
    (26, 1, {"revnet110", "revnet38"}, "resnet32"),
    (20, 2, {"revnet110", "resnet110", "revnet38"}, "resnet32"),
    (None, 1, {"resnet32", "revnet38", "resnet110", "revnet110"}, None),
])  # fmt: skip
def test_the_plan_is_what_training_within_the_budget_does(budget, lanes, whole, part):
    seconds = None if budget is None else 60 * budget
    fate, end = simulate(NEEDS, seconds, lanes)
    assert {cell.model for cell, what in fate.items() if what == "whole"} == whole
    assert [cell.model for cell, what in fate.items() if what == "part"] == ([part] if part else [])
    assert budget is None or end <= seconds
    if lanes == 1:  # the clock advances by the time that each cell needs
        now, said, begun = [0.0], [], []
        for cell in cells_to_start(NEEDS, lambda: (seconds or 1e9) - now[0], said.append):
            begun.append(cell.model)
            now[0] += next(one.together_seconds for one in NEEDS if one.cell == cell)
        assert begun[: len(whole)] == sorted(whole, key=lambda name: -next(
            one.together_seconds for one in NEEDS if one.cell.model == name))  # fmt: skip
        assert set(begun) == whole | ({part} if part else set())
        assert sum("a later command resumes it" in text for text in said) == (part is not None)
        assert sum("not started" in text for text in said) == len(NEEDS) - len(begun)


def test_what_is_done_already_is_subtracted():
    cost = Cost(30.0, 0.01, 2.0, "timed")
    assert cost.seconds(PUBLISHED, 0) == 30 + 800 + 160 * 2
    assert cost.seconds(PUBLISHED, 40_000) == 30 + 400 + 80 * 2
    assert cost.seconds(PUBLISHED, 40_250) == pytest.approx(30 + 397.5 + 80 * 2)


@pytest.fixture
def tiny_runs():
    with tiny_training():
        yield


def test_times_are_measured_within_bounds_and_write_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = Job(model="revnet38", dataset="cifar10", recipe=SMOKE)
    alone, together = timed(job, Execution(), Place(data="generated", runs=tmp_path), CPU)
    assert alone == together and alone.source == "timed"
    assert 0.005 < alone.step_seconds < 10 and 0 < alone.evaluation_seconds < 60 and alone.start_seconds > 1
    assert not list(tmp_path.iterdir())


def test_steps_of_several_copies_are_interleaved_and_a_round_is_timed(monkeypatch):
    calls, now = [], itertools.count()

    class Copy:
        def __init__(self, name: str) -> None:
            self.name = name

        def launch(self) -> None:
            calls.append(self.name)

        def wait(self) -> None:
            calls.append(f"wait {self.name}")

    monkeypatch.setattr(timing, "TIMED_SECONDS", 3)
    monkeypatch.setattr("time.perf_counter", lambda: float(next(now)))
    seconds = timing._round_seconds([Copy("a"), Copy("b")])
    rounds = calls.count("a")
    assert calls == ["a", "b"] * rounds + ["wait a", "wait b"] and rounds == 3
    assert seconds == 4 / 3  # the clock is asked once a round after the first, and at the end


def test_a_record_gives_the_time_only_of_an_equal_execution_and_as_many_runs(tiny_runs, tmp_path):
    recipe = override(RECIPE, iterations=120, evaluate_every=60)
    record = run(tmp_path, recipe=recipe)
    job = Job(model="resnet32", dataset="cifar10", recipe=recipe)
    place = Place(data="generated", runs=tmp_path)
    cost = cost_of_records(job, Execution(), place, CPU)
    assert cost.step_seconds == record.segments[0].train_seconds / 120 and cost.source.startswith("as in resnet32")
    assert cost_of_records(job, Execution(precision="bf16"), place, CPU) is None
    assert cost_of_records(job, Execution(), replace(place, shared_by=2), CPU) is None


def settings(runs) -> Settings:
    return Settings(recipe=RECIPE, runs=runs, data="generated")


def test_each_network_is_timed_once_and_a_cells_done_iterations_count(tiny_runs, tmp_path, monkeypatch):
    calls = []
    cost = Cost(1.0, 2.0, 3.0, "timed")
    monkeypatch.setattr(planning, "timed", lambda job, *rest, **options: calls.append(job.model) or (cost, cost))
    run(tmp_path, budget_seconds=0)
    needs = Needs(settings(tmp_path), CPU, 1, use_records=False)
    cells = [Cell("resnet32", "cifar10", seed) for seed in (0, 1)]
    assert [needs.of(cell).done for cell in cells] == [0, 0] and calls == ["resnet32"]
    assert needs.of(cells[0]).alone_seconds == planning.MARGIN * (1 + 12 * 2 + 3 * 3)


def test_cells_of_a_gpu_share_one_process_and_those_of_a_cpu_have_their_own(tmp_path, monkeypatch):
    places = []

    class FakeProcess:
        connection, asks, has_room, running = None, False, False, ()

        def __init__(self, settings, device, *, at_once, shared_by) -> None:
            places.append((device, at_once, shared_by))

        def interrupt(self) -> None:
            pass

    monkeypatch.setattr(devices, "CellProcess", FakeProcess)
    list(on_devices([], settings(tmp_path), ["cuda:0", "cuda:1", "cpu"], 3))
    assert sorted(places) == [*[("cpu", 1, 3)] * 3, ("cuda:0", 3, 1), ("cuda:1", 3, 1)]


def test_cells_take_turns_in_this_process(tiny_runs, tmp_path):
    cells = [Cell("resnet32", "cifar10", seed) for seed in range(3)]
    outcomes = dict(in_turns(cells, settings(tmp_path), "cpu", 2))
    assert set(outcomes) == set(cells)
    for cell, record in outcomes.items():
        assert record == load(settings(tmp_path).folder_of(cell)) and record.status == "complete"


WORDS = ["--recipe=smoke", "--data=generated", "--device=cpu", "--models=resnet32,revnet38", "--datasets=cifar10"]


def test_the_plan_is_printed_and_nothing_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    costs = {"resnet32": Cost(10.0, 1.0, 2.0, "timed"), "revnet38": Cost(10.0, 5.0, 2.0, "timed")}
    monkeypatch.setattr(planning, "timed", lambda job, *rest, at_once: (costs[job.model], costs[job.model]))
    assert main(["--plan", "--budget=60s", "--jobs-per-device=2", *WORDS]) == 0
    said = capsys.readouterr().out
    row = next(line for line in said.splitlines() if line.startswith("resnet32"))
    assert row.split() == "resnet32 cifar10 s0 0 % 10 2.0 1000.00 1000.00 0.5 0.5 whole".split()
    assert "2 missing cells: 105 s one after the other, 78 s with 2 at a time." in said
    assert [line.split()[-1] for line in said.splitlines() if line.startswith("re")] == ["whole", "part"]
    assert "1 of them fit into 50 s" in said and "goes to revnet38 cifar10 s0, which a later command resumes." in said
    assert not list(tmp_path.iterdir())


def test_a_budget_begins_what_can_finish_and_says_what_it_leaves_out(tmp_path, monkeypatch, capsys, full):
    begun = []

    def train(job, execution, place, **options):
        begun.append(job.model)
        return full(model=job.model, dataset=job.dataset, seed=job.seed)

    monkeypatch.setattr(cells, "train", train)
    costs = {"resnet32": Cost(10.0, 1.0, 2.0, "timed"), "revnet38": Cost(900.0, 5.0, 2.0, "timed")}
    monkeypatch.setattr(planning, "timed", lambda job, *rest, at_once: (costs[job.model], costs[job.model]))
    (tmp_path / "records").mkdir()
    folders = [f"--{name}={tmp_path / name}" for name in ("runs", "records", "out")]
    assert main(["--train", "--budget=60s", *WORDS, *folders]) == 3
    said = capsys.readouterr().out
    assert begun == ["resnet32"]
    assert "revnet38  cifar10  s0  needs 16.9 min, has 50 s: not started" in said
    assert "1 of 2 cells complete, 1 not started for lack of time." in said
