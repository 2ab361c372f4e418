"""The state of a run: everything that it needs to resume. A checkpoint holds exactly this."""

from dataclasses import asdict, dataclass, field, fields, replace

from torch import Tensor

from memcnn.training.record import PLAIN, RunRecord, Segment


class MixedExecution(ValueError):
    """Raised if a run would continue with another execution, or on another type of device, than before."""


@dataclass(kw_only=True)
class State:
    """The state of a run: progress, executions so far, and the tensors that training continues with.

    The network changes at every step. ``model``, ``optimizer`` and ``window`` are the values at the last checkpoint
    that was written or read.

    Attributes:
        memory: bytes of one training step, as ``StepMemory`` names them.
        step_seconds: an upper estimate of the time between two steps.
        model: the network's state dict.
        optimizer: the optimizer's state dict, in the form that all executions share.
        window: summed loss and correct predictions since the last evaluation, float64 of shape (2,): the
            ``TrainingStep.totals`` of all processes together.
        iteration: iterations done.
        rows: the rows of the curve, one for each evaluation.
        interruptions: how often the run was resumed.
        segments: the parts of the run so far; the last one grows.
        unassigned_seconds: seconds of training that belong to no segment. Only checkpoints of the first version have
            them, until ``make_segment_of_old_checkpoint`` makes one.
    """

    memory: dict[str, int]
    step_seconds: float
    model: dict[str, Tensor]
    optimizer: dict
    window: Tensor
    iteration: int = 0
    rows: list[dict] = field(default_factory=list)
    interruptions: int = 0
    segments: list[Segment] = field(default_factory=list)
    unassigned_seconds: float = 0.0

    def to_dict(self) -> dict:
        """Return plain values and tensors, as a checkpoint holds them. Tensors are not copied."""
        return {**vars(self), "segments": [asdict(segment) for segment in self.segments]}

    @classmethod
    def from_dict(cls, values: dict) -> "State":
        """Return the state in a checkpoint of this version or an earlier one.

        Raises:
            KeyError, TypeError, ValueError: the values are not those of a state.
        """
        names = {one.name for one in fields(cls)} - {"segments", "unassigned_seconds"}
        if "segments" in values:
            segments, seconds = [Segment.from_dict(one) for one in values["segments"]], 0.0
        else:
            segments, seconds = [], values["train_seconds"]
        return cls(**{name: values[name] for name in names}, segments=segments, unassigned_seconds=seconds)

    @property
    def train_seconds(self) -> float:
        """Seconds of training in all segments."""
        return self.unassigned_seconds + sum(segment.train_seconds for segment in self.segments)

    @property
    def last_evaluation(self) -> int:
        """Iterations done at the last evaluation, 0 before the first."""
        return self.rows[-1]["iteration"] if self.rows else 0

    def make_segment_of_old_checkpoint(self, *, written: RunRecord | None, here: Segment) -> None:
        """Make one segment of all iterations in a checkpoint of the first version, which has no segments.

        Args:
            written: the record beside the checkpoint, which has the execution of its last part. If None, we assume the
                default execution.
            here: the segment that begins now. Without a record we assume its device.
        """
        if self.segments or not self.iteration:
            return
        known = replace(here, execution=PLAIN) if written is None else written.segments[-1]
        seconds, self.unassigned_seconds = self.unassigned_seconds, 0.0
        self.segments = [replace(known, first=0, last=self.iteration, shared_by=1, train_seconds=seconds)]

    def begin(self, here: Segment, *, allow_mixed: bool) -> None:
        """Append the segment that begins now.

        Args:
            here: the segment.
            allow_mixed: accept an execution, or a type of device, that differs from those of earlier segments.
        Raises:
            MixedExecution: it differs, and that is not allowed.
        """
        self.segments = [segment for segment in self.segments if segment.iterations]
        before = {(segment.execution, segment.device["type"]) for segment in self.segments}
        if before - {(here.execution, here.device["type"])} and not allow_mixed:
            done = "; ".join(f"{execution} on {device}" for execution, device in sorted(before))
            raise MixedExecution(
                f"the first {self.iteration} iterations were computed with {done}, but this command asks for "
                f"{here.execution} on {here.device['type']}. Ask for the same execution, or give --allow-mixed: then "
                "the record lists both, and the table marks the run. --fresh starts over."
            )
        self.segments.append(here)

    def set_tensors(self, *, model: dict[str, Tensor], optimizer: dict, window: Tensor) -> None:
        """Set the tensors to the present ones, for a checkpoint."""
        self.model, self.optimizer, self.window = model, optimizer, window

    def extend_last_segment(self, *, seconds: float, shared_by: int) -> None:
        """Extend the last segment to the present iteration.

        Args:
            seconds: training time since the last call.
            shared_by: number of runs that shared the device meanwhile.
        """
        now = self.segments[-1]
        self.segments[-1] = replace(
            now,
            last=self.iteration,
            train_seconds=now.train_seconds + seconds,
            shared_by=max(now.shared_by, shared_by),
        )
