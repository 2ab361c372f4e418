"""The names and files of MemCNN 1.5, and their successors.

Most names still exist, with their arguments. ``ABSENT`` and ``ABSENT_MODULES`` list the others with what replaces them;
importing one raises an ImportError that says so. Modules that MemCNN 1.5 pickled load as modules of this version.
"""

import inspect
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec

_FUNCTION = "use {0} in an InvertibleModuleWrapper"
_KINDS = ("Function", "InverseFunction", "Function2", "InverseFunction2")

ABSENT = {
    "memcnn.models.additive": {f"AdditiveBlock{kind}": _FUNCTION.format("AdditiveCoupling") for kind in _KINDS},
    "memcnn.models.affine": {f"AffineBlock{kind}": _FUNCTION.format("AffineCoupling") for kind in _KINDS},
    "memcnn.models.revop": {"InvertibleCheckpointFunction": "use InvertibleModuleWrapper"},
    "memcnn.train": {"run_experiment": "use memcnn.training.trainer.train, or python -m memcnn.train MODEL DATASET"},
}
"""Names that MemCNN 1.5 had in modules that still exist, and what to use instead."""

_TRAIN = "use memcnn.training.trainer.train, or python -m memcnn.train MODEL DATASET"
ABSENT_MODULES = {
    "memcnn.config": f"{_TRAIN}, whose --help lists every hyper-parameter",
    "memcnn.data.cifar": "use memcnn.data.load, memcnn.data.epoch_plan and memcnn.data.batch",
    "memcnn.data.sampling": "use torch.utils.data.RandomSampler, or memcnn.data.epoch_plan",
    "memcnn.experiment": f"{_TRAIN}; memcnn.load_trained returns the network of a run",
    "memcnn.trainers": _TRAIN,
    "memcnn.utils": "use logging and tensorboardX.SummaryWriter for memcnn.utils.log, and "
    "torch.nn.CrossEntropyLoss for memcnn.utils.loss.CrossEntropyLossTF, which has the same value; "
    "(logits.argmax(1) == labels).float().mean() is the accuracy of memcnn.utils.stats, from 0 to 1",
}
"""Modules that MemCNN 1.5 had, and what to use instead."""


def absent_names(module: str) -> Callable[[str], object]:
    """Return the ``__getattr__`` of a module: it explains which of MemCNN 1.5's names are gone.

    Raises:
        ImportError: the name is one of MemCNN 1.5's. (``from ... import`` would replace the message of an
            AttributeError.)
        AttributeError: any other name.
    """

    def __getattr__(name: str) -> object:
        if name in ABSENT.get(module, ()):
            raise ImportError(
                f"{module}.{name} of MemCNN 1.5 is not part of this version: {ABSENT[module][name]}", name=module
            )
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return __getattr__


class _AbsentModules:
    """The last finder on ``sys.meta_path``: it explains which of MemCNN 1.5's modules are gone."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name in ABSENT_MODULES:
            raise ModuleNotFoundError(
                f"{name} of MemCNN 1.5 is not part of this version: {ABSENT_MODULES[name]}", name=name
            )
        return None


if not any(getattr(finder, "__name__", "") == _AbsentModules.__name__ for finder in sys.meta_path):
    sys.meta_path.append(_AbsentModules)


def wrapper_state(state: dict, wrapper: type) -> dict:
    """Return the attributes of a pickled ``InvertibleModuleWrapper``, with defaults for those that it lacks.

    ``preserve_rng_state`` becomes True in a pickle of MemCNN 1.5, where False was the default and made gradients of
    dropout wrong.

    Raises:
        ValueError: the pickle comes from a version before 1.5, whose wrapper held no module.
    """
    if "_fn" not in state.get("_modules", {}):
        raise ValueError(
            f"this file holds a {wrapper.__name__} without the module that it wraps, so a version before MemCNN 1.5 "
            "wrote it: load it there, save its state_dict(), and load that into a module that you build here"
        )
    parameters = inspect.signature(wrapper).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    if "check_inverse" not in state:
        state = {**state, "preserve_rng_state": True}
    return {**defaults, **state}


def coupling_state(state: dict) -> dict:
    """Return the attributes of a pickled coupling, without MemCNN 1.5's ``implementation_fwd`` and ``_bwd``."""
    kept = {name: value for name, value in state.items() if not name.startswith("implementation_")}
    return {"split_dim": 1, **kept}
