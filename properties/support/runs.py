"""A training run that takes milliseconds, and functions that read and compare its files."""

import csv
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from tensorboardX.proto.event_pb2 import Event, SessionLog
from torch import nn

from memcnn import data as cifar_data
from memcnn import train as command_line
from memcnn.data import images
from memcnn.models.resnet import MODELS
from memcnn.training.execution import Execution
from memcnn.training.recipe import SMOKE, override
from memcnn.training.record import RunRecord, load, run_name
from memcnn.training.step import EVALUATION_BATCHES
from memcnn.training.stopping import Stop
from memcnn.training.trainer import PLAIN, Job, Place, train

DATA = cifar_data.generate(10, train=40, test=50)
# Five iterations an epoch; evaluations after 5, 10 and 12 iterations, in three parts; a milestone inside an epoch
RECIPE = override(SMOKE, batch_size=8, iterations=12, milestones=(7, 11), evaluate_every=5, test_images=45)
NAME = run_name("resnet32", "cifar10", RECIPE, 0, data="generated")
OF_A_SESSION = ("train_seconds", "interruptions", "commit", "clean", "segments")
"""Fields of a record that depend on the sessions in which a run was trained."""


def tiny(num_classes: int = 10, *, disable: bool = False) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 4, stride=4), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(256, num_classes)
    )


@contextmanager
def tiny_training() -> Iterator[pytest.MonkeyPatch]:
    """Replace every run by a tiny one (model resnet32, data "generated") inside the context."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "resnet32", tiny)
        patch.setattr(images, "generate", lambda num_classes: DATA)
        patch.setitem(EVALUATION_BATCHES, "cpu", 20)
        yield patch


class Slow(nn.Module):
    """The tiny network. A training step takes 50 ms, and an evaluation ``evaluation_seconds``."""

    def __init__(self, evaluation_seconds: float = 0.0) -> None:
        super().__init__()
        self.inner, self.evaluation_seconds = tiny(), evaluation_seconds

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        time.sleep(0.05 if self.training else self.evaluation_seconds)
        return self.inner(images)


def run(runs: Path, *, execution: Execution = PLAIN, budget_seconds: float | None = None, **options) -> RunRecord:
    """Train the tiny network; ``options`` are fields of ``Job`` and ``Place``."""
    return train(job_of(**options), execution, place_of(runs, **options), budget_seconds=budget_seconds)


@contextmanager
def stopped_after(questions: int) -> Iterator[None]:
    """Within this context a run asks ``questions`` times whether to stop, and then stops."""
    answers = iter([None] * questions)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stop, "reason", lambda self, needed_seconds: next(answers, "interrupted"))
        yield


def tiny_command(runs, *more: str) -> int:
    """Run ``memcnn.train`` on the tiny network with further arguments; return the exit status."""
    words = "resnet32 cifar10 --recipe smoke --data generated --batch-size 8 --test-images 20".split()
    return command_line.main([*words, "--runs", str(runs), *more])


def job_of(**options) -> Job:
    """Return the job of the tiny run, with the fields of ``Job`` among ``options``."""
    names = {field.name for field in fields(Job)}
    given = {name: value for name, value in options.items() if name in names}
    assert set(options) <= names | {field.name for field in fields(Place)}, options
    return Job(**{"model": "resnet32", "dataset": "cifar10", "recipe": RECIPE} | given)


def place_of(runs: Path, **options) -> Place:
    """Return the place of the tiny run, with the fields of ``Place`` among ``options``."""
    names = {field.name for field in fields(Place)}
    given = {name: value for name, value in options.items() if name in names}
    return Place(**{"data": "generated", "device": "cpu", "progress": False} | given, runs=runs)


def checkpoint_of(folder: Path) -> dict:
    """Return the state in a run's checkpoint."""
    return torch.load(folder / "checkpoint.pt", weights_only=True)["state"]


def curve_of(folder: Path) -> list[dict]:
    """Return the rows of a run's curve.csv."""
    with open(folder / "curve.csv", newline="") as file:
        return list(csv.DictReader(file))


def scalars(folder: Path) -> list[tuple[str, int, float]]:
    """Return (name, iteration, value) for each point that TensorBoard shows, without points that a restart purged."""
    shown = []
    for path in sorted((folder / "tensorboard").iterdir(), key=lambda path: path.name):
        content = path.read_bytes()
        while len(content) >= 12:
            (length,) = struct.unpack("<Q", content[:8])
            if len(content) < 16 + length:  # truncated by a kill: TensorBoard continues with the next file
                break
            event = Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]
            if event.session_log.status == SessionLog.START:
                shown = [entry for entry in shown if entry[1] < event.step]
            shown += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
    return sorted(shown)


def assert_same_run(folder: Path, expected: Path) -> None:
    """Assert that two folders hold the same weights, momenta, curve, record and points of TensorBoard, to the bit.

    Times and other values that depend on the sessions may differ.

    Args:
        folder: the folder of a run.
        expected: the folder of the run that it should equal.
    """
    state, wanted = checkpoint_of(folder), checkpoint_of(expected)
    for part in ("model", "optimizer"):
        torch.testing.assert_close(state[part], wanted[part], rtol=0, atol=0)
    rows, wanted_rows = curve_of(folder), curve_of(expected)
    assert [without(row, "train_seconds") for row in rows] == [without(row, "train_seconds") for row in wanted_rows]
    assert without(vars(load(folder)), *OF_A_SESSION) == without(vars(load(expected)), *OF_A_SESSION)
    assert scalars(folder) == scalars(expected)


def without(values: dict, *names: str) -> dict:
    """Return a dict without some keys."""
    return {name: value for name, value in values.items() if name not in names}
