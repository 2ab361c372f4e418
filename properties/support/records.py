"""Run records of every kind: complete, partial, failed, just started, and trained in several segments."""

from dataclasses import replace

from memcnn.training.recipe import PUBLISHED
from memcnn.training.record import RunRecord, Segment

FULL = RunRecord(
    model="revnet38", dataset="cifar10", seed=0, recipe=PUBLISHED, status="complete", reason=None, iterations=80_000,
    test_accuracy=92.7, test_loss=0.31, test_iteration=80_000, train_seconds=6660.0, interruptions=2,
    parameters=573_994, parameter_bytes=2_295_976, peak_bytes=110_000_000, activation_bytes=105_000_000,
    device={"type": "cpu", "name": "a processor", "count": 1, "threads": 2},
    software={"memcnn": "2", "python": "3.11", "torch": "2", "torchvision": "0", "cuda": None, "platform": "Linux"},
    commit="c0ffee", clean=True, data={"official": True, "checksums": {"data_batch_1": "c99cafc1"}}, engine=True,
)  # fmt: skip
GENERATED = {"official": False, "checksums": {"generated": "00"}}
"""The entry ``data`` of a run on generated images."""


def changed(written: RunRecord, **changes) -> RunRecord:
    """Return the record with changed fields; unless ``segments`` is given, with one segment that agrees with them."""
    return replace(written, **{"segments": (), **changes})


PARTIAL = changed(FULL, status="partial", reason="interrupted", iterations=700, test_iteration=500)
FAILED = changed(FULL, status="failed", reason="loss is nan at iteration 812", iterations=811, test_iteration=500)
STARTED = changed(PARTIAL, reason=None, iterations=3, test_accuracy=None, test_loss=None, test_iteration=None)


VERSIONS = FULL.software
GPU = {"type": "cuda", "name": "a GPU", "count": 1, "threads": 16}
ONE = Segment(
    first=0, last=30_000, execution="bf16, graph", device=GPU, software=VERSIONS, commit=None, clean=None, shared_by=4,
    train_seconds=1000.5,
)  # fmt: skip
TWO = replace(ONE, first=30_000, last=80_000, commit="c0ffee", clean=True, shared_by=2, train_seconds=2000.25)
OTHER = replace(TWO, execution="float32")


def in_segments(*segments: Segment) -> RunRecord:
    """Return ``FULL`` as a run that was trained in these segments."""
    last = segments[-1]
    origin = {name: getattr(last, name) for name in ("device", "commit", "clean")}
    software = {**last.software, "execution": last.execution}
    seconds = sum(part.train_seconds for part in segments)
    return replace(FULL, **origin, software=software, train_seconds=seconds, segments=segments)


PURE, MIXED = in_segments(ONE, TWO), in_segments(ONE, OTHER)
KINDS = {"full": FULL, "partial": PARTIAL, "failed": FAILED, "started": STARTED, "pure": PURE, "mixed": MIXED}

INCONSISTENT = [
    ("train_seconds", {"train_seconds": 10**400}),
    ("activation_bytes", {"activation_bytes": 10**400}),
    ("iterations", {"iterations": 79_999, "test_iteration": 79_500}),
    ("test_iteration", {"test_iteration": 79_500}),
    ("test_iteration", {"test_accuracy": None, "test_loss": None, "test_iteration": None}),
    ("test_accuracy", {"test_accuracy": None}),
    ("test_accuracy", {"test_accuracy": 100.5}),
    ("test_loss", {"test_loss": float("nan")}),
    ("train_seconds", {"train_seconds": -1.0}),
    ("reason", {"reason": "interrupted"}),
    ("reason", {"status": "failed"}),
    ("iterations", {"status": "partial", "iterations": 80_001}),
    ("test_iteration", {"status": "partial", "iterations": 700}),
    ("status", {"status": "finished"}),
    ("model", {"model": "resnet50"}),
    ("model", {"model": ["resnet32"]}),
    ("dataset", {"dataset": "mnist"}),
    ("seed", {"seed": True}),
    ("clean", {"clean": 1}),
    ("device", {"device": {"type": "cpu", "name": "a", "count": 1}}),
    ("device.threads", {"device": {**FULL.device, "threads": "2"}}),
    ("software", {"software": {**FULL.software, "cuda": 13.0}}),
    ("data.checksums", {"data": {"official": True, "checksums": {}}}),
    ("engine", {"engine": None}),
]
"""Pairs of a field and of changes to ``FULL`` that make the record raise an error about that field."""
