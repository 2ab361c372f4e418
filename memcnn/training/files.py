"""A run's folder: files that are replaced as a whole, and one writer at a time."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from filelock import FileLock, Timeout

from memcnn.training.text import clean

LOCK = ".lock"
HOLDER = ".holder"
"""The file that names the process that holds the lock. On some systems a locked file cannot be read."""


def write_by_rename(path: Path, content: bytes, *, keep: Path | None = None) -> None:
    """Replace the content of a file: write a new one beside it, flush that to the disk, rename it over the old one.

    If writing fails, as on a full disk, the old files stay as they were, and nothing is left beside them.

    Args:
        path: the file.
        content: its new content.
        keep: where to move the old file; None to drop it.
    Raises:
        OSError: the file cannot be written. The error names ``path``.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from error
    if os.name == "posix":  # flush the renaming as well
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def move_aside(folder: Path) -> Path:
    """Rename a folder to the first of NAME.old-1, NAME.old-2, ... that does not exist; return the new path."""
    (folder / HOLDER).unlink(missing_ok=True)
    number = 1
    while (aside := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    return folder.rename(aside)


class FolderBusy(RuntimeError):
    """Another process trains in the folder."""


@contextmanager
def locked(folder: Path) -> Iterator[str | None]:
    """Lock a folder for this process; create it if it is missing.

    The operating system releases the lock when its process ends, however that ends. A file beside the lock names the
    process that holds it. If that file exists while the lock is free, its process died.

    Yields:
        The process that held the folder last, if it ended without releasing it; None otherwise.
    Raises:
        FolderBusy: another process holds the folder. The message names it.
    """
    lock, identity = _acquire(folder)
    try:
        dead = holder(folder)
        since = datetime.now(timezone.utc).isoformat()
        content = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since})
        write_by_rename(folder / HOLDER, content.encode())
        try:
            yield None if dead is None else str(dead)
        finally:
            with suppress(OSError):  # the disk may be gone; the lock is released anyway
                if os.path.samestat(folder.stat(), identity):  # not moved aside meanwhile
                    (folder / HOLDER).unlink()
    finally:
        lock.release()


def _acquire(folder: Path) -> tuple[FileLock, os.stat_result]:
    """Return the lock of a folder, acquired, and the folder's identity.

    Another process may move the folder aside between our opening its lock file and locking it. Then we hold the lock of
    the moved folder, and try again with the folder that has the name now.
    """
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK, timeout=0, thread_local=False)
        try:
            identity = folder.stat()
            lock.acquire()
            if os.path.samestat(identity, folder.stat()):
                return lock, identity
        except Timeout:
            raise FolderBusy(f"{holder(folder) or 'another process'} is training in {folder}") from None
        except FileNotFoundError:
            if folder.exists():
                raise
        lock.release()


@dataclass(frozen=True)
class Holder:
    """A process that holds a folder, or held it and ended without releasing it."""

    pid: int
    host: str
    since: datetime

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} (since {self.since:%Y-%m-%d %H:%M:%S} UTC)"

    @property
    def is_alive(self) -> bool | None:
        """True if there is such a process; None if we cannot know, as for another machine."""
        if self.host != socket.gethostname() or os.name != "posix":
            return None
        try:
            os.kill(self.pid, 0)
        except (ProcessLookupError, OverflowError):
            return False
        except PermissionError:
            pass
        return True


def holder(folder: Path) -> Holder | None:
    """Return the process that holds the folder, or that ended without releasing it; None if there is none."""
    try:
        values = json.loads((folder / HOLDER).read_bytes()[:1000])
        return Holder(int(values["pid"]), clean(values["host"]), datetime.fromisoformat(values["since"]))
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
