"""Cells trained in parallel and in sequence have the same results, even if processes are killed."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from bench.placement import Cell, Lost, Settings, on_cluster, on_devices, train_cell
from bench.reproduce_table import main
from memcnn.training.files import HOLDER
from memcnn.training.recipe import RECIPES, override
from memcnn.training.record import BadRecord, RunRecord, load, run_name

CELLS = [Cell("resnet32", "cifar10", 0), Cell("revnet38", "cifar100", 1)]
RECIPE = override(RECIPES["smoke"], batch_size=4, iterations=24, evaluate_every=4, test_images=8)


def settings(runs: Path, **changes) -> Settings:
    return Settings(**{"recipe": RECIPE, "runs": runs, "data": "generated", "threads": 1, **changes})


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[Cell, RunRecord]:
    """Return the records of cells trained in sequence in this process."""
    runs = tmp_path_factory.mktemp("undisturbed")
    return {cell: train_cell(cell, settings(runs), "cpu") for cell in CELLS}


def results(outcomes: dict) -> dict:
    return {cell: (record.status, record.test_loss, record.test_accuracy) for cell, record in outcomes.items()}


def folder_of(runs: Path, cell: Cell) -> Path:
    return runs / run_name(cell.model, cell.dataset, RECIPE, cell.seed, data="generated")


def when_under_way(runs: Path, cell: Cell, act) -> threading.Thread:
    """Call ``act(process id)`` after the cell has written a checkpoint. Return the thread that waits for it."""

    def holder() -> int | None:
        try:
            if load(folder_of(runs, cell)).status == "partial":
                return json.loads((folder_of(runs, cell) / HOLDER).read_text())["pid"]
        except (BadRecord, ValueError, OSError):
            return None

    def watch() -> None:
        for _ in range(1200):
            if pid := holder():
                act(pid)
                return
            time.sleep(0.05)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def test_a_killed_process_loses_only_its_own_cell_and_the_same_command_completes_it(undisturbed, tmp_path):
    killer = when_under_way(tmp_path, CELLS[1], kill)
    outcomes = dict(on_devices(CELLS, settings(tmp_path), ["cpu"], 2))
    killer.join()
    assert outcomes[CELLS[0]].status == "complete"
    assert isinstance(outcomes[CELLS[1]], Lost) and "killed by signal 9" in str(outcomes[CELLS[1]])
    again = dict(on_devices(CELLS[1:], settings(tmp_path), ["cpu"], 1))
    assert results({CELLS[0]: outcomes[CELLS[0]], **again}) == results(undisturbed)
    assert again[CELLS[1]].interruptions == 1


def test_no_cell_starts_after_the_deadline(tmp_path):
    assert list(on_devices(CELLS, settings(tmp_path, deadline=time.time() - 1), ["cpu"], 2)) == []
    assert not any(tmp_path.iterdir())


def test_a_cell_that_fails_is_reported_with_the_reason(tmp_path):
    cell = Cell("resnet33", "cifar10", 0)
    outcome = dict(on_devices([cell], settings(tmp_path), ["cpu"], 1))[cell]
    assert isinstance(outcome, Lost) and "its process failed: " in str(outcome)
    assert "unknown model 'resnet33'" in str(outcome)


def test_the_command_trains_on_the_devices_it_is_given(tmp_path, capsys):
    (tmp_path / "records").mkdir()
    words = [
        "--train",
        "--recipe=smoke",
        "--data=generated",
        "--models=resnet32",
        "--devices=cpu",
        "--threads=1",
        "--jobs-per-device=2",
        *(f"--{name}={tmp_path / name}" for name in ("runs", "records", "out")),
    ]
    assert main(words) == 0
    assert "2 of 2 cells complete" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device=cpu", "--devices=cpu"], "got --device and --devices: wanted one of them"),
        (["--devices=cpu", "--cluster=local"], "got --devices and --cluster: wanted one of them"),
        (["--devices=0,1"], "--devices: got 'cuda:0', but this PyTorch sees only cpu"),
        (["--devices=cpu,gpu"], "--devices: got 'gpu', but this PyTorch sees only cpu"),
        (["--device=cuda:7"], "--device: got 'cuda:7', but this PyTorch sees only cpu"),
        (["--devices=cpu,cpu"], "--devices: cpu is named twice; --jobs-per-device N"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="names GPUs that do not exist: run it on a machine without a GPU")
def test_conflicting_or_missing_places_are_refused_before_anything_starts(words, message, capsys, tmp_path):
    with pytest.raises(SystemExit, match="2"):
        main(["--train", "--recipe=smoke", *words, *(f"--{name}={tmp_path / name}" for name in ("runs", "out"))])
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore")  # warnings of Ray itself
def test_a_cluster_completes_every_cell_when_a_worker_and_a_node_are_lost(undisturbed, tmp_path):
    ray = pytest.importorskip("ray", reason="needs Ray: pip install ray")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1), cluster.head_node]
    lost = []

    def lose_the_node(pid: int) -> None:
        lost.append("node")
        cluster.remove_node(nodes[0], allow_graceful=False)
        cluster.add_node(num_cpus=1)

    def lose_the_worker(pid: int) -> None:
        lost.append("worker")
        kill(pid)
        when_under_way(tmp_path, CELLS[0], lose_the_node).join()

    killer = when_under_way(tmp_path, CELLS[1], lose_the_worker)
    try:
        outcomes = dict(on_cluster(CELLS, settings(tmp_path), cluster.address, 1))
    finally:
        killer.join()
        ray.shutdown()
        cluster.shutdown()
    assert lost == ["worker", "node"]
    assert results(outcomes) == results(undisturbed)
    assert sum(record.interruptions for record in outcomes.values()) >= 1
