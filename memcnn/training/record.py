"""The record of one run: model, data and recipe, device and software, progress, accuracy, time and memory.

Training writes RUNS/<run_name>/record.json, and the reports read it, both through this file. ``record.schema.json``
describes the files for other programs. It cannot express relations between fields, which ``record_rules`` checks.

Neither pydantic nor msgspec would shorten this: most checks compare fields with each other, and messages with field,
value and wanted value would have to be rebuilt from theirs.
"""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from memcnn.training.files import write_by_rename
from memcnn.training.naming import DATA_SUFFIXES, run_name
from memcnn.training.recipe import PUBLISHED, Recipe
from memcnn.training.record_rules import DATASETS, PLAIN, validate, validate_segments
from memcnn.training.segment import Segment
from memcnn.training.validation import check, check_fields

__all__ = ["DATASETS", "DATA_SUFFIXES", "PLAIN", "BadRecord", "RunRecord", "Segment", "load", "load_all", "run_name"]

SCHEMA = 2
FILE_NAME = "record.json"


class BadRecord(ValueError):
    """A record that cannot be trusted; the message names the file and the reason."""


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """The record of one run. ``docs/howto/train.md`` explains each field.

    ``device``, ``software`` (versions, and "execution"), ``commit`` and ``clean`` are those of the last segment.

    Attributes:
        status: "complete" when all of the recipe's iterations are done and evaluated; "partial" while the run continues
            (reason None) or after it was stopped; "failed" when a loss or a weight was not finite.
        test_accuracy: accuracy at the last evaluation, in percent; None before the first.
        test_loss: loss at the last evaluation, in nats; None before the first.
        test_iteration: iterations done at the last evaluation; None before the first.
        train_seconds: seconds of training, without start-up, compilation, evaluation and checkpoints.
        interruptions: how often the run was resumed.
        peak_bytes: peak of one training step, see ``memcnn.memory.StepMemory``; ``activation_bytes`` likewise.
        commit: the package's commit; None outside a git checkout.
        clean: whether the package's folder was as committed; None outside a git checkout.
        engine: False if a RevNet ran with plain autograd, with all activations stored.
        segments: the execution of each part of the run, in order and without gaps. By default a single segment, made
            from the record's other fields, as for records of schema 1. Schema 1 knows only a run's last part, so
            ``mixed`` may be False for an interrupted run that was mixed.
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
        validate(self)
        if self.segments == ():
            object.__setattr__(self, "segments", (_only_segment(self),))
        validate_segments(self)

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        kind = {"not the official files": "unofficial"}.get(self.data_kind, self.data_kind)
        processes = self.device["count"]
        return run_name(
            self.model, self.dataset, self.recipe, self.seed, data=kind, engine=self.engine, processes=processes
        )

    @property
    def is_comparable(self) -> bool:
        """True if this run may be compared with published numbers. Runs with mixed execution are listed separately."""
        published = self.recipe == PUBLISHED and not self.splits_batch_norm and not self.mixed
        return self.status == "complete" and published and self.data["official"] and self.engine

    @property
    def mixed(self) -> bool:
        """True if parts of the run were executed in different ways, or on different types of device."""
        return len({(part.execution, part.device["type"]) for part in self.segments if part.iterations}) > 1

    @property
    def shared_by(self) -> int:
        """Largest number of runs that trained on the device at the same time; 1 means that this run was alone."""
        return max(part.shared_by for part in self.segments)

    @property
    def splits_batch_norm(self) -> bool:
        """True if several processes each normalised by their own share of a batch, which no published run did."""
        return self.device["count"] > 1 and "sync-batch-norm" not in (self.software.get("execution") or "")

    @property
    def data_kind(self) -> str:
        """The images of training and evaluation: "official", "generated" or "not the official files"."""
        if self.data["official"]:
            return "official"
        return "generated" if "generated" in self.data["checksums"] else "not the official files"

    @property
    def mark(self) -> str:
        """The remark beside the result, in brackets: unofficial or generated data, and mixed execution."""
        data = {"official": "", "generated": " (generated data)"}.get(self.data_kind, f" ({self.data_kind})")
        return data + (" (mixed execution)" if self.mixed else "")

    def write(self, folder: str | Path) -> Path:
        """Write record.json into ``folder``, by rename, and return its path."""
        path = Path(folder) / FILE_NAME
        values = {"schema": self.schema, **asdict(self), "recipe": self.recipe.to_dict()}
        write_by_rename(path, (json.dumps(values, indent=1, allow_nan=False) + "\n").encode())
        return path


def load(path: str | Path) -> RunRecord:
    """Return the record in a run's folder, or in a record.json; raise BadRecord if it is not valid."""
    path = Path(path)
    if path.is_dir():
        path = path / FILE_NAME
    try:
        return _parse(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        raise BadRecord(f"{path}: {error}") from error


def find(folder: Path) -> RunRecord | None:
    """Return the record in a run's folder; None if there is none, or none that is valid."""
    try:
        return load(folder)
    except BadRecord:
        return None


def _parse(values: object) -> RunRecord:
    if not isinstance(values, dict):
        raise ValueError(f"got {type(values).__name__}, wanted an object")
    schema = values.get("schema")
    if isinstance(schema, bool) or schema not in (1, SCHEMA):
        raise ValueError(f"schema is {schema!r}, this version reads 1 and {SCHEMA}")
    if schema == 1:
        values = {**values, "schema": SCHEMA}
        check_fields(RunRecord, values, without="segments")
        values = _name_deterministic_kernels(values)
    else:
        check_fields(RunRecord, values)
        parts = values["segments"]
        check(isinstance(parts, list) and parts != [], "segments", parts, "a list of at least one segment")
        values = {**values, "segments": tuple(_segment(number, part) for number, part in enumerate(parts, 1))}
    if not isinstance(values["recipe"], dict):
        raise ValueError(f"recipe: got {values['recipe']!r}, wanted an object")
    return RunRecord(**{**values, "recipe": Recipe.from_dict(values["recipe"])})


def _name_deterministic_kernels(values: dict) -> dict:
    """Add "deterministic" to the execution in a record of schema 1: GPU runs always used such kernels then."""
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
    """Return the records of the runs directly in ``folders``, each with its folder, and a message for each bad record.

    Runs that were moved aside (NAME.old-1 ...) and folders that do not exist are left out.
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


def _only_segment(record: RunRecord) -> Segment:
    """Return one segment for a whole run, from the fields of its record."""
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
