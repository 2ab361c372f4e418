"""The record of one run: what ran, where and how it was computed, how far it came, and what it reached.

Training writes RUNS/<run_name>/record.json, and the reports read it, both through this file.
"""

import json
import math
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from memcnn.datasets import NUM_CLASSES
from memcnn.models.resnet import MODELS
from memcnn.training.files import write_by_rename
from memcnn.training.recipe import PUBLISHED, Recipe

SCHEMA = 2
FILE_NAME = "record.json"
DATASETS = tuple(NUM_CLASSES)
STATUSES = ("complete", "partial", "failed")
COUNTS = ("seed", "iterations", "interruptions", "parameters", "parameter_bytes", "peak_bytes", "activation_bytes")
SOFTWARE = ("memcnn", "python", "torch", "torchvision", "platform")
DEVICE = {"type": str, "name": str, "count": int, "threads": int}
DATA_SUFFIXES = {"official": "", "generated": "-generated", "unofficial": "-unofficial"}  # of a run's name
PLAIN = "float32"  # the execution of records that name none


class BadRecord(ValueError):
    """A record that cannot be trusted; the message names the file and the reason."""


def run_name(
    model: str,
    dataset: str,
    recipe: Recipe,
    seed: int,
    *,
    data: str = "official",
    engine: bool = True,
    processes: int = 1,
) -> str:
    """Return the name of a run's folder.

    Runs that compute different things never share a folder. A run on the official files, with the reversible engine, in
    one process, is called "revnet38-cifar10-published-s0"; anything else is appended, as "-generated-plain-p2".

    Args:
        model, dataset, recipe, seed: what the run trains, on what, and how.
        data: "official", "generated", or "unofficial" for files with other checksums (``memcnn.data.Data.kind``).
        engine: False where RevNets run as plain autograd.
        processes: how many processes share each batch.
    Raises:
        ValueError: when ``data`` is another word, or ``processes`` is below 1.
    """
    _check(data in DATA_SUFFIXES, "data", data, f"one of {', '.join(DATA_SUFFIXES)}")
    _check(_is_count(processes) and processes >= 1, "processes", processes, "a whole number of at least 1")
    suffix = DATA_SUFFIXES[data] + ("" if engine else "-plain") + ("" if processes == 1 else f"-p{processes}")
    return f"{model}-{dataset}-{recipe.name}-s{seed}{suffix}"


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A part of a run that was computed without interruption, in one way, on one device.

    Attributes:
        first: iterations done before the segment.
        last: iterations done after it.
        execution: how its steps were executed, as ``str(Execution)``.
        device: type, name, count and CPU threads of the device.
        software: versions of the software, as ``environment.software_versions()``.
        commit: the package's commit; None outside a git checkout.
        clean: whether the package's folder was as committed; None outside a git checkout.
        shared_by: largest number of runs that trained on the device at the same time, this one included; 1 means alone.
        train_seconds: training time of the segment, without start-up, compilation, evaluation and checkpoints.
    """

    first: int
    last: int
    execution: str
    device: dict
    software: dict
    commit: str | None
    clean: bool | None
    shared_by: int
    train_seconds: float

    def __post_init__(self) -> None:
        for name, least in (("first", 0), ("last", 0), ("shared_by", 1)):
            value = getattr(self, name)
            _check(_is_count(value) and value >= least, name, value, f"a whole number of at least {least}")
        _check(self.last >= self.first, "last", self.last, f"at least {self.first}, the segment's first")
        _check(isinstance(self.execution, str) and self.execution != "", "execution", self.execution, "text")
        _check(_is_number(self.train_seconds), "train_seconds", self.train_seconds, "a number of at least 0")
        _check_origin(self)

    @property
    def iterations(self) -> int:
        """Number of iterations that the segment computed."""
        return self.last - self.first

    @classmethod
    def from_dict(cls, values: object) -> "Segment":
        """Return the inverse of ``dataclasses.asdict``; ValueError for anything else."""
        _check(isinstance(values, dict), "segment", values, "an object")
        _check_fields(cls, values)
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One run.

    ``device``, ``software`` (versions, and "execution"), ``commit`` and ``clean`` are those of the last segment.

    Attributes:
        status: "complete" when all of the recipe's iterations are done and evaluated; "partial" while the run goes on
            (reason None) or after it was stopped; "failed" when a loss or a weight was not finite.
        test_accuracy: of the last evaluation, in percent; None before the first.
        test_loss: of the last evaluation, in nats; None before the first.
        test_iteration: iterations done at the last evaluation; None before the first.
        train_seconds: without start-up, compilation, evaluation and checkpoints.
        interruptions: how often the run was resumed.
        peak_bytes: of one training step, see ``memcnn.testing.memory``; ``activation_bytes`` likewise.
        commit: the package's commit; None outside a git checkout.
        clean: whether the package's folder was as committed; None outside a git checkout.
        engine: False when a RevNet ran as plain autograd.
        segments: how each part of the run was computed, in order and without gaps. By default a single segment, from
            the record's other fields. Records of schema 1 are read in this way: they only say how the last part of a
            run was computed, so an interrupted one may have been mixed without our knowledge.
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
    segments: tuple[Segment, ...] = ()
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        _validate(self)
        if self.segments == ():
            object.__setattr__(self, "segments", (_only_segment(self),))
        _validate_segments(self)

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        kind = {"not the official files": "unofficial"}.get(self.data_kind, self.data_kind)
        processes = self.device["count"]
        return run_name(
            self.model, self.dataset, self.recipe, self.seed, data=kind, engine=self.engine, processes=processes
        )

    @property
    def is_full(self) -> bool:
        """Whether this run may stand beside published numbers; a mixed run is listed apart, with its mark."""
        published = self.recipe == PUBLISHED and not self.splits_batch_norm and not self.mixed
        return self.status == "complete" and published and self.data["official"] and self.engine

    @property
    def mixed(self) -> bool:
        """Whether parts of the run were executed in different ways, or on different types of device."""
        return len({(part.execution, part.device["type"]) for part in self.segments if part.iterations}) > 1

    @property
    def shared_by(self) -> int:
        """Largest number of runs that trained on the device at the same time; 1 means that this run was alone."""
        return max(part.shared_by for part in self.segments)

    @property
    def splits_batch_norm(self) -> bool:
        """Whether several processes each normalised by their own share of a batch, which no published run did."""
        return self.device["count"] > 1 and "sync-batch-norm" not in (self.software.get("execution") or "")

    @property
    def data_kind(self) -> str:
        """What the run was trained and evaluated on: "official", "generated" or "not the official files"."""
        if self.data["official"]:
            return "official"
        return "generated" if "generated" in self.data["checksums"] else "not the official files"

    @property
    def mark(self) -> str:
        """What the result is shown with, in brackets: the data unless official, and whether the execution was mixed."""
        data = {"official": "", "generated": " (generated data)"}.get(self.data_kind, f" ({self.data_kind})")
        return data + (" (mixed execution)" if self.mixed else "")

    def write(self, folder: str | Path) -> Path:
        """Write record.json into ``folder``, by rename, and return its path."""
        path = Path(folder) / FILE_NAME
        values = {"schema": self.schema, **asdict(self), "recipe": self.recipe.to_dict()}
        write_by_rename(path, (json.dumps(values, indent=1, allow_nan=False) + "\n").encode())
        return path


def load(path: str | Path) -> RunRecord:
    """Return the record in a run's folder, or in a record.json; raise BadRecord when it is not a valid one."""
    path = Path(path)
    if path.is_dir():
        path = path / FILE_NAME
    try:
        return _parse(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        raise BadRecord(f"{path}: {error}") from error


def _parse(values: object) -> RunRecord:
    if not isinstance(values, dict):
        raise ValueError(f"got {type(values).__name__}, wanted an object")
    schema = values.get("schema")
    if isinstance(schema, bool) or schema not in (1, SCHEMA):
        raise ValueError(f"schema is {schema!r}, this version reads 1 and {SCHEMA}")
    if schema == 1:
        values = {**values, "schema": SCHEMA}
        _check_fields(RunRecord, values, without="segments")
        values = _name_deterministic_kernels(values)
    else:
        _check_fields(RunRecord, values)
        parts = values["segments"]
        _check(isinstance(parts, list) and parts != [], "segments", parts, "a list of at least one segment")
        values = {**values, "segments": tuple(_segment(number, part) for number, part in enumerate(parts, 1))}
    if not isinstance(values["recipe"], dict):
        raise ValueError(f"recipe: got {values['recipe']!r}, wanted an object")
    return RunRecord(**{**values, "recipe": Recipe.from_dict(values["recipe"])})


def _name_deterministic_kernels(values: dict) -> dict:
    """Complete the execution of a record of schema 1: runs on a GPU always used deterministic kernels then."""
    device, software = values["device"], values["software"]
    on_gpu = isinstance(device, dict) and device.get("type") == "cuda"
    execution = software.get("execution") if isinstance(software, dict) else None
    if not on_gpu or not isinstance(execution, str):
        return values
    return {**values, "software": {**software, "execution": f"{execution}, deterministic"}}


def _segment(number: int, values: object) -> Segment:
    try:
        return Segment.from_dict(values)
    except ValueError as error:
        raise ValueError(f"segments: number {number}: {error}") from None


def load_all(*folders: str | Path) -> tuple[list[tuple[Path, RunRecord]], list[str]]:
    """Return the records of the runs that lie directly in ``folders``, each with its folder, and the others' faults.

    Runs that were moved aside (NAME.old-1 ...) are left out, and so is a folder that does not exist.
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
    _check(record.reason is None or isinstance(record.reason, str), "reason", record.reason, "text or null")
    _check(isinstance(record.engine, bool), "engine", record.engine, "true or false")
    _check_origin(record)

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

    _check_keys("data", record.data, {"official": bool, "checksums": dict})
    sums = record.data["checksums"]
    _check(sums and all(isinstance(text, str) for text in sums.values()), "data.checksums", sums, "MD5 by file name")


def _validate_segments(record: RunRecord) -> None:
    parts = record.segments
    right = isinstance(parts, tuple) and all(isinstance(part, Segment) for part in parts)
    _check(right, "segments", parts, "a tuple of Segment")
    done = 0
    for number, part in enumerate(parts, 1):
        what = f"{done}, the iterations done before it (segments follow each other without gaps)"
        _check(part.first == done, f"segments: first of number {number}", part.first, what)
        done = part.last
    _check(done == record.iterations, "segments: last of the last", done, f"{record.iterations}, the run's iterations")
    seconds = sum(part.train_seconds for part in parts)
    right = math.isclose(seconds, record.train_seconds, rel_tol=1e-6, abs_tol=1e-3)
    _check(right, "segments: sum of train_seconds", seconds, f"{record.train_seconds}, the run's training time")
    last = parts[-1]
    for name in ("device", "commit", "clean"):
        value, wanted = getattr(last, name), getattr(record, name)
        _check(value == wanted, f"segments: {name} of the last", value, f"{wanted!r}, as the run's")
    versions = {**last.software, "execution": last.execution}
    wanted = {**record.software, "execution": record.software.get("execution") or PLAIN}
    _check(versions == wanted, "segments: software and execution of the last", versions, f"{wanted!r}, as the run's")


def _only_segment(record: RunRecord) -> Segment:
    """Return the segment of a run that only says how its last part was computed."""
    versions = dict(record.software)
    execution = versions.pop("execution", None) or PLAIN
    return Segment(
        first=0,
        last=record.iterations,
        execution=execution,
        device=record.device,
        software=versions,
        commit=record.commit,
        clean=record.clean,
        shared_by=1,
        train_seconds=record.train_seconds,
    )


def _check_origin(record: RunRecord | Segment) -> None:
    """Check where a run or a segment was computed: its device, software, commit."""
    commit, clean, versions = record.commit, record.clean, record.software
    _check(commit is None or isinstance(commit, str), "commit", commit, "text or null")
    _check(clean is None or isinstance(clean, bool), "clean", clean, "true, false or null")
    _check_keys("device", record.device, DEVICE)
    _check(record.device["count"] >= 1, "device.count", record.device["count"], "at least 1")
    right = isinstance(versions, dict) and all(value is None or isinstance(value, str) for value in versions.values())
    _check(right and set(SOFTWARE) <= set(versions), "software", versions, f"versions of {', '.join(SOFTWARE)}")


def _check_fields(kind: type, values: dict, *, without: str | None = None) -> None:
    """Check that ``values`` has the fields of a dataclass, but for the one that is named."""
    wanted = {field.name for field in fields(kind)} - {without}
    if set(values) != wanted:
        raise ValueError(f"missing fields {sorted(wanted - set(values))}, unknown {sorted(set(values) - wanted)}")


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
