"""Checkpoints: everything a run needs to go on, in one file that is replaced by rename, and the one before it.

A checkpoint is a file of torch.save under a seal: the SHA-256 of all that stands before it, as the archive's comment.
torch.load does not check the sums within the archive, and hands out other weights after half of all single bit flips.
"""

import hashlib
import io
import os
import pickle
import sys
from pathlib import Path

import torch

from memcnn.training.files import write_by_rename

FILE_NAME, PREVIOUS, DAMAGED = "checkpoint.pt", "checkpoint.previous.pt", "checkpoint.damaged.pt"
SEAL_BYTES = 64


class BadCheckpoint(ValueError):
    """A checkpoint that cannot be read, or that belongs to another run."""


def save(folder: Path, identity: dict, state: dict) -> None:
    """Write `state` (tensors, numbers, text, lists and dicts of them) as the run's checkpoint, and keep the last one.

    identity: what makes the run this run (model, data, recipe ...); `load` compares it.
    """
    buffer = io.BytesIO()
    torch.save({"identity": identity, "state": state}, buffer)
    write_by_rename(folder / FILE_NAME, seal(buffer.getvalue()), keep=folder / PREVIOUS)


def load(folder: Path, identity: dict, *, device: torch.device) -> dict | None:
    """The state in the folder's checkpoint, or in the one before if that is damaged, which is said; None without any.

    BadCheckpoint when it is of another run, or when there is none that can be read.
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
            print(f"{faults[0]}. Going on from the one before, {PREVIOUS}.", file=sys.stderr)
            if paths[0].exists():  # else the next checkpoint would take the good one's place by it
                os.replace(paths[0], folder / DAMAGED)
        return state
    raise BadCheckpoint(f"{'; '.join(faults)}. --fresh moves the run aside and begins anew.")


def read(path: Path, *, device: torch.device | str = "cpu") -> tuple[dict, dict]:
    """Identity and state of the checkpoint at `path`; BadCheckpoint when it is missing, damaged or no checkpoint."""
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
            return {**values["identity"]}, {**values["state"]}
    except (RuntimeError, KeyError, TypeError, EOFError, pickle.UnpicklingError) as error:
        reason = type(error).__name__  # torch's own message advises to load it without the protection of weights_only
    raise BadCheckpoint(f"{path} cannot be read, it is damaged or no checkpoint ({reason})")


def seal(archive: bytes) -> bytes:
    """The zip archive with the SHA-256 of all that stands before it as its comment."""
    body = archive[:-2] + SEAL_BYTES.to_bytes(2, "little")  # the last field of an archive: its comment's length
    return body + hashlib.sha256(body).hexdigest().encode()


def refuse_other_run(path: Path, found: dict, wanted: dict) -> None:
    """BadCheckpoint, with every difference, when the file at `path` was written by another run than the one wanted."""
    differences = [
        f"{name} is {found.get(name)!r} there, {wanted.get(name)!r} here"
        for name in sorted({*found, *wanted})
        if found.get(name) != wanted.get(name)
    ]
    if differences:
        raise BadCheckpoint(
            f"{path} belongs to another run: {'; '.join(differences)}. "
            "--fresh moves it aside and begins anew; --runs FOLDER keeps both."
        )
