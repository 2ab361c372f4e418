"""What the tests of training share: a run that takes milliseconds, and ways to look at what it left."""

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
from memcnn.training.record import RunRecord, run_name
from memcnn.training.step import EVALUATION_BATCHES
from memcnn.training.trainer import PLAIN, Job, Place, train

DATA = cifar_data.generate(10, train=40, test=50)
# five iterations an epoch; evaluations after 5, 10 and 12 iterations, in three parts; a milestone inside an epoch
RECIPE = override(SMOKE, batch_size=8, iterations=12, milestones=(7, 11), evaluate_every=5, test_images=45)
NAME = run_name("resnet32", "cifar10", RECIPE, 0, data="generated")


def tiny(num_classes: int = 10, *, disable: bool = False) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 4, stride=4), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(256, num_classes)
    )


@contextmanager
def tiny_training() -> Iterator[pytest.MonkeyPatch]:
    """Within it every run is a tiny one: model resnet32, data "generated"."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "resnet32", tiny)
        patch.setattr(images, "generate", lambda num_classes: DATA)
        patch.setitem(EVALUATION_BATCHES, "cpu", 20)
        yield patch


class Slow(nn.Module):
    """The tiny network, in 50 ms in training and as long as it is told in evaluation."""

    def __init__(self, evaluation_seconds: float = 0.0) -> None:
        super().__init__()
        self.inner, self.evaluation_seconds = tiny(), evaluation_seconds

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        time.sleep(0.05 if self.training else self.evaluation_seconds)
        return self.inner(images)


def run(runs: Path, *, execution: Execution = PLAIN, budget_seconds: float | None = None, **options) -> RunRecord:
    """The tiny run; ``options`` are fields of a `Job` and a `Place`."""
    return train(job_of(**options), execution, place_of(runs, **options), budget_seconds=budget_seconds)


def tiny_command(runs, *more: str) -> int:
    """Run ``memcnn.train`` on the tiny network with further arguments; return the exit status."""
    words = "resnet32 cifar10 --recipe smoke --data generated --batch-size 8 --test-images 20".split()
    return command_line.main([*words, "--runs", str(runs), *more])


def job_of(**options) -> Job:
    """The job of the tiny run, with the fields of a `Job` among ``options``."""
    names = {field.name for field in fields(Job)}
    given = {name: value for name, value in options.items() if name in names}
    assert set(options) <= names | {field.name for field in fields(Place)}, options
    return Job(**{"model": "resnet32", "dataset": "cifar10", "recipe": RECIPE} | given)


def place_of(runs: Path, **options) -> Place:
    """The place of the tiny run, with the fields of a `Place` among ``options``."""
    names = {field.name for field in fields(Place)}
    given = {name: value for name, value in options.items() if name in names}
    return Place(**{"data": "generated", "device": "cpu", "progress": False} | given, runs=runs)


def checkpoint_of(folder: Path) -> dict:
    """The state in a run's checkpoint."""
    return torch.load(folder / "checkpoint.pt", weights_only=True)["state"]


def curve_of(folder: Path) -> list[dict]:
    with open(folder / "curve.csv", newline="") as file:
        return list(csv.DictReader(file))


def scalars(folder: Path) -> list[tuple[str, int, float]]:
    """What TensorBoard shows of a run: (name, iteration, value), after what a restart declared void is dropped."""
    shown = []
    for path in sorted((folder / "tensorboard").iterdir(), key=lambda path: path.name):
        content = path.read_bytes()
        while len(content) >= 12:
            (length,) = struct.unpack("<Q", content[:8])
            if len(content) < 16 + length:  # cut short by a kill: TensorBoard goes on to the next file
                break
            event = Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]
            if event.session_log.status == SessionLog.START:
                shown = [entry for entry in shown if entry[1] < event.step]
            shown += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
    return sorted(shown)


def without(values: dict, *names: str) -> dict:
    return {name: value for name, value in values.items() if name not in names}
