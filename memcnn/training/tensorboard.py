"""The event files of a run for TensorBoard.

tensorboardX's SummaryWriter hands events to a thread, which ends when the disk is full. The next call that adds an
event then waits forever, as with TensorBoard's own (https://github.com/tensorflow/tensorboard/issues/6167). We use its
file writer without the thread: when ``add`` returns, the event is on the disk; otherwise ``add`` raises OSError.
"""

import time
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import RecordWriter
from tensorboardX.summary import scalar


class TensorBoard:
    """A new event file.

    Args:
        folder: the folder of event files.
        first: the next iteration. TensorBoard ignores values in earlier files from this iteration on.
    """

    def __init__(self, folder: Path, *, first: int) -> None:
        folder.mkdir(exist_ok=True)
        # TensorBoard reads files in the order of their names, so names are numbered, and do not depend on the clock
        self._file = RecordWriter(str(folder / f"events.out.tfevents.{len(list(folder.iterdir())):010d}"))
        self._write(Event(file_version="brain.Event:2"))
        self._write(Event(session_log=SessionLog(status=SessionLog.START), step=first))
        self._file.flush()

    def add(self, values: dict[str, float], iteration: int) -> None:
        """Write values by name to the disk."""
        for name, value in values.items():
            self._write(Event(summary=scalar(name, value), step=iteration))
        self._file.flush()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._file.write(event.SerializeToString())

    def close(self) -> None:
        """Close the file."""
        self._file.close()
