"""The times at which a run writes its checkpoint."""

import time
from pathlib import Path

from memcnn.training import checkpoint
from memcnn.training.identity import Identity
from memcnn.training.state import State

CHECKPOINT_SECONDS = 20.0
"""Time between two checkpoints of a run in training, apart from those after evaluations."""
CHECKPOINT_SHARE = 0.03
"""Largest share of the training time that checkpoints may take. Where saving is slow, they are written less often."""


class Saving:
    """The checkpoints of one run, and the seconds that they take.

    Attributes:
        allowance_seconds: seconds to reserve for a checkpoint before a stop; a guess before the first one.

    Args:
        folder: the run's folder; None in a process that writes nothing.
        identity: the run's identity.
    """

    def __init__(self, folder: Path | None, identity: Identity) -> None:
        self.folder, self.identity = folder, identity
        self.allowance_seconds = 1.0
        self._took_seconds = 0.0
        self._saved_at, self._saved_iteration = time.monotonic(), -1

    def is_due(self, iteration: int) -> bool:
        """Return whether a checkpoint is due after this many iterations."""
        between = max(CHECKPOINT_SECONDS, self._took_seconds / CHECKPOINT_SHARE)
        return time.monotonic() - self._saved_at > between and self._saved_iteration != iteration

    def save(self, state: State, *, started: float) -> None:
        """Write the checkpoint.

        Args:
            state: the run's state.
            started: the ``time.perf_counter()`` at which preparing the state began.
        """
        if self.folder is not None:
            checkpoint.save(self.folder, self.identity, state)
        self._took_seconds = time.perf_counter() - started
        self.allowance_seconds = 0.5 + self._took_seconds
        self._saved_at, self._saved_iteration = time.monotonic(), state.iteration
