"""Trained networks by the names of their runs."""

from pathlib import Path

import torch
from torch import nn

from memcnn.models.resnet import MODELS
from memcnn.training import checkpoint, record
from memcnn.training.record import NUM_CLASSES, RunRecord


def load_trained(
    name: str, *, runs: str | Path = "runs", device: torch.device | str = "cpu", partial: bool = False
) -> nn.Module:
    """Return the network of a run, with its trained weights, in evaluation mode.

    It takes images as ``memcnn.data.normalise`` makes them. Nothing in the files can run code.

    Args:
        name: the run's folder in ``runs``, such as "revnet38-cifar10-published-s0".
        runs: the folder of all runs.
        device: where to put the network.
        partial: also accept a run that is not complete, with the weights of its last checkpoint.
    Raises:
        ValueError: for a name that is not a folder's, for a run that is not complete, and in the forms of BadRecord and
            BadCheckpoint.
    """
    if Path(name).name != name or name in ("", ".", ".."):
        raise ValueError(f"name of a run: got {name!r}, wanted a folder's name, like revnet38-cifar10-published-s0")
    folder = Path(runs) / name
    model, found, _ = load_run(folder, device=device)
    if found.status != "complete" and not partial:
        done = f"{found.iterations} of {found.recipe.iterations} iterations"
        raise ValueError(f"{folder} is {found.status}, {done}: partial=True takes its last checkpoint")
    return model


def load_run(folder: Path, *, device: torch.device | str = "cpu") -> tuple[nn.Module, RunRecord, int]:
    """Return the network in a run's folder, in evaluation mode, the run's record, and the iterations it trained for."""
    found = record.load(folder)
    path = folder / checkpoint.FILE_NAME
    identity, state = checkpoint.read(path, device=device)
    wanted = {name: getattr(found, name) for name in ("model", "dataset", "seed", "engine")}
    wanted |= {"recipe": found.recipe.to_dict(), "data checksums": found.data["checksums"]}
    checkpoint.refuse_other_run(path, {name: identity.get(name) for name in wanted}, wanted)
    model = MODELS[found.model](NUM_CLASSES[found.dataset], disable=not found.engine)
    model.load_state_dict(state["model"])
    return model.to(device).eval(), found, state["iteration"]
