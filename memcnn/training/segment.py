"""A segment: a part of a run, with its execution, device and software."""

from dataclasses import dataclass
from typing import Any

from memcnn.training.validation import check, check_fields, check_keys, is_count, is_number

SOFTWARE = ("memcnn", "python", "torch", "torchvision", "platform")
DEVICE = {"type": str, "name": str, "count": int, "threads": int}


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A part of a run that was computed without interruption, with one execution on one device.

    Attributes:
        first: iterations done before the segment.
        last: iterations done after it.
        execution: the execution of its steps, as ``str(Execution)``.
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
            check(is_count(value) and value >= least, name, value, f"a whole number of at least {least}")
        check(self.last >= self.first, "last", self.last, f"at least {self.first}, the segment's first")
        check(isinstance(self.execution, str) and self.execution != "", "execution", self.execution, "text")
        check(is_number(self.train_seconds), "train_seconds", self.train_seconds, "a number of at least 0")
        check_origin(device=self.device, software=self.software, commit=self.commit, clean=self.clean)

    @property
    def iterations(self) -> int:
        """Number of iterations that the segment computed."""
        return self.last - self.first

    @classmethod
    def from_dict(cls, values: Any) -> "Segment":
        """Return the segment in a record; raise ValueError if the values are not those of one."""
        check(isinstance(values, dict), "segment", values, "an object")
        check_fields(cls, values)
        return cls(**values)


def check_origin(*, device: Any, software: Any, commit: object, clean: object) -> None:
    """Raise ValueError if the device, software, commit or state of the source in a record is not valid."""
    versions = software
    check(commit is None or isinstance(commit, str), "commit", commit, "text or null")
    check(clean is None or isinstance(clean, bool), "clean", clean, "true, false or null")
    check_keys("device", device, DEVICE)
    check(device["count"] >= 1, "device.count", device["count"], "at least 1")
    right = isinstance(versions, dict) and all(value is None or isinstance(value, str) for value in versions.values())
    check(right and set(SOFTWARE) <= set(versions), "software", versions, f"versions of {', '.join(SOFTWARE)}")
