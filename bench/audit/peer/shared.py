"""This project's loss, comparison of tensors, limits and memory meter, for a worker of any contender.

One contender is called memcnn as well. So this project's package is imported first, and then taken out of
``sys.modules``: its functions go on working, and the contender can import its own package of that name.
"""

import importlib
import sys
from types import ModuleType

from .chains import ROOT


def _import(*names: str) -> list[ModuleType]:
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
