"""Fixtures that make records of runs, and write them to folders."""

import dataclasses

import pytest

from memcnn.training.recipe import PUBLISHED
from memcnn.training.record import RunRecord, run_name

FULL = RunRecord(
    model="resnet32",
    dataset="cifar10",
    seed=0,
    recipe=PUBLISHED,
    status="complete",
    reason=None,
    iterations=80_000,
    test_accuracy=92.7,
    test_loss=0.31,
    test_iteration=80_000,
    train_seconds=6660.0,
    interruptions=0,
    parameters=466_906,
    parameter_bytes=1_867_624,
    peak_bytes=300_000_000,
    activation_bytes=250_000_000,
    device={"type": "cpu", "name": "Some Processor", "count": 1, "threads": 2},
    software={"memcnn": "2.0.0", "python": "3.11.7", "torch": "2.13.0", "torchvision": "0.28.0", "platform": "Linux"},
    commit="0123456789abcdef",
    clean=True,
    data={"official": True, "checksums": {"data_batch_1": "c99cafc152244af753f735de768cd75f"}},
    engine=True,
)


@pytest.fixture(scope="session")
def full():
    """Return a function that returns a full run of ResNet-32 on CIFAR-10 with changed fields."""
    return lambda **changes: dataclasses.replace(FULL, **{"segments": (), **changes})


@pytest.fixture(scope="session")
def put():
    """Return a function that writes a record, and optionally its curve.csv, to a folder below ``root``."""

    def write(root, record, curve=None):
        folder = root / run_name(record.model, record.dataset, record.recipe, record.seed)
        folder.mkdir(parents=True, exist_ok=True)
        record.write(folder)
        if curve is not None:
            (folder / "curve.csv").write_text(curve)
        return folder

    return write
