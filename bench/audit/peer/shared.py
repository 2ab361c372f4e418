"""This project's loss, comparison of tensors, tolerances and memory meter, for the worker of any contender.

One contender's package is called memcnn, too. Therefore this module imports this project's package first, and then
removes it from ``sys.modules``. Its functions keep working, and the contender can import its own package of that name.
"""

import importlib
import sys
from types import ModuleType

from .chains import ROOT


def _import(*names: str) -> list[ModuleType]:
    """Import modules of this project's memcnn without leaving memcnn in ``sys.modules``."""
    before = set(sys.modules)
    sys.path.insert(0, str(ROOT))
    try:
        modules = [importlib.import_module(name) for name in names]
    finally:
        sys.path.remove(str(ROOT))
    for name in set(sys.modules) - before:
        if name.partition(".")[0] == "memcnn":
            del sys.modules[name]
    return modules


_twin, _tolerances, memory = _import("memcnn.testing.laws.twin", "memcnn.testing.tolerances", "memcnn.memory")
relative_errors, weighted_sum, worst = _twin.relative_errors, _twin.weighted_sum, _twin.worst
tolerance = _tolerances.tolerance
