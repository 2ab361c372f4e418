"""A run's folder: files replaced so that nobody sees half of one, and one writer at a time."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: the folder is not locked
    fcntl = None


def write_by_rename(path: Path, content: bytes) -> None:
    """Replace `path` by `content`: written beside it, flushed to the disk, then renamed over it."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def move_aside(folder: Path) -> Path:
    """Rename `folder` to the first free of NAME.old-1, NAME.old-2, ...; the new path."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    return folder.rename(aside)


class FolderBusy(RuntimeError):
    """Another process trains in the folder."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder`, made when missing, for this process alone; FolderBusy while another one holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "wb") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise FolderBusy(f"another process is training in {folder}") from None
        yield
