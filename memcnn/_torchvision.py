"""Import torchvision, even if its compiled operators cannot be loaded.

Beside a CPU build of torch, torchvision's default wheel fails at import. It registers shape functions for operators,
but its extension is linked against CUDA and cannot define them (https://github.com/pytorch/vision/issues/9077). This
project uses none of these operators. So we declare the operator that the error names, without an implementation, and
import again. If the extension loads, we declare nothing: an operator that is declared twice aborts the process.
"""

import importlib
import re
import sys
from types import ModuleType

import torch

_MISSING = re.compile(r"operator torchvision::(\w+) does not exist")
declared: list[torch.library.Library] = []  # keeps the libraries alive, because operators end with their library


def _import_torchvision() -> ModuleType:
    """Return the torchvision module; raise the original error if it is not about a missing operator."""
    names: list[str] = []
    while True:
        try:
            return importlib.import_module("torchvision")
        except RuntimeError as error:
            missing = _MISSING.search(str(error))
            if missing is None or missing[1] in names:
                raise
            names.append(missing[1])
        for module in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[module]
        library = torch.library.Library("torchvision", "FRAGMENT")
        library.define(f"{names[-1]}(...) -> ...")
        declared.append(library)


torchvision = _import_torchvision()
