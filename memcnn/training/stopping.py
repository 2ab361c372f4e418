"""Stop at a clean point: on Ctrl-C, on SIGTERM, or before a time budget is used up."""

import os
import signal
import threading
import time


class Stop:
    """A context in which the first SIGINT or SIGTERM asks runs to stop; a second SIGINT ends the process at once.

    Args:
        deadline: the ``time.monotonic()`` at which all runs must have stopped; None for no limit.
    """

    def __init__(self, deadline: float | None = None) -> None:
        self.deadline = deadline
        self._signalled = False
        self._previous: dict = {}

    def reason(self, *, needed_seconds: float) -> str | None:
        """Return why to stop before work that takes ``needed_seconds``; None if there is time for it."""
        if self._signalled:
            return "interrupted"
        if self.deadline is not None and time.monotonic() + needed_seconds > self.deadline:
            return "budget exhausted"
        return None

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())

    def _handle(self, number: int, frame: object) -> None:
        self._signalled = True
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if number == signal.SIGINT:
            os.write(2, b"\nStopping after this iteration; Ctrl-C again stops at once.\n")
