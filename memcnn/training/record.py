"""The record of one run: what ran, where, how far it came, and what it reached.

RUNS/<model>-<dataset>-<recipe>-s<seed>/record.json is written by training and read by the reports, both through this
file.
"""

import json
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from memcnn.models.resnet import MODELS
from memcnn.training.files import write_by_rename
from memcnn.training.recipe import PUBLISHED, Recipe

SCHEMA = 1
FILE_NAME = "record.json"
NUM_CLASSES = {"cifar10": 10, "cifar100": 100}
DATASETS = tuple(NUM_CLASSES)
STATUSES = ("complete", "partial", "failed")
COUNTS = ("seed", "iterations", "interruptions", "parameters", "parameter_bytes", "peak_bytes", "activation_bytes")
SOFTWARE = ("memcnn", "python", "torch", "torchvision", "platform")


class BadRecord(ValueError):
    """A record that cannot be trusted; the message names the file and the reason."""


def run_name(model: str, dataset: str, recipe: Recipe, seed: int) -> str:
    """The name of a run's folder."""
    return f"{model}-{dataset}-{recipe.name}-s{seed}"


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One run.

    status: "complete" when all of the recipe's iterations are done and evaluated, "partial" while it runs (reason None)
    or where it was stopped, "failed" when a loss or a weight was no number.
    test_accuracy (percent), test_loss (nats): of the last evaluation, at `test_iteration`; None before the first.
    train_seconds: without start-up, evaluation and checkpoints. interruptions: how often the run was taken up again.
    peak_bytes, activation_bytes: of one training step, see memcnn.testing.memory.
    commit, clean: the package's commit, and whether its folder was as committed; None outside a git checkout.
    engine: False when a RevNet ran as plain autograd.
    Where a run was taken up again, device, software and commit are those of the last time.
    """

    model: str
    dataset: str
    seed: int
    recipe: Recipe
    status: str
    reason: str | None
    iterations: int
    test_accuracy: float | None
    test_loss: float | None
    test_iteration: int | None
    train_seconds: float
    interruptions: int
    parameters: int
    parameter_bytes: int
    peak_bytes: int
    activation_bytes: int
    device: dict
    software: dict
    commit: str | None
    clean: bool | None
    data: dict
    engine: bool
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        _validate(self)

    @property
    def is_full(self) -> bool:
        """Whether this run may stand beside published numbers."""
        published = self.recipe == PUBLISHED and not self.splits_batch_norm
        return self.status == "complete" and published and self.data["official"] and self.engine

    @property
    def splits_batch_norm(self) -> bool:
        """Whether several processes each normalised by their own share of a batch, which no published run did."""
        return self.device["count"] > 1 and "sync-batch-norm" not in (self.software.get("execution") or "")

    @property
    def data_kind(self) -> str:
        """What it was trained and evaluated on, in words: "official", "generated" or "not the official files"."""
        if self.data["official"]:
            return "official"
        return "generated" if "generated" in self.data["checksums"] else "not the official files"

    @property
    def mark(self) -> str:
        """What its result is shown with, in brackets; nothing on official data."""
        return {"official": "", "generated": " (generated data)"}.get(self.data_kind, f" ({self.data_kind})")

    def write(self, folder: str | Path) -> Path:
        """Write record.json into `folder`, by rename; its path."""
        path = Path(folder) / FILE_NAME
        values = {"schema": self.schema, **asdict(self), "recipe": self.recipe.to_dict()}
        write_by_rename(path, (json.dumps(values, indent=1, allow_nan=False) + "\n").encode())
        return path


def load(path: str | Path) -> RunRecord:
    """The record of a run's folder, or of a record.json; BadRecord when it is not a valid one."""
    path = Path(path)
    if path.is_dir():
        path = path / FILE_NAME
    try:
        values = json.loads(path.read_text("utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"got {type(values).__name__}, wanted an object")
        if values.get("schema") != SCHEMA:
            raise ValueError(f"schema is {values.get('schema')!r}, this version reads {SCHEMA}")
        wanted = {field.name for field in fields(RunRecord)}
        if set(values) != wanted:
            raise ValueError(f"missing fields {sorted(wanted - set(values))}, unknown {sorted(set(values) - wanted)}")
        if not isinstance(values["recipe"], dict):
            raise ValueError(f"recipe: got {values['recipe']!r}, wanted an object")
        return RunRecord(**{**values, "recipe": Recipe.from_dict(values["recipe"])})
    except (OSError, ValueError, RecursionError) as error:
        raise BadRecord(f"{path}: {error}") from error


def load_all(*folders: str | Path) -> tuple[list[tuple[Path, RunRecord]], list[str]]:
    """The records of the runs that lie directly in `folders`, each with its folder, and what is wrong with others.

    Runs that were moved aside (NAME.old-1 ...) are passed over, and so is a folder that does not exist.
    """
    records, problems = [], []
    for path in sorted({path for folder in folders for path in Path(folder).glob(f"*/{FILE_NAME}")}):
        if re.search(r"\.old-\d+$", path.parent.name):
            continue
        try:
            records.append((path.parent, load(path)))
        except BadRecord as error:
            problems.append(str(error))
    return records, problems


def _validate(record: RunRecord) -> None:
    for name, choices in (("model", tuple(MODELS)), ("dataset", DATASETS), ("status", STATUSES)):
        _check(getattr(record, name) in choices, name, getattr(record, name), f"one of {', '.join(choices)}")
    for name in COUNTS:
        _check(_is_count(getattr(record, name)), name, getattr(record, name), "a whole number of at least 0")
    _check(_is_number(record.train_seconds), "train_seconds", record.train_seconds, "a number of at least 0")
    for name in ("reason", "commit"):
        value = getattr(record, name)
        _check(value is None or isinstance(value, str), name, value, "text or null")
    _check(record.clean is None or isinstance(record.clean, bool), "clean", record.clean, "true, false or null")
    _check(isinstance(record.engine, bool), "engine", record.engine, "true or false")

    accuracy, loss, at = record.test_accuracy, record.test_loss, record.test_iteration
    if (accuracy, loss, at) != (None, None, None):
        _check(_is_number(accuracy) and accuracy <= 100, "test_accuracy", accuracy, "a number from 0 to 100")
        _check(_is_number(loss), "test_loss", loss, "a number of at least 0")
        _check(_is_count(at) and at <= record.iterations, "test_iteration", at, f"at most {record.iterations}, as done")
    done, planned = record.iterations, record.recipe.iterations
    _check(done <= planned, "iterations", done, f"at most the recipe's {planned}")
    if record.status == "complete":
        _check(done == planned, "iterations", done, f"the recipe's {planned} in a complete run")
        _check(record.test_iteration == done, "test_iteration", record.test_iteration, f"{done} in a complete run")
        _check(record.reason is None, "reason", record.reason, "null in a complete run")
    if record.status == "failed":
        _check(record.reason is not None, "reason", record.reason, "text in a failed run")

    _check_keys("device", record.device, {"type": str, "name": str, "count": int, "threads": int})
    _check_keys("data", record.data, {"official": bool, "checksums": dict})
    sums = record.data["checksums"]
    _check(sums and all(isinstance(text, str) for text in sums.values()), "data.checksums", sums, "MD5 by file name")
    versions = record.software
    right = isinstance(versions, dict) and all(value is None or isinstance(value, str) for value in versions.values())
    _check(right and set(SOFTWARE) <= set(versions), "software", versions, f"versions of {', '.join(SOFTWARE)}")


def _check(right: bool, name: str, got: object, wanted: str) -> None:
    if not right:
        raise ValueError(f"{name}: got {got!r}, wanted {wanted}")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and _is_number(value)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 2**63


def _check_keys(name: str, value: object, kinds: dict[str, type]) -> None:
    right = isinstance(value, dict) and set(value) == set(kinds)
    _check(right, name, value, f"an object with {', '.join(kinds)}")
    for key, kind in kinds.items():
        _check(isinstance(value[key], kind), f"{name}.{key}", value[key], kind.__name__)
