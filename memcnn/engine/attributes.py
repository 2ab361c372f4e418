"""Plain attributes of modules that are constants: numbers, flags, strings, functions, such as ``Dropout.p``."""

from collections import Counter, OrderedDict, defaultdict, deque
from enum import Enum
from itertools import islice
from numbers import Number
from operator import is_
from types import BuiltinFunctionType, FunctionType, NoneType

import numpy as np
import torch
from torch import Tensor, nn

_CONSTANT_TYPES = {type, FunctionType, BuiltinFunctionType, NoneType, torch.dtype, torch.device}


class _Constants(dict[type, bool]):
    """Maps each type to True if its values are constants: Python's and NumPy's numbers, strings, flags, functions.

    Constants are noted as they are, and so are tuples and frozen sets of constants. references.py notes tensors and
    containers. Other objects are not noted: they could hold tensors, which would then be kept alive.
    """

    def __missing__(self, kind: type) -> bool:
        self[kind] = is_constant = kind in _CONSTANT_TYPES or issubclass(
            kind, (Number, str, bytes, np.generic, Enum, range, slice)
        )
        return is_constant


IS_CONSTANT = _Constants()
CONTAINERS = frozenset({list, dict, OrderedDict, defaultdict, Counter, set, deque, bytearray})
"""Types of containers whose content may change. references.py copies them."""

BASE_ATTRIBUTES = len(vars(nn.Module()))
"""Number of attributes that ``nn.Module`` itself sets, before all others."""

Attributes = tuple[dict[str, object], tuple[str, ...], tuple]
"""Some attributes of a module: ``vars(module)``, their names, and their values when they were noted."""


def with_present_values(then: Attributes) -> Attributes:
    """Return the same attributes with their present values. A deleted attribute has the value None."""
    own, names, _ = then
    return own, names, tuple(map(own.get, names))


def have_changed(then: Attributes) -> bool:
    """Return whether an attribute has another value than when it was noted."""
    own, names, values = then
    return not all(map(is_, values, map(own.get, names))) and any(
        a is not b and (type(a) is not type(b) or a != b) for a, b in zip(values, map(own.get, names), strict=True)
    )


def names_added_since(own: dict[str, object], size: int) -> tuple[str, ...]:
    """Return the names of constants, tensors and containers that were added to a module's attributes.

    An example is ``self.calls += 1``, where the class body has ``calls = 0``; another one is ``self.state = h`` in the
    first call.

    Args:
        own: ``vars(module)``.
        size: the number of attributes before. A new attribute is the last one in the dictionary.
    """
    return tuple([name for name, value in islice(own.items(), size, None) if is_data(value)])


def remove(own: dict[str, object], names: tuple[str, ...], undo: list[tuple]) -> None:
    """Remove attributes. ``undo`` receives the call that undoes this."""
    undo.append((own.update, {name: own.pop(name) for name in names if name in own}))


def set_again(then: Attributes, undo: list[tuple]) -> None:
    """Set the attributes that still exist to the noted values. ``undo`` receives the call that undoes this.

    If None became an object, such as a log file that the first call opens, the object stays.
    """
    own, names, values = then
    before = {
        name: value
        for name, value in zip(names, values, strict=True)
        if name in own and (value is not None or is_data(own[name]))
    }
    undo.append((own.update, {name: own[name] for name in before}))
    own.update(before)


def is_data(value: object) -> bool:
    """Return whether a value is a constant, a tensor or a container, and no other object."""
    return IS_CONSTANT[type(value)] or type(value) in CONTAINERS or isinstance(value, (Tensor, tuple, frozenset))


def is_constant(value: object) -> bool:
    """Return whether a value is a constant, or a tuple or frozen set of constants."""
    return IS_CONSTANT[type(value)] or (
        isinstance(value, (tuple, frozenset)) and all(map(IS_CONSTANT.__getitem__, map(type, value)))
    )


known_classes: dict[type, tuple[int, tuple[str, ...]]] = {}
"""For PyTorch's own layers: the number of attributes of an instance, and the names of those that are floats.

These layers change no attribute in their forward function and draw from no generator but PyTorch's. Only floats are
noted, because the rate of a dropout may follow a schedule. Nobody changes the stride of a convolution between forward
and backward.
"""


def layer_of(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the layer of PyTorch that a class stands for; the class itself if it names none."""
    layer = vars(kind).get("stands_for")
    return layer if isinstance(layer, type) and issubclass(layer, nn.Module) else kind


def known_class(module: nn.Module, kind: type[nn.Module] | None = None) -> tuple[int, tuple[str, ...]] | None:
    """Return the entry of a class in ``known_classes``. Make it if there is none yet.

    Return None if the class is not one of PyTorch's layers, or if this instance has an attribute that the constructor
    of the class does not set, such as another forward function.

    Args:
        module: an instance of the class, or of a subclass.
        kind: the class; None for the class of ``module``.
    """
    kind, own = kind or type(module), vars(module)
    if kind.__module__.startswith("torch.nn.modules.") and kind not in known_classes:
        constructors = [vars(base)["__init__"] for base in kind.__mro__[:-1] if "__init__" in vars(base)]
        expected = {name for constructor in constructors for name in constructor.__code__.co_names}
        attributes = dict(islice(own.items(), BASE_ATTRIBUTES, None))
        if attributes.keys() <= expected:
            known_classes[kind] = len(own), tuple(k for k, value in attributes.items() if type(value) is float)
    entry = known_classes.get(kind)
    return entry if entry is not None and entry[0] == len(own) else None


def note_constants(module: nn.Module) -> Attributes:
    """Return the attributes of a user's module that are constants.

    Return none for PyTorch's own wrappers, such as DDP.
    """
    own = vars(module)
    names = (
        ()
        if type(module).__module__.startswith("torch.") and type(module) not in known_classes
        else tuple(
            [
                name
                for name, value in islice(own.items(), BASE_ATTRIBUTES, None)
                if IS_CONSTANT[type(value)] or is_constant(value)
            ]
        )
    )
    return own, names, tuple(map(own.get, names))
