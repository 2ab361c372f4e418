"""Checkpoints: everything a run needs to go on, in one file that is replaced by rename."""

import io
import pickle
from pathlib import Path

import torch

from memcnn.training.files import write_by_rename

FILE_NAME = "checkpoint.pt"


class BadCheckpoint(ValueError):
    """A checkpoint that cannot be read, or that belongs to another run."""


def save(folder: Path, identity: dict, state: dict) -> None:
    """Write `state` (tensors, numbers, text, and lists and dicts of them) as the run's checkpoint.

    identity: what makes the run this run (model, data, recipe ...); `load` compares it.
    """
    buffer = io.BytesIO()
    torch.save({"identity": identity, "state": state}, buffer)
    write_by_rename(folder / FILE_NAME, buffer.getbuffer())


def load(folder: Path, identity: dict, *, device: torch.device) -> dict | None:
    """The state in the folder's checkpoint, None where there is none; BadCheckpoint when it is of another run."""
    path = folder / FILE_NAME
    if not path.exists():
        return None
    try:
        content = torch.load(path, map_location=device, weights_only=True)
        found, state = content["identity"], content["state"]
    except (OSError, RuntimeError, KeyError, TypeError, EOFError, pickle.UnpicklingError) as error:
        # torch's own message advises to load it without the protection of weights_only
        raise BadCheckpoint(
            f"{path} cannot be read, it is damaged or no checkpoint ({type(error).__name__}). "
            "--fresh moves it aside and begins anew."
        ) from error
    refuse_other_run(path, found, identity)
    return state


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
