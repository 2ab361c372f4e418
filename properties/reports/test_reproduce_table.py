"""The command ``bench.reproduce_table``: the cells that it trains, their order, their failures, and its exit status."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import reproduce_table
from bench.placement import cells
from bench.reproduce_table import RESERVED_SECONDS, main
from bench.table_options import MODELS, seed_list
from memcnn.training.record import DATASETS, load

ROOT = Path(reproduce_table.__file__).parents[1]
GENERATED = {"official": False, "checksums": {"generated": "0" * 32}}


@pytest.fixture
def trained(monkeypatch, full):
    """Replace the training of a cell by a finished record. Return the recorded calls, and a dict of other outcomes.

    The test may set ``outcomes[model, dataset, seed]`` to changes of that record, or to an exception to raise.
    """
    calls, outcomes = [], {}

    def train(job, execution, place, **options):
        cell = job.model, job.dataset, job.seed
        calls.append((cell, {"recipe": job.recipe, "execution": execution, **vars(place), **options}))
        outcome = outcomes.get(cell, {})
        if isinstance(outcome, BaseException):
            raise outcome
        return full(model=job.model, dataset=job.dataset, seed=job.seed, **outcome)

    monkeypatch.setattr(cells, "train", train)
    return calls, outcomes


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    """Return a function that runs the command in a temporary folder and returns its exit status and printed lines."""
    monkeypatch.setenv("COLUMNS", "120")

    for name in ("runs", "records"):
        (tmp_path / name).mkdir()

    def command(*words):
        folders = [f"--{name}={tmp_path / name}" for name in ("runs", "records", "out")]
        status = main([*words, *folders])
        return status, capsys.readouterr().out.splitlines()

    return command


def cell_lines(lines):
    return [line for line in lines if line.startswith("[")]


PARTIAL = dict(status="partial", reason="budget exhausted", iterations=900, test_iteration=500)


def test_without_train_the_tables_are_written_and_nothing_is_trained(run, trained, tmp_path):
    status, lines = run()
    assert status == 0 and not trained[0]
    names = ["table.md", "table.csv", "table.tex", "table.html", "memory.csv", "runs.csv"]
    assert [Path(line.strip()) for line in lines[-6:]] == [tmp_path / "out" / name for name in names]
    assert all((tmp_path / "out" / name).stat().st_size for name in names)


def test_cells_run_seed_by_seed_and_networks_of_one_depth_are_neighbours(run, trained):
    status, lines = run("--train", "--seeds", "0-1", "--device", "cpu")
    wanted = [(model, dataset, seed) for seed in (0, 1) for dataset in DATASETS for model in MODELS]
    assert [cell for cell, _ in trained[0]] == wanted
    assert status == 0 and len(cell_lines(lines)) == 24
    assert lines[0] == "[ 1/24] resnet32  cifar10  s0  accuracy  92.7 %  1:51:00  complete"
    assert "24 of 24 cells complete." in lines


def test_the_options_of_a_run_reach_the_trainer(run, trained, tmp_path):
    words = "--models revnet38 --datasets cifar100 --seeds 3 --recipe smoke --device cpu --data there --budget 1h"
    run("--train", *words.split())
    [(cell, options)] = trained[0]
    assert cell == ("revnet38", "cifar100", 3)
    assert options["recipe"].name == "smoke" and options["device"] == "cpu" and options["data"] == "there"
    assert options["unofficial_data"] is False
    assert options["runs"] == tmp_path / "runs"
    assert 3500 < options["budget_seconds"] <= 3600 - RESERVED_SECONDS


def test_unofficial_data_trains_on_files_with_wrong_checksums_and_marks_them(run, trained):
    trained[1]["revnet38", "cifar10", 0] = {"data": {"official": False, "checksums": {"data_batch_1": "0" * 32}}}
    trained[1]["resnet110", "cifar10", 0] = {"data": GENERATED}
    _status, lines = run("--train", "--datasets", "cifar10", "--unofficial-data")
    assert all(options["unofficial_data"] for _, options in trained[0])
    assert [line.partition("complete")[2] for line in cell_lines(lines)][:3] == [
        "",
        " (not the official files)",
        " (generated data)",
    ]


def test_a_failing_cell_is_reported_and_the_others_continue(run, trained):
    trained[1]["revnet38", "cifar10", 0] = FileNotFoundError("no files\nhere")
    trained[1]["resnet110", "cifar10", 0] = dict(PARTIAL, status="failed", reason="loss is nan at iteration 900")
    trained[1]["resnet164", "cifar10", 0] = FileNotFoundError("no files\nhere")
    status, lines = run("--train", "--datasets", "cifar10")
    assert status == 1 and len(trained[0]) == 6
    assert "[2/6] revnet38  cifar10  s0  failed: FileNotFoundError: no files here" in lines
    assert any(line.endswith("failed at 900/80000: loss is nan at iteration 900") for line in lines)
    assert "[5/6] resnet164 cifar10  s0  failed: as above" in lines
    assert "3 of 6 cells complete, 3 failed." in lines


@pytest.mark.parametrize("outcome", [PARTIAL, dict(PARTIAL, reason="interrupted"), KeyboardInterrupt()])
def test_a_stopped_run_stops_the_rest_and_still_renders(run, trained, tmp_path, outcome):
    trained[1]["revnet38", "cifar10", 0] = outcome
    status, lines = run("--train")
    assert status == 3 and len(trained[0]) == 2
    assert any(line.startswith("1 of 12 cells complete, stopped (") for line in lines)
    assert (tmp_path / "out" / "table.html").exists()


def test_a_failure_outweighs_a_stop(run, trained):
    trained[1]["resnet32", "cifar10", 0] = ValueError("bad")
    trained[1]["revnet38", "cifar10", 0] = PARTIAL
    assert run("--train")[0] == 1


def test_no_cell_starts_when_the_budget_is_used_up(run, trained):
    status, lines = run("--train", "--budget", f"{RESERVED_SECONDS:.0f}s")
    assert status == 3 and not trained[0]
    assert "0 of 12 cells complete, stopped (budget exhausted); the same command resumes from here." in lines


def test_a_committed_complete_run_is_not_trained_again(run, trained, tmp_path, full, put):
    put(tmp_path / "records", full())
    put(tmp_path / "records", full(seed=1, data=GENERATED))
    put(tmp_path / "records", full(seed=2, **PARTIAL))
    put(tmp_path / "records", full(seed=3, engine=False))
    status, lines = run("--train", "--models", "resnet32", "--datasets", "cifar10", "--seeds", "0-3")
    assert [seed for (_, _, seed), _ in trained[0]] == [1, 2, 3]
    assert status == 0 and len(cell_lines(lines)) == 4


@pytest.mark.parametrize(("text", "seeds"), [("0", [0]), ("0-4", [0, 1, 2, 3, 4]), ("5, 1,2-3,1", [1, 2, 3, 5])])
def test_seeds_are_read_as_a_list_of_numbers_and_ranges(text, seeds):
    assert seed_list(text) == seeds


SMOKE = "--train --recipe smoke --data generated --models revnet38 --datasets cifar10 --device cpu".split()


def test_a_smoke_run_appears_in_the_table_of_other_runs_and_is_not_repeated(run, tmp_path):
    status, lines = run(*SMOKE)
    assert status == 0 and re.match(r"\[1/1\] revnet38  cifar10  s0  accuracy .* complete \(generated data\)", lines[0])
    folder = tmp_path / "runs" / "revnet38-cifar10-smoke-s0-generated"
    record, written = load(folder), (folder / "record.json").stat().st_mtime_ns
    assert any("RevNet-38  CIFAR-10" in line and f"{record.test_accuracy:.2f}" in line for line in lines)
    note = f"data: generated; smoke recipe: 12 iterations of {record.recipe.batch_size} images"
    assert any(note in line for line in lines)
    assert "12 cells: 0 reproduced, 0 differ, 12 without a verdict, which needs at least 3 full runs." in lines
    assert run(*SMOKE)[0] == 0
    assert (folder / "record.json").stat().st_mtime_ns == written


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT as a POSIX shell does")
def test_ctrl_c_during_a_run_stops_cleanly_and_still_renders(tmp_path):
    words = (
        "--train --data generated --models resnet32 --datasets cifar10 --device cpu --threads 1 --records records "
        "--out out"
    )
    (tmp_path / "records").mkdir()
    how = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": str(ROOT)}, "stderr": subprocess.PIPE}
    command = [sys.executable, "-m", "bench.reproduce_table", *words.split()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, **how) as process:
        deadline = time.monotonic() + 90
        while not list(tmp_path.glob("runs/*/tensorboard/*")) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=90)
    assert process.returncode == 3, (out, err)
    assert b"0 of 1 cells complete, stopped (interrupted)" in out
    assert load(tmp_path / "runs" / "resnet32-cifar10-published-s0-generated").reason == "interrupted"
    assert (tmp_path / "out" / "table.html").exists()
