"""Plain attributes of modules: numbers, flags and words, such as a temperature or ``Dropout.p``."""

from itertools import islice
from operator import is_
from typing import NamedTuple

import torch
from torch import nn

SCALARS = frozenset({bool, int, float, complex, str, torch.dtype})
"""Types of the values that are noted. Values of other types might hold tensors, whose memory a note would keep."""

BASE_ATTRIBUTES = len(vars(nn.Module()))
"""Number of attributes that ``nn.Module`` itself sets, before all others."""


class Attributes(NamedTuple):
    """Some attributes of a module: its dictionary, their names, and their values when they were noted."""

    own: dict[str, object]
    names: tuple[str, ...]
    values: tuple

    def now(self) -> tuple:
        """Return the present values; None for one that was deleted."""
        return tuple(map(self.own.get, self.names))


def differ(values: tuple, others: tuple) -> bool:
    """Return whether two notes of the same attributes differ."""
    return not all(map(is_, values, others)) and any(
        a is not b and (type(a) is not type(b) or type(a) not in SCALARS or a != b)
        for a, b in zip(values, others, strict=True))


known_classes: dict[type, tuple[int, tuple[str, ...]]] = {}
"""For PyTorch's own layers: how many attributes an instance has, and the names of the plain ones.

They change no attribute in their forward function and draw from no generator but PyTorch's.
"""


def known_class(module: nn.Module) -> tuple[int, tuple[str, ...]] | None:
    """Return the entry of the module's class in ``known_classes``, made if need be; None if it has none.

    An instance with an attribute that its constructor does not set, such as another forward function, has none.
    """
    kind, own = type(module), vars(module)
    if kind.__module__.startswith("torch.nn.modules.") and kind not in known_classes:
        constructors = [vars(base)["__init__"] for base in kind.__mro__[:-1] if "__init__" in vars(base)]
        expected = {name for constructor in constructors for name in constructor.__code__.co_names}
        attributes = dict(islice(own.items(), BASE_ATTRIBUTES, None))
        if attributes.keys() <= expected:
            known_classes[kind] = len(own), tuple(k for k, value in attributes.items() if type(value) in SCALARS)
    entry = known_classes.get(kind)
    return entry if entry is not None and entry[0] == len(own) else None


def noted(module: nn.Module) -> Attributes:
    """Return the plain attributes of a module of the user's; none of a wrapper of PyTorch, which looks after itself."""
    own = vars(module)
    names = () if type(module).__module__.startswith("torch.") and type(module) not in known_classes else tuple(
        name for name, value in islice(own.items(), BASE_ATTRIBUTES, None) if type(value) in SCALARS)
    return Attributes(own, names, tuple(map(own.get, names)))
