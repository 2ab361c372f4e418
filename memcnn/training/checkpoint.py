"""Checkpoints: the state of a run in one file, which is replaced as a whole. The previous file is kept.

A checkpoint is a file of ``torch.save`` with a seal: the SHA-256 of the file, as the archive's comment. ``torch.load``
does not verify the checksums within the archive, and returns wrong weights after half of all single bit flips.
"""

import hashlib
import io
import os
import pickle
import sys
from collections.abc import Collection
from pathlib import Path

import torch

from memcnn.training.files import write_by_rename
from memcnn.training.identity import Identity
from memcnn.training.state import State

FILE_NAME, PREVIOUS, DAMAGED = "checkpoint.pt", "checkpoint.previous.pt", "checkpoint.damaged.pt"
SEAL_BYTES = 64


class BadCheckpoint(ValueError):
    """A checkpoint that cannot be read, or that belongs to another run."""


def save(folder: Path, identity: Identity, state: State) -> None:
    """Write the run's checkpoint, and keep the one before it."""
    write(folder, {"identity": identity.to_dict(), "state": state.to_dict()})


def write(folder: Path, content: dict) -> None:
    """Write tensors, numbers, text, and lists and dicts of them, as the run's checkpoint."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_by_rename(folder / FILE_NAME, seal(buffer.getvalue()), keep=folder / PREVIOUS)


def load(folder: Path, identity: Identity, *, device: torch.device | str) -> State | None:
    """Return the state in the folder's checkpoint, or in the one before it if that is damaged; None if there is none.

    If the checkpoint is damaged, print a warning and move it aside.

    Args:
        folder: the run's folder.
        identity: the identity of the run to resume.
        device: the device for the tensors.
    Raises:
        BadCheckpoint: the checkpoint belongs to another run, or none can be read.
    """
    paths = [folder / FILE_NAME, folder / PREVIOUS]
    if not any(path.exists() for path in paths):
        return None
    faults = []
    for path in paths:
        try:
            found, state = read(path, device=device)
        except BadCheckpoint as fault:
            faults.append(str(fault))
            continue
        refuse_other_run(path, found, identity)
        if faults:
            print(f"{faults[0]}. Resuming from the previous checkpoint, {PREVIOUS}.", file=sys.stderr)
            if paths[0].exists():  # otherwise the next checkpoint would overwrite the good one with it
                os.replace(paths[0], folder / DAMAGED)
        return state
    raise BadCheckpoint(f"{'; '.join(faults)}. --fresh moves the run aside and starts over.")


def read(path: Path, *, device: torch.device | str = "cpu") -> tuple[Identity, State]:
    """Return identity and state of a checkpoint.

    Raises:
        BadCheckpoint: the file is missing, damaged, or no checkpoint.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise BadCheckpoint(f"{path} is missing") from None
    except OSError as error:
        raise BadCheckpoint(f"{path} cannot be read ({error})") from error
    reason = "its seal is broken"
    try:
        if content == seal(content[:-SEAL_BYTES]):
            values = torch.load(io.BytesIO(content), map_location=device, weights_only=True)
            return Identity.from_dict({**values["identity"]}), State.from_dict({**values["state"]})
    except (RuntimeError, KeyError, TypeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        reason = type(error).__name__  # torch's own message recommends to load it without weights_only's protection
    raise BadCheckpoint(f"{path} cannot be read, it is damaged or no checkpoint ({reason})")


def seal(archive: bytes) -> bytes:
    """Return a zip archive with the SHA-256 of everything before it as its comment."""
    body = archive[:-2] + SEAL_BYTES.to_bytes(2, "little")  # the last field of an archive: its comment's length
    return body + hashlib.sha256(body).hexdigest().encode()


def refuse_other_run(path: Path, found: Identity, wanted: Identity, *, ignoring: Collection[str] = ()) -> None:
    """Raise BadCheckpoint, with every difference, if the file at ``path`` was written by another run."""
    differences = found.differences(wanted, ignoring=ignoring)
    if differences:
        raise BadCheckpoint(
            f"{path} belongs to another run: {'; '.join(differences)}. "
            "--fresh moves it aside and starts over; --runs FOLDER keeps both."
        )
