"""Import torchvision, also where its compiled operators cannot be loaded.

torchvision's wheel beside a CPU build of torch fails at import: it registers shape functions for operators that its
extension, linked against CUDA, could not define (https://github.com/pytorch/vision/issues/9077). None of them is used
here, so the operators that the error names are declared, without an implementation, and the import is tried again.
Where the extension loads, nothing is declared: declaring an operator that it defines as well aborts the process.
"""

import importlib
import re
import sys
from types import ModuleType

import torch

_MISSING = re.compile(r"operator torchvision::(\w+) does not exist")
_declared: list[torch.library.Library] = []  # libraries live as long as their operators are wanted


def _import_torchvision() -> ModuleType:
    """The torchvision module; the original error when it is not about a missing operator."""
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
        _declared.append(library)


torchvision = _import_torchvision()
