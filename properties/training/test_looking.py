"""Options of ``memcnn.train`` that do not train: ``--list``, ``--dry-run`` and ``--config``."""

import json
import os
import socket

import pytest
import torch

from memcnn import data as cifar_data
from memcnn import train as command
from memcnn.memory import predict_step_memory, step_flops
from memcnn.models.resnet import revnet38
from memcnn.training import files, record
from memcnn.training.listing import list_runs
from memcnn.training.recipe import SMOKE, Recipe, override
from properties.support.records import FAILED, FULL, PARTIAL, STARTED, changed
from properties.support.runs import DATA, NAME, run, tiny_command

HOST = socket.gethostname()


def put(runs, name, content, *, holder=None):
    """Make the folder of a run.

    Args:
        runs: the folder of runs.
        name: the name of the new folder.
        content: a record, or a text to write in its place; None writes none.
        holder: the id and host of the process that holds the lock, if one does.
    """
    folder = runs / name
    folder.mkdir()
    if isinstance(content, str):
        (folder / "record.json").write_text(content)
    elif content is not None:
        content.write(folder)
    if holder:
        values = {"pid": holder[0], "host": holder[1], "since": "2026-01-02T03:04:05+00:00"}
        (folder / files.HOLDER).write_text(json.dumps(values))


def test_the_list_shows_the_progress_of_every_run(tmp_path, capsys):
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)  # the process has ended
    put(tmp_path, "a", FULL)
    put(tmp_path, "b", PARTIAL)
    put(tmp_path, "c", FAILED)
    put(tmp_path, "d", STARTED, holder=(os.getpid(), HOST))
    put(tmp_path, "e", STARTED, holder=(child, HOST))
    put(tmp_path, "f", STARTED, holder=(1, "elsewhere"))
    put(tmp_path, "g", STARTED)
    put(tmp_path, "h", None, holder=(os.getpid(), HOST))
    put(tmp_path, "i", changed(FULL, data={"official": False, "checksums": {"test_batch": "00"}}))
    put(tmp_path, "j", PARTIAL, holder=(os.getpid(), HOST))
    put(tmp_path, "k", "{}")
    put(tmp_path, "l.old-1", FULL)
    assert command.main(["--list", "--runs", str(tmp_path)]) == 0
    since = "(since 2026-01-02 03:04:05 UTC)"
    said = capsys.readouterr().out.splitlines()
    assert [line.split(maxsplit=4) for line in said[1:-1]] == [
        ["a", "80000/80000", "92.70", "6660", "complete"],
        ["b", "700/80000", "92.70", "6660", "partial: interrupted"],
        ["c", "811/80000", "92.70", "6660", "failed: loss is nan at iteration 812"],
        ["d", "3/80000", "-", "6660", f"running, process {os.getpid()} on {HOST} {since}"],
        ["e", "3/80000", "-", "6660", f"killed, process {child} on {HOST} {since}"],
        ["f", "3/80000", "-", "6660", f"running or killed, process 1 on elsewhere {since}"],
        ["g", "3/80000", "-", "6660", "partial"],
        ["h", "-", "-", "-", f"running, process {os.getpid()} on {HOST} {since}"],
        ["i", "80000/80000", "92.70", "6660", "complete (not the official files)"],
        ["j", "700/80000", "92.70", "6660", f"running, process {os.getpid()} on {HOST} {since}"],
    ]
    assert said[-1].startswith(f"left out: {tmp_path / 'k' / 'record.json'}: schema is None")


def test_the_list_of_an_empty_folder_says_that_there_are_no_runs(tmp_path):
    assert list_runs(tmp_path / "none") == f"no runs in {tmp_path / 'none'}"


def test_hostile_text_cannot_steer_the_terminal(tmp_path):
    put(tmp_path, "a", changed(FAILED, reason="\x1b[2J\x1b]0;title\x07\r\nrun  complete"))
    put(tmp_path, "b", STARTED, holder=(1, "\x1b[31mhost\n"))
    text = list_runs(tmp_path)
    assert len(text.splitlines()) == 3
    assert all(line.isprintable() for line in text.split("\n"))


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"pid": "x"}', '{"pid": 1, "host": 2, "since": 3}', "[" * 9999])
def test_an_unreadable_holder_file_names_nobody(tmp_path, content):
    (tmp_path / files.HOLDER).write_text(content)
    assert files.holder(tmp_path) is None
    with files.locked(tmp_path) as dead:
        assert dead is None and files.holder(tmp_path).pid == os.getpid() and files.holder(tmp_path).is_alive
    assert files.holder(tmp_path) is None


def test_the_configuration_contains_the_whole_recipe(capsys):
    assert command.main(["revnet38", "cifar100", "--config", "--seed", "3", "--pad", "1", "--disable"]) == 0
    values = json.loads(capsys.readouterr().out)
    recipe = Recipe.from_dict(values["recipe"])
    assert recipe == override(recipe, pad=1) and recipe.pad == 1 and recipe.iterations == 80_000
    assert values["run"] == record.run_name("revnet38", "cifar100", recipe, 3, engine=False)
    assert (values["model"], values["dataset"], values["seed"], values["engine"]) == ("revnet38", "cifar100", 3, False)


def test_a_dry_run_describes_the_run_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = "revnet38 cifar10 --recipe smoke --batch-size 2 --dry-run --data nowhere --device cpu".split()
    assert command.main(words) == 0
    assert not list(tmp_path.iterdir())
    said = capsys.readouterr().out

    def batch():
        return torch.zeros(2, 3, 32, 32), torch.zeros(2, dtype=torch.int64)

    memory = predict_step_memory(revnet38, batch)
    assert "smoke-batch_size=2-s0: would start from iteration 0" in said and "12 iterations of 2 images" in said
    assert "573,994 (2.2 MiB)" in said
    assert f"{memory.activation_bytes / 2**20:.1f} MiB of them activations" in said
    assert f"{step_flops(revnet38, batch) / 1e9:,.1f} GFLOP a step" in said
    assert "for 12 iterations of " in said and "steps timed just now" in said


def test_a_dry_run_shows_the_state_of_the_run_and_the_time_of_a_similar_one(tiny_runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cifar_data, "generate", lambda num_classes, **sizes: DATA)

    def printed(name: str) -> str:
        assert tiny_command(tmp_path, "--device", "cpu", "--dry-run", "--iterations", "300") == 0
        return next(line for line in capsys.readouterr().out.splitlines() if line.startswith(name))

    run(tmp_path)  # too short to measure
    assert "for 300 iterations of " in printed("time") and "steps timed just now" in printed("time")
    run(tmp_path, recipe=override(SMOKE, batch_size=8, test_images=20, iterations=300))
    (folder,) = (path for path in tmp_path.iterdir() if path.name != NAME)
    milliseconds = f"{1000 * record.load(folder).train_seconds / 300:,.1f}"
    assert printed("run").endswith("is complete")
    assert f"0:00:00 for 0 iterations of {milliseconds} ms each (as in {folder.name})" in printed("time")
    with files.locked(folder):
        assert f"busy, process {os.getpid()} on {HOST}" in printed("run")
