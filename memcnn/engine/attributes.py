"""Plain attributes of modules: numbers, flags, strings and functions, such as a temperature or ``Dropout.p``."""

from itertools import islice
from operator import is_
from types import BuiltinFunctionType, FunctionType, NoneType

import torch
from torch import Tensor, nn

_WORDS = {bool, int, float, complex, str, bytes, NoneType}
_NAMES = {type, FunctionType, BuiltinFunctionType, torch.dtype, torch.device}
SCALARS = frozenset(_WORDS | _NAMES)
"""Types of the attributes that are noted. Tuples of such values are noted too.

references.py notes tensors and containers. Other objects are not noted: they could hold tensors, which would then be
kept alive.
"""

BASE_ATTRIBUTES = len(vars(nn.Module()))
"""Number of attributes that ``nn.Module`` itself sets, before all others."""

Attributes = tuple[dict[str, object], tuple[str, ...], tuple]
"""Some attributes of a module: ``vars(module)``, their names, and their values when they were noted."""


def present(then: Attributes) -> Attributes:
    """Return the same attributes with their present values. A deleted attribute has the value None."""
    own, names, _ = then
    return own, names, tuple(map(own.get, names))


def have_changed(then: Attributes) -> bool:
    """Return whether an attribute has another value than when it was noted."""
    own, names, values = then
    return not all(map(is_, values, map(own.get, names))) and any(
        a is not b and (type(a) is not type(b) or a != b) for a, b in zip(values, map(own.get, names), strict=True)
    )


def defaults_hidden(then: Attributes, kind: type) -> tuple[str, ...]:
    """Return the names of attributes set since ``then`` that hide an attribute of the class ``kind``.

    An example is ``self.calls += 1``, where the class body has ``calls = 0``.
    """
    own, names, _ = then
    return tuple(
        [
            name
            for name, value in islice(own.items(), BASE_ATTRIBUTES, None)
            if type(value) in SCALARS and name not in names and type(getattr(kind, name, None)) in SCALARS
        ]
    )


def expose_defaults(own: dict[str, object], names: tuple[str, ...], undo: list[tuple]) -> None:
    """Remove attributes that hide attributes of the class. ``undo`` receives the call that undoes this."""
    undo.append((own.update, {name: own.pop(name) for name in names if name in own}))


def set_again(then: Attributes, undo: list[tuple]) -> None:
    """Set the attributes that still exist to the noted values. ``undo`` receives the call that undoes this.

    If None became an object, such as a log file that the first call opens, the object stays.
    """
    own, names, values = then
    before = {
        name: value
        for name, value in zip(names, values, strict=True)
        if name in own and (value is not None or type(own[name]) in SCALARS or isinstance(own[name], Tensor))
    }
    undo.append((own.update, {name: own[name] for name in before}))
    own.update(before)


known_classes: dict[type, tuple[int, tuple[str, ...]]] = {}
"""For PyTorch's own layers: the number of attributes of an instance, and the names of those that are floats.

These layers change no attribute in their forward function and draw from no generator but PyTorch's. Only floats are
noted, because the rate of a dropout may follow a schedule. Nobody changes the stride of a convolution between forward
and backward.
"""


def known_class(module: nn.Module) -> tuple[int, tuple[str, ...]] | None:
    """Return the entry of the module's class in ``known_classes``. Make it if there is none yet.

    Return None if the class is not one of PyTorch's layers, or if this instance has an attribute that its constructor
    does not set, such as another forward function.
    """
    kind, own = type(module), vars(module)
    if kind.__module__.startswith("torch.nn.modules.") and kind not in known_classes:
        constructors = [vars(base)["__init__"] for base in kind.__mro__[:-1] if "__init__" in vars(base)]
        expected = {name for constructor in constructors for name in constructor.__code__.co_names}
        attributes = dict(islice(own.items(), BASE_ATTRIBUTES, None))
        if attributes.keys() <= expected:
            known_classes[kind] = len(own), tuple(k for k, value in attributes.items() if type(value) is float)
    entry = known_classes.get(kind)
    return entry if entry is not None and entry[0] == len(own) else None


def noted(module: nn.Module) -> Attributes:
    """Return the plain attributes of a user's module. For PyTorch's own wrappers, such as DDP, note no attributes."""
    own = vars(module)
    names = (
        ()
        if type(module).__module__.startswith("torch.") and type(module) not in known_classes
        else tuple(
            [
                name
                for name, value in islice(own.items(), BASE_ATTRIBUTES, None)
                if type(value) in SCALARS or (type(value) is tuple and SCALARS.issuperset(map(type, value)))
            ]
        )
    )
    return own, names, tuple(map(own.get, names))
