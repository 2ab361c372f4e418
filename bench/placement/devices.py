"""Train cells in separate processes on the devices of this machine."""

import multiprocessing
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait

from bench.placement.cells import Cell, Lost, Outcome, Settings, in_turns
from bench.placement.progress import POLL_SECONDS, Bars, bars
from memcnn.training.stopping import Stop


def on_devices(
    cells: Iterable[Cell], settings: Settings, devices: Sequence[str], jobs_per_device: int
) -> Iterator[Outcome]:
    """Train cells in separate processes. Yield each cell with its outcome when it ends.

    A GPU has one process, in which its cells take turns. A CPU has ``jobs_per_device`` processes, each with one cell.
    After Ctrl-C, SIGTERM or the deadline all processes stop cleanly, and no further cell starts.

    Args:
        cells: the cells; the next one is taken when there is room for it.
        settings: the settings that all cells share.
        devices: names of devices.
        jobs_per_device: number of cells that share a device.
    """
    places = []
    for number in range(jobs_per_device):
        for device in devices:
            if not device.startswith("cuda"):
                places.append(CellProcess(settings, device, at_once=1, shared_by=jobs_per_device))
            elif number == 0:
                places.append(CellProcess(settings, device, at_once=jobs_per_device, shared_by=1))
    with settings.stop() as stop, bars(settings) as view:
        try:
            yield from _supply(places, iter(cells), stop, view)
        finally:
            for place in places:
                place.interrupt()


def _supply(places: list["CellProcess"], cells: Iterator[Cell], stop: Stop, view: Bars) -> Iterator[Outcome]:
    """Give each place a cell when it has room, until all cells are done or there is a stop. Yield the outcomes."""
    while True:
        reason = stop.reason(needed_seconds=0.0)
        for place in places:
            if reason == "interrupted":
                place.interrupt()
            if place.has_room and reason is None and (cell := next(cells, None)):
                place.take(cell)
            elif place.asks:
                place.dismiss()
        connections = {place.connection: place for place in places if place.connection}
        if not connections:
            return
        for connection in wait(list(connections), POLL_SECONDS):
            for cell, outcome in connections[connection].receive():
                if getattr(outcome, "status", None) == "partial":  # the other processes stop as well
                    cells = iter(())
                yield cell, outcome
        view.show([cell for place in places for cell in place.running])


class CellProcess:
    """A process that trains cells on one device. It asks for a cell when it has room, and sends the outcome of each.

    Args:
        settings: the settings that all cells share.
        device: the name of the device.
        at_once: number of cells that take turns in the process.
        shared_by: number of such processes that share the device.
    """

    def __init__(self, settings: Settings, device: str, *, at_once: int, shared_by: int) -> None:
        self.settings, self.device, self.at_once, self.shared_by = settings, device, at_once, shared_by
        self.process: multiprocessing.Process | None = None
        self.connection: Connection | None = None
        self.running: list[Cell] = []
        self.asks = self.interrupted = False
        self.last_message = ""

    @property
    def has_room(self) -> bool:
        """True if the next cell would start at once. The first cell starts the process."""
        return self.asks or self.process is None

    def take(self, cell: Cell) -> None:
        """Start a cell."""
        self.running.append(cell)
        if self.process is not None:
            self._answer(cell)
            return
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self.connection, far_end = context.Pipe()
        arguments = (far_end, cell, self.settings, self.device, self.at_once, self.shared_by)
        self.process = context.Process(target=_train_cells, args=arguments, name=self.device)
        self.process.start()
        far_end.close()

    def dismiss(self) -> None:
        """Let the process end after its running cells."""
        self._answer(None)

    def interrupt(self) -> None:
        """Ask the process to stop cleanly."""
        if self.process is not None and not self.interrupted:
            self.interrupted = True
            self.process.terminate()

    def receive(self) -> Iterator[Outcome]:
        """Read one message of the process, and yield the outcomes in it."""
        try:
            message = self.connection.recv()
        except (EOFError, OSError):
            yield from self._ended()
            return
        if message is None:
            self.asks = True
        elif isinstance(message, str):
            self.last_message = message
        else:
            self.running.remove(message[0])
            yield message

    def _answer(self, cell: Cell | None) -> None:
        self.asks = False
        with suppress(OSError):  # the process has ended; ``receive`` notices that
            self.connection.send(cell)

    def _ended(self) -> Iterator[Outcome]:
        """Yield each running cell of the ended process with ``Lost``, unless the process was interrupted."""
        self.process.join()
        status, left = self.process.exitcode, self.running
        self.connection.close()
        how = f"was killed by signal {-status}" if status < 0 else f"failed: {self.last_message or f'status {status}'}"
        self.process, self.connection, self.running, self.asks, self.last_message = None, None, [], False, ""
        for cell in left:
            if not self.interrupted and status not in INTERRUPTED:
                yield cell, Lost(f"its process {how}")


INTERRUPTED = (3, -signal.SIGTERM)
"""Exit statuses of a process that was interrupted before it started to train."""


def _train_cells(
    connection: Connection, first: Cell, settings: Settings, device: str, at_once: int, shared_by: int
) -> None:
    """Train the first cell and then the cells that the parent process sends."""

    def cells() -> Iterator[Cell]:
        cell = first
        while cell is not None:
            yield cell
            connection.send(None)
            cell = connection.recv()

    try:
        for outcome in in_turns(cells(), settings, device, at_once, shared_by=shared_by):
            connection.send(outcome)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED[0])
    except Exception as error:
        connection.send(f"{type(error).__name__}: {error}")
        sys.exit(1)
