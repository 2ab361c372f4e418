"""A run refuses bad arguments, and a folder that holds another run or is locked by one."""

import fcntl
import os
import socket
import time
from dataclasses import replace

import pytest
import torch

from memcnn import data as cifar_data
from memcnn.training import checkpoint, files
from memcnn.training.checkpoint import BadCheckpoint
from memcnn.training.files import FolderBusy, locked
from memcnn.training.recipe import override
from memcnn.training.trainer import BadArgument
from properties.support import commands
from properties.support.runs import DATA, NAME, RECIPE, checkpoint_of, run

pytestmark = pytest.mark.usefixtures("tiny_runs")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, "seed: got -1"),
        ({"seed": 2**63}, "seed: got"),
        ({"device": "tpu"}, "device: got 'tpu', but this PyTorch sees only cpu"),
        ({"recipe": override(RECIPE, batch_size=41)}, "batch_size: got 41, but there are only 40"),
        ({"recipe": override(RECIPE, test_images=51)}, "test_images: got 51, but there are only 50"),
    ],
)
def test_a_bad_argument_is_refused_before_anything_is_written(tmp_path, options, message):
    with pytest.raises(BadArgument, match=message):
        run(tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_an_unknown_model_or_data_set_is_refused_with_the_choices(tmp_path):
    with pytest.raises(BadArgument, match="'resnet50': choose one of resnet32, "):
        run(tmp_path, model="resnet50")
    with pytest.raises(BadArgument, match="'mnist': choose one of cifar10, cifar100"):
        run(tmp_path, dataset="mnist")


def another_run(runs, name):
    """Give another run's files the tiny run's folder, and return the expected part of the message."""
    if name == "seed":
        run(runs, seed=1)
        (runs / NAME.replace("s0", "s1")).rename(runs / NAME)
        return "seed is 1 there, 0 here"
    if name == "official data":
        with pytest.MonkeyPatch.context() as patch:  # the same images, but marked as official
            patch.setattr(cifar_data, "load", lambda dataset, data: replace(DATA, official=True))
            run(runs, data="elsewhere")
        (runs / NAME.removesuffix("-generated")).rename(runs / NAME)
        return "official data is True there, False here"
    if name == "engine":
        run(runs, disable=True)
        (runs / f"{NAME}-plain").rename(runs / NAME)
        return "engine is False there, True here"
    changed = override(RECIPE, weight_decay=0.5)
    run(runs, recipe=changed)
    (runs / NAME.replace(RECIPE.name, changed.name)).rename(runs / NAME)
    return "recipe is .*'weight_decay': 0.5.* there, .*'weight_decay': 0.0002.* here"


@pytest.mark.parametrize("name", ["seed", "engine", "recipe", "official data"])
@pytest.mark.parametrize("finished", [True, False], ids=["record", "checkpoint"])
def test_another_runs_folder_is_refused_and_the_difference_is_named(tmp_path, name, finished):
    message = another_run(tmp_path, name)
    if not finished:
        (tmp_path / NAME / "record.json").unlink()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(BadCheckpoint, match=f"{NAME.replace('+', '.')}.*{message}.*--fresh"):
        run(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_run_on_other_generated_images_is_refused(tmp_path):
    run(tmp_path)
    (tmp_path / NAME / "record.json").unlink()
    content = torch.load(tmp_path / NAME / "checkpoint.pt", weights_only=True)
    content["identity"]["data_checksums"] = {"generated": "another"}
    checkpoint.write(tmp_path / NAME, content)
    with pytest.raises(BadCheckpoint, match="data checksums is {'generated': 'another'} there, .* here"):
        run(tmp_path)


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 half of one"])
def test_a_damaged_checkpoint_without_a_good_one_before_is_refused_by_name(tmp_path, content):
    run(tmp_path)
    (tmp_path / NAME / "record.json").unlink()
    (tmp_path / NAME / "checkpoint.pt").write_bytes(content)
    (tmp_path / NAME / "checkpoint.previous.pt").unlink()
    with pytest.raises(BadCheckpoint, match="checkpoint.pt cannot be read, .*previous.pt is missing.*--fresh"):
        run(tmp_path)
    assert run(tmp_path, fresh=True).status == "complete"


def test_a_checkpoint_cannot_run_code(tmp_path):
    class Harmful:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    run(tmp_path)
    (tmp_path / NAME / "record.json").unlink()
    for _ in range(2):  # the checkpoint, and the one before
        checkpoint.write(tmp_path / NAME, {"identity": {}, "state": {"model": Harmful()}})
    with pytest.raises(BadCheckpoint, match="no checkpoint .UnpicklingError.; .*no checkpoint .UnpicklingError."):
        run(tmp_path)
    assert not (tmp_path / "harm").exists()
    torch.load(tmp_path / NAME / "checkpoint.pt", weights_only=False)  # unpickled directly, it does harm
    assert (tmp_path / "harm").exists()


def test_a_crash_while_saving_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    run(tmp_path)
    folder = tmp_path / NAME
    before = (folder / "checkpoint.pt").read_bytes()

    def crash(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", crash)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.write(folder, {"identity": {}, "state": {"iteration": 99}})
    assert (folder / "checkpoint.pt").read_bytes() == before
    assert checkpoint_of(folder)["iteration"] == 12


def test_a_folder_in_use_is_refused_and_not_moved(tmp_path):
    with locked(tmp_path / NAME):
        for fresh in (False, True):
            with pytest.raises(FolderBusy, match=NAME.replace("+", ".")):
                run(tmp_path, fresh=fresh)
        assert [path.name for path in tmp_path.iterdir()] == [NAME]
    assert run(tmp_path).status == "complete"


def test_a_busy_folder_names_its_holder(tmp_path):
    with locked(tmp_path / NAME):
        with pytest.raises(FolderBusy, match=rf"^process {os.getpid()} on {socket.gethostname()} \(since 20.* UTC\)"):
            run(tmp_path)


def test_a_folder_that_is_moved_aside_before_it_is_locked_is_made_anew(tmp_path, monkeypatch):
    """Between opening the lock and locking it, another process may begin the run anew."""
    folder, flock = tmp_path / "run", fcntl.flock
    (folder / "tensorboard").mkdir(parents=True)

    def late(*arguments):
        monkeypatch.undo()
        files.move_aside(folder)
        flock(*arguments)

    monkeypatch.setattr(fcntl, "flock", late)
    with locked(folder):
        assert not (folder / "tensorboard").exists(), "the folder is the old one"
        assert files.holder(folder).pid == os.getpid()
        with pytest.raises(FolderBusy), locked(folder):
            pass
    assert files.holder(tmp_path / "run.old-1") is None


def test_nobody_holds_the_folders_of_ended_runs(tmp_path):
    run(tmp_path)
    assert run(tmp_path, fresh=True).interruptions == 0
    assert {path.name for path in tmp_path.iterdir()} == {NAME, f"{NAME}.old-1"}
    for folder in tmp_path.iterdir():
        assert files.holder(folder) is None
    with locked(tmp_path / f"{NAME}.old-1"):
        pass


def test_a_killed_process_loses_its_lock_and_is_named(tmp_path):
    """The file with the holder's name stays, but the lock ends with the process."""
    code = f"""
import time
from pathlib import Path
from memcnn.training.files import locked
with locked(Path({str(tmp_path / NAME)!r})):
    print("held", flush=True)
    time.sleep(600)
"""
    process = commands.start("-c", code, output=tmp_path / "output", errors=tmp_path / "errors")
    try:
        while not (tmp_path / "output").exists() or (tmp_path / "output").read_text() != "held\n":
            assert process.exitcode is None, (tmp_path / "errors").read_text()
            time.sleep(0.01)
        with pytest.raises(FolderBusy, match=f"^process {process.pid} on "), locked(tmp_path / NAME):
            pass
    finally:
        process.kill()
        process.join()
    with locked(tmp_path / NAME) as dead:
        assert dead.startswith(f"process {process.pid} on ")


def test_a_complete_run_on_other_unofficial_files_is_refused(tmp_path, monkeypatch):
    def load(dataset, data, *, unofficial):
        return replace(DATA, checksums={"test_batch": data})

    monkeypatch.setattr(cifar_data, "load", load)
    assert run(tmp_path, data="one", unofficial_data=True).status == "complete"
    assert run(tmp_path, data="one", unofficial_data=True).interruptions == 0
    with pytest.raises(BadCheckpoint, match="record.json belongs to another run: data checksums is .*one.* there"):
        run(tmp_path, data="two", unofficial_data=True)
