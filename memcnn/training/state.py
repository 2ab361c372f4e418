"""The counters of a run, which its checkpoint holds beside weights, momenta and sums."""

from dataclasses import asdict, dataclass, field, fields

from memcnn.training.record import RunRecord, Segment


class MixedExecution(ValueError):
    """A run would go on in another execution, or on another type of device, than it was computed with so far."""


@dataclass
class State:
    """How far a run is, and how it was computed.

    Attributes:
        memory: bytes of one training step, as ``memcnn.testing.memory.StepMemory`` names them.
        step_seconds: an upper estimate of the time between two steps.
        iteration: iterations done.
        rows: the rows of the curve, one for each evaluation.
        interruptions: how often the run was resumed.
        segments: the segments of the record, each as a dict; the last one grows.
    """

    memory: dict
    step_seconds: float
    iteration: int = 0
    rows: list[dict] = field(default_factory=list)
    interruptions: int = 0
    segments: list[dict] = field(default_factory=list)

    @classmethod
    def from_checkpoint(cls, values: dict, *, written: RunRecord | None, here: Segment) -> "State":
        """Return the state in a checkpoint.

        Args:
            values: the checkpoint's contents.
            written: the record beside it, if there is one. Checkpoints of earlier versions hold the training time only,
                without segments: how they were computed is in the record.
            here: the segment that begins now, whose device stands for an unknown one.
        """
        names = [one.name for one in fields(cls) if one.name != "segments"]
        segments = values.get("segments")
        if segments is None:
            segments = _segments_of_earlier_versions(values, written, here)
        return cls(**{name: values[name] for name in names}, segments=segments)

    @property
    def train_seconds(self) -> float:
        """Seconds of training in all segments."""
        return sum(segment["train_seconds"] for segment in self.segments)

    @property
    def last_evaluation(self) -> int:
        """Iterations done at the last evaluation, 0 before the first."""
        return self.rows[-1]["iteration"] if self.rows else 0

    def begin(self, here: Segment, *, allow_mixed: bool) -> None:
        """Append the segment that begins now; MixedExecution where it is computed differently and may not be."""
        self.segments = [segment for segment in self.segments if segment["last"] > segment["first"]]
        before = {(segment["execution"], segment["device"]["type"]) for segment in self.segments}
        if before - {(here.execution, here.device["type"])} and not allow_mixed:
            done = "; ".join(f"{execution} on {device}" for execution, device in sorted(before))
            raise MixedExecution(
                f"the first {self.iteration} iterations were computed with {done}, but this command asks for "
                f"{here.execution} on {here.device['type']}. Ask for the same execution, or give --allow-mixed: then "
                "the record lists both, and the table marks the run. --fresh begins anew."
            )
        self.segments.append(asdict(here))

    def count(self, *, seconds: float, shared_by: int) -> None:
        """Add training time up to the present iteration, in which `shared_by` runs shared the device."""
        segment = self.segments[-1]
        segment["last"] = self.iteration
        segment["train_seconds"] += seconds
        segment["shared_by"] = max(segment["shared_by"], shared_by)


def _segments_of_earlier_versions(values: dict, written: RunRecord | None, here: Segment) -> list[dict]:
    """Return one segment for all that was done: its execution is the record's, or the default where there is none."""
    known = here if written is None else written.segments[-1]
    whole = {"first": 0, "last": values["iteration"], "shared_by": 1, "train_seconds": values["train_seconds"]}
    if written is None:
        whole["execution"] = "float32"
    return [{**asdict(known), **whole}]

