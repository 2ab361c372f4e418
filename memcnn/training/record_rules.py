"""The rules that a record keeps: the range of each field, and the relations between fields."""

import math
from typing import TYPE_CHECKING

from memcnn.datasets import NUM_CLASSES
from memcnn.models.resnet import MODELS
from memcnn.training.segment import Segment, check_origin
from memcnn.training.validation import check, check_keys, is_count, is_number

if TYPE_CHECKING:
    from memcnn.training.record import RunRecord

DATASETS = tuple(NUM_CLASSES)
STATUSES = ("complete", "partial", "failed")
COUNTS = ("seed", "iterations", "interruptions", "parameters", "parameter_bytes", "peak_bytes", "activation_bytes")
PLAIN = "float32"
"""The execution in records without one."""


def validate(record: "RunRecord") -> None:
    """Raise ValueError if a field of a record, or a combination of fields, is impossible. Segments are not checked."""
    for name, choices in (("model", tuple(MODELS)), ("dataset", DATASETS), ("status", STATUSES)):
        check(getattr(record, name) in choices, name, getattr(record, name), f"one of {', '.join(choices)}")
    for name in COUNTS:
        check(is_count(getattr(record, name)), name, getattr(record, name), "a whole number of at least 0")
    check(is_number(record.train_seconds), "train_seconds", record.train_seconds, "a number of at least 0")
    check(record.reason is None or isinstance(record.reason, str), "reason", record.reason, "text or null")
    check(isinstance(record.engine, bool), "engine", record.engine, "true or false")
    check_origin(device=record.device, software=record.software, commit=record.commit, clean=record.clean)

    accuracy, loss, at = record.test_accuracy, record.test_loss, record.test_iteration
    if (accuracy, loss, at) != (None, None, None):
        check(is_number(accuracy) and accuracy <= 100, "test_accuracy", accuracy, "a number from 0 to 100")
        check(is_number(loss), "test_loss", loss, "a number of at least 0")
        check(is_count(at) and at <= record.iterations, "test_iteration", at, f"at most {record.iterations}, as done")
    done, planned = record.iterations, record.recipe.iterations
    check(done <= planned, "iterations", done, f"at most the recipe's {planned}")
    if record.status == "complete":
        check(done == planned, "iterations", done, f"the recipe's {planned} in a complete run")
        check(record.test_iteration == done, "test_iteration", record.test_iteration, f"{done} in a complete run")
        check(record.reason is None, "reason", record.reason, "null in a complete run")
    if record.status == "failed":
        check(record.reason is not None, "reason", record.reason, "text in a failed run")

    check_keys("data", record.data, {"official": bool, "checksums": dict})
    sums = record.data["checksums"]
    check(sums and all(isinstance(text, str) for text in sums.values()), "data.checksums", sums, "MD5 by file name")


def validate_segments(record: "RunRecord") -> None:
    """Raise ValueError if the segments leave a gap, or contradict the record."""
    parts = record.segments
    right = isinstance(parts, tuple) and all(isinstance(part, Segment) for part in parts)
    check(right, "segments", parts, "a tuple of Segment")
    done = 0
    for number, part in enumerate(parts, 1):
        what = f"{done}, the iterations done before it (segments follow each other without gaps)"
        check(part.first == done, f"segments: first of number {number}", part.first, what)
        done = part.last
    check(done == record.iterations, "segments: last of the last", done, f"{record.iterations}, the run's iterations")
    seconds = sum(part.train_seconds for part in parts)
    right = math.isclose(seconds, record.train_seconds, rel_tol=1e-6, abs_tol=1e-3)
    check(right, "segments: sum of train_seconds", seconds, f"{record.train_seconds}, the run's training time")
    last = parts[-1]
    for name in ("device", "commit", "clean"):
        value, wanted = getattr(last, name), getattr(record, name)
        check(value == wanted, f"segments: {name} of the last", value, f"{wanted!r}, as the run's")
    versions = {**last.software, "execution": last.execution}
    wanted = {**record.software, "execution": record.software.get("execution") or PLAIN}
    check(versions == wanted, "segments: software and execution of the last", versions, f"{wanted!r}, as the run's")
