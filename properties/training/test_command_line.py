"""Tests of the command line: the arguments that it passes to training, its messages, and its exit statuses."""

import argparse
import re
import runpy
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import memcnn
from memcnn import cli
from memcnn import train as command
from memcnn.models.resnet import MODELS
from memcnn.training.execution import Execution
from memcnn.training.recipe import SMOKE, override
from memcnn.training.record import load
from memcnn.training.trainer import Job, Place, train
from properties.support.runs import tiny, tiny_command

PACKAGE = Path(memcnn.__file__).resolve().parent


@given(hours=st.integers(0, 99), minutes=st.integers(0, 99), seconds=st.integers(0, 99))
def test_hours_minutes_and_seconds_of_a_budget_add_up(hours, minutes, seconds):
    total = 3600 * hours + 60 * minutes + seconds
    assert cli.duration(f"{hours}h{minutes}m{seconds}s") == total
    assert cli.duration(f"{total}") == cli.duration(f"{total}s") == total
    assert cli.duration(f"{hours}h{minutes}m") == total - seconds


@pytest.mark.parametrize("text", ["", "soon", "-5", "5d", "9m1h", "1.5h", "nan"])
def test_a_budget_that_is_no_time_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="wanted a time like 90s, 9m or 1h30m"):
        cli.duration(text)


def test_every_hyper_parameter_can_be_given(tmp_path, monkeypatch):
    given_to_train = {}
    monkeypatch.setattr(command, "STARTED", time.monotonic() - 20)

    def train_nothing(*asked, **options):
        given_to_train.update(options, asked=asked)
        raise ZeroDivisionError

    monkeypatch.setattr(command, "train", train_nothing)
    words = """revnet38 cifar100 --recipe smoke --seed 5 --data generated --runs there --device cpu --fresh --disable
        --batch-size 3 --iterations 40 --learning-rate 0.2 --milestones 8,9 --decay 0.5 --momentum 0.8
        --weight-decay 0 --pad 1 --no-flip --evaluate-every 4 --test-images all --budget 1m""".split()
    with pytest.raises(ZeroDivisionError):
        command.main(words)
    assert given_to_train.pop("budget_seconds") == pytest.approx(60 - 20, abs=5)  # from the start of the process
    recipe = override(
        SMOKE, batch_size=3, iterations=40, learning_rate=0.2, milestones=(8, 9), decay=0.5, momentum=0.8,
        weight_decay=0.0, pad=1, flip=False, evaluate_every=4, test_images=None,
    )  # fmt: skip
    job = Job(model="revnet38", dataset="cifar100", recipe=recipe, seed=5, fresh=True, disable=True)
    place = Place(data="generated", runs="there", device="cpu")
    assert given_to_train == {"asked": (job, Execution(), place)}


def test_exit_statuses_and_last_lines(tiny_runs, tmp_path, monkeypatch, capsys):
    assert tiny_command(tmp_path, "--budget", "0.01", "--fresh") == 3
    stopped = capsys.readouterr().out
    assert re.search(r"not evaluated yet, partial, 0/12 iterations .* \(budget exhausted\); resume with: ", stopped)
    assert "--budget 0.01" in stopped and "--fresh" not in stopped
    assert tiny_command(tmp_path) == 0
    (folder,) = tmp_path.iterdir()
    complete = capsys.readouterr().out
    accuracy = f"test accuracy {load(folder).test_accuracy:.2f} % after iteration 12, complete, 12/12 iterations in "
    assert complete.startswith(f"resnet32 on cifar10 (generated data): {accuracy}") and str(folder) in complete
    assert tiny_command(tmp_path) == 0
    assert capsys.readouterr().out == complete

    def broken(num_classes, *, disable):
        model = tiny()
        model[4].weight.data.fill_(float("nan"))
        return model

    monkeypatch.setitem(MODELS, "resnet32", broken)
    assert tiny_command(tmp_path, "--seed", "1") == 1
    assert "(loss is nan at iteration 1); try again from the last good checkpoint with: " in capsys.readouterr().out


def test_a_batch_of_more_images_than_there_are_is_misuse(tiny_runs, tmp_path, capsys):
    with pytest.raises(SystemExit) as raised:
        tiny_command(tmp_path, "--batch-size", "41")
    assert raised.value.code == 2 and "there are only 40 images" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_missing_data_exits_with_1_and_says_how_to_get_it(tmp_path, monkeypatch, capsys):
    def refuse(*arguments, **options):
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    assert tiny_command(tmp_path / "runs", "--data", str(tmp_path / "data")) == 1
    assert "MEMCNN_DATA" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_interrupt_before_training_prints_no_traceback(tiny_runs, tmp_path, monkeypatch, capsys):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("memcnn.data.load", interrupted)
    assert tiny_command(tmp_path) == 3
    assert "Interrupted before training began" in capsys.readouterr().err


def test_as_a_script_train_imports_the_package_and_not_its_folder(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(PACKAGE), *sys.path])
    names = runpy.run_path(str(PACKAGE / "train.py"), run_name="script")
    assert str(PACKAGE) not in sys.path
    assert Path(sys.modules["memcnn"].__file__).parent == PACKAGE
    assert names["train"] is train
