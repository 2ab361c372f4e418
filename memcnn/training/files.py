"""A run's folder: files replaced so that nobody sees half of one, and one writer at a time."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from memcnn.training.text import clean

try:
    import fcntl
except ImportError:  # Windows: the folder is not locked
    fcntl = None

LOCK = ".lock"


def write_by_rename(path: Path, content: bytes, *, keep: Path | None = None) -> None:
    """Replace `path` by `content`: written beside it, flushed to the disk, then renamed over it.

    keep: where the file that was at `path` goes. Where writing fails, as on a full disk, both are as they were, and
    nothing is left beside them.
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
    if os.name == "posix":  # the renaming itself reaches the disk
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def move_aside(folder: Path) -> Path:
    """Rename `folder` to the first free of NAME.old-1, NAME.old-2, ...; the new path."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    return folder.rename(aside)


class FolderBusy(RuntimeError):
    """Another process trains in the folder."""


@contextmanager
def locked(folder: Path) -> Iterator[str | None]:
    """Hold `folder`, made when missing, for this process alone; FolderBusy, with the holder, while another one has it.

    The lock is the kernel's and ends with its process, however that ends; on a network file system it is the server's
    (Linux locks NFS files there). What is written in it only says who holds it. Yields who held it last and ended
    without letting go, None where nobody did.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield None
        return
    with _lock(folder) as file:
        dead = _read(os.pread(file, 1000, 0))
        since = datetime.now(timezone.utc).isoformat()
        _write(file, json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}))
        try:
            yield None if dead is None else str(dead)
        finally:
            with suppress(OSError):  # of a full disk, or one that has gone: the lock ends all the same
                _write(file, "")


@contextmanager
def _lock(folder: Path) -> Iterator[int]:
    """The descriptor of the folder's lock file, locked."""
    path = folder / LOCK
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = _read(os.pread(file, 1000, 0)) or "another process"
                raise FolderBusy(f"{holder} is training in {folder}") from None
            if path.exists() and os.path.samestat(os.fstat(file), path.stat()):
                yield file
                return
        finally:
            os.close(file)
        folder.mkdir(parents=True, exist_ok=True)  # the folder was moved aside in between: lock the one that is there


@dataclass(frozen=True)
class Holder:
    """The process that has written itself into a folder's lock."""

    pid: int
    host: str
    since: datetime

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} (since {self.since:%Y-%m-%d %H:%M:%S} UTC)"

    @property
    def lives(self) -> bool | None:
        """Whether there is such a process; None where that cannot be known, as of another machine."""
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
    """Who trains in the folder, or did and ended without letting go."""
    try:
        return _read((folder / LOCK).read_bytes()[:1000])
    except OSError:
        return None


def _read(content: bytes) -> Holder | None:
    try:
        values = json.loads(content)
        return Holder(int(values["pid"]), clean(values["host"]), datetime.fromisoformat(values["since"]))
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def _write(file: int, text: str) -> None:
    os.ftruncate(file, 0)
    os.pwrite(file, text.encode(), 0)
