"""Load trained networks by the names of their runs, and convert weights and optimiser states of MemCNN 1.5."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from memcnn.datasets import NUM_CLASSES
from memcnn.models.resnet import MODELS
from memcnn.training import checkpoint, record
from memcnn.training.identity import Identity
from memcnn.training.record import RunRecord


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
        ValueError: the name is a path and not a folder's name, or the run is not complete.
        BadRecord: the run's record is missing or cannot be used. This is a ValueError.
        BadCheckpoint: the run's checkpoint is missing or cannot be used. This is a ValueError.
    """
    if Path(name).name != name or name in ("", ".", ".."):
        raise ValueError(f"name of a run: got {name!r}, wanted a folder's name, like revnet38-cifar10-published-s0")
    folder = Path(runs) / name
    model, found, _ = load_run(folder, device=device)
    if found.status != "complete" and not partial:
        done = f"{found.iterations} of {found.recipe.iterations} iterations"
        raise ValueError(f"{folder} is {found.status}, {done}: pass partial=True to take its last checkpoint")
    return model


def load_run(folder: Path, *, device: torch.device | str = "cpu") -> tuple[nn.Module, RunRecord, int]:
    """Return a run's network in evaluation mode, its record, and the number of iterations that it trained."""
    found = record.load(folder)
    path = folder / checkpoint.FILE_NAME
    identity, state = checkpoint.read(path, device=device)
    checkpoint.refuse_other_run(path, identity, Identity.of_record(found), ignoring=["batch_norm_images"])
    model = MODELS[found.model](NUM_CLASSES[found.dataset], disable=not found.engine)
    model.load_state_dict(state.model)
    return model.to(device).eval(), found, state.iteration


_ENDS = {"conv1": "stem.0", "bn1": "stem.1", "bn_final": "head.0", "fc": "head.4"}
_UNIT = re.compile(
    r"layer(?P<stage>\d+)\.(?P<unit>\d+)\."
    r"(?:(?P<plain>basicblock_sub|bottleneck_sub)|(?P<shortcut>downsample)|revblock\._fn\.(?P<half>Fm|Gm))\."
    r"(?P<rest>.+)"
)
_POSITIONS = {"bn1": 0, "conv1": 2, "bn2": 3, "conv2": 5, "bn3": 6, "conv3": 8}  # in a branch that begins with bn1


def convert_state_dict(
    state: Mapping[str, Tensor], model: str | nn.Module | None = None, *, unit_pixels: bool = False
) -> dict[str, Tensor]:
    """Return the state dict of a ResNet or RevNet of MemCNN 1.5 under the names of this version.

    The network then computes the same logits. MemCNN 1.5 trained on pixels from 0 to 255 minus their mean. This version
    divides pixels by 255 first; ``unit_pixels`` compensates for that. States of couplings and wrapped blocks need no
    conversion, and ``memcnn.models.resnet.ResNet`` loads any state of MemCNN 1.5's ``ResNet`` unchanged.

    Args:
        state: the result of ``state_dict()`` of MemCNN 1.5's network; keys may begin with "module.", as those of
            ``nn.DataParallel`` do. Values are not copied, except for the scaled ones.
        model: the name of one of the six networks, such as "revnet38", or the network itself; None for the one of the
            six that fits.
        unit_pixels: multiply the weights of the first convolution by 255, for images as ``memcnn.data.normalise``
            returns them.

    Raises:
        ValueError: the names are not those of MemCNN 1.5's networks, or names or shapes are not those of ``model``.
    """
    state = _without_prefix(state)
    converted = {new: state[old] for old, new in _new_names(state).items()}
    label, wanted = _find_shapes(converted, model)
    for name in wanted.keys() - converted.keys():
        if name.endswith("num_batches_tracked"):  # PyTorch before 0.4.1 did not count them
            converted[name] = torch.tensor(0)
    _refuse_other_shapes(converted, label, wanted)
    if unit_pixels:
        converted["stem.0.weight"] = converted["stem.0.weight"] * 255
    return converted


def convert_optimizer_state(optimizer_state: Mapping, state: Mapping[str, Tensor], model: nn.Module) -> dict:
    """Return an optimiser state of MemCNN 1.5 with its entries in the order of ``model``'s parameters.

    An optimiser numbers parameters in the order of ``model.parameters()``. MemCNN 1.5 had G before F, this version has
    F before G. Without this conversion, F and G would exchange their momentum.

    Args:
        optimizer_state: the result of ``state_dict()`` of the optimiser; it had all parameters in one group.
        state: the state dict of the network beside it, as MemCNN 1.5 wrote it.
        model: the network of this version: one of the six, or one with the names of MemCNN 1.5.

    Raises:
        ValueError: there are several groups, or the parameters are not those of ``model``.
    """
    state = _without_prefix(state)
    new_names = {name: name for name in state} if state.keys() == model.state_dict().keys() else _new_names(state)
    numbers = {name: number for number, (name, _) in enumerate(model.named_parameters())}
    order = [numbers[new] for new in new_names.values() if new in numbers]
    groups = optimizer_state["param_groups"]
    if len(groups) != 1:
        raise ValueError(
            f"the optimiser state has {len(groups)} groups of parameters, wanted one; convert each by hand"
        )
    if len(order) != len(numbers) or len(order) != len(groups[0]["params"]):
        raise ValueError(
            f"the optimiser state has {len(groups[0]['params'])} parameters, the model has {len(numbers)}, and the "
            f"network's state names {len(order)} of these; pass an optimiser state, a state and a model of one network"
        )
    values = {order[position]: optimizer_state["state"][old]
              for position, old in enumerate(groups[0]["params"]) if old in optimizer_state["state"]}  # fmt: skip
    return {**optimizer_state, "state": values, "param_groups": [{**groups[0], "params": list(range(len(order)))}]}


def _without_prefix(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state without the "module." that ``nn.DataParallel`` puts before every name."""
    if not state:
        raise ValueError("the state is empty, wanted the state_dict() of a network of MemCNN 1.5")
    wrapped = all(name.startswith("module.") for name in state)
    return {name.removeprefix("module.") if wrapped else name: value for name, value in state.items()}


def _new_names(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Return this version's name of each entry of a state of MemCNN 1.5's networks."""
    names = {old: _new_name(old, state) for old in state}
    if unknown := [old for old, new in names.items() if new is None]:
        hint = "; it has this version's names already, so load it as it is" if "stem.0.weight" in state else ""
        raise ValueError(
            f"the state has entries that no network of MemCNN 1.5 has, such as {unknown[0]!r}: wanted names like "
            f"'layer1.0.revblock._fn.Fm.conv1.weight'{hint}"
        )
    return {old: new for old, new in names.items() if new is not None}


def _new_name(name: str, state: Mapping[str, Tensor]) -> str | None:
    """Return this version's name of an entry; None if no network of MemCNN 1.5 has it."""
    module, _, value = name.rpartition(".")
    if module in _ENDS:
        return f"{_ENDS[module]}.{value}"
    if (match := _UNIT.fullmatch(name)) is None:
        return None
    unit = f"stages.{int(match['stage']) - 1}.{match['unit']}"
    if match["shortcut"]:
        return f"{unit}.shortcut.{match['rest']}"
    module, _, value = match["rest"].rpartition(".")
    if module not in _POSITIONS:
        return None
    activates = name[: match.start("rest")] + "bn1.weight" in state
    branch = f"_fn.{match['half']}" if match["half"] else "branch"
    return f"{unit}.{branch}.{_POSITIONS[module] - (0 if activates else 2)}.{value}"


def _find_shapes(converted: Mapping[str, Tensor], model: str | nn.Module | None) -> tuple[str, dict[str, torch.Size]]:
    """Return the name of the model and the shapes of its state. Without a model, use the one of the six that fits."""
    if isinstance(model, nn.Module):
        return "the model", _shapes(model)
    if model is not None and model not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)} or a network: got {model!r}")
    num_classes = len(converted["head.4.bias"]) if "head.4.bias" in converted else 10
    for name in MODELS if model is None else [model]:
        with torch.device("meta"):
            shapes = _shapes(MODELS[name](num_classes))
        if model is not None or {**shapes, **_shapes(converted)} == shapes:
            return name, shapes
    raise ValueError(
        f"the state fits none of {', '.join(MODELS)}: build a memcnn.models.resnet.ResNet with the arguments of its "
        "network and load the state as it is, or pass a CifarResNet as model"
    )


def _shapes(state: nn.Module | Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """Return the shape of each entry of a state dict, or of a module's state dict."""
    state = state.state_dict() if isinstance(state, nn.Module) else state
    return {name: value.shape for name, value in state.items()}


def _refuse_other_shapes(converted: Mapping[str, Tensor], label: str, wanted: dict[str, torch.Size]) -> None:
    """Raise a ValueError if names or shapes are not those of ``wanted``. The message calls the network ``label``."""
    got = _shapes(converted)
    if different := sorted(name for name in got.keys() | wanted.keys() if got.get(name) != wanted.get(name)):
        name = different[0]
        words = [tuple(shapes[name]) if name in shapes else "nothing" for shapes in (got, wanted)]
        raise ValueError(
            f"the state is not that of {label}: {len(different)} entries differ, such as {name}, where the state has "
            f"{words[0]} and {label} {words[1]}; name the network that the state was saved from, or leave model out"
        )
