"""Random generators that a module may draw from: PyTorch's, Python's and NumPy's global ones, and the module's own.

Each kind has a function that reads a state and one that sets it. States are compared by ``==``, or by ``same_state``.

Python's and NumPy's generators take 15 and 100 us to say their state, too much for every evaluation of a branch. Their
2.5 KB of memory are read in 1 us. NumPy's generator holds back every other number of ``randn`` outside of that memory:
so its whole state is read at a module's first evaluation and, if that drew from it, at every later one.
"""

import ctypes
import pickle
import random
import struct
import weakref
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from memcnn.engine.torch_private import disabled_dispatch


class Source(NamedTuple):
    """A generator: its name for messages, and functions of ``key`` that read and set its state."""

    name: str
    read: Callable[[object], object]
    write: Callable[[object, object], None]
    key: object


def rng_state(device: torch.device) -> Tensor:
    """Return the state of PyTorch's default generator of the device."""
    return torch.default_generator.get_state() if device.type == "cpu" else torch.cuda.get_rng_state(device)


def set_rng_state(device: torch.device, state: Tensor) -> None:
    """Set the state of PyTorch's default generator of the device."""
    if device.type == "cpu":
        torch.default_generator.set_state(state)
    else:
        torch.cuda.set_rng_state(state, device)


def same_state(state: object, other: object) -> bool:
    """Return whether two states are the same. They are real tensors, under a mode of fake ones too."""
    if isinstance(state, Tensor):
        with disabled_dispatch():
            return torch.equal(state, other)
    return state == other


# Python's global generator: ``_random.Random`` is an object's header, an int (the position) and 624 words of 32 bits

_PYTHON = random.random.__self__
_PYTHON_HEADER = object.__basicsize__
_PYTHON_LAYOUT = struct.Struct("=i624I")


def _python_memory() -> bytes:
    return ctypes.string_at(id(_PYTHON) + _PYTHON_HEADER, _PYTHON_LAYOUT.size)


def _python_is_readable() -> bool:
    """Return whether the memory of Python's generator has the layout of CPython that is known here."""
    if type(_PYTHON).__mro__[1].__basicsize__ < _PYTHON_HEADER + _PYTHON_LAYOUT.size:
        return False
    position, *words = _PYTHON_LAYOUT.unpack(_python_memory())
    return random.getstate()[1] == (*words, position)


if _python_is_readable():
    def _read_python(_) -> object:
        return _python_memory(), _PYTHON.gauss_next

    def _write_python(_, state: tuple[bytes, float | None]) -> None:
        position, *words = _PYTHON_LAYOUT.unpack(state[0])
        random.setstate((3, (*words, position), state[1]))
else:
    def _read_python(_) -> object:
        return random.getstate()

    def _write_python(_, state: object) -> None:
        random.setstate(state)


# NumPy's global generator: its memory is 624 words of 32 bits and an int (the position)

_NUMPY_LAYOUT = struct.Struct("=624Ii")


def _numpy_memory(_=None) -> bytes | None:
    bits = np.random.get_bit_generator()
    if type(bits) is not np.random.MT19937:
        return None
    return ctypes.string_at(bits.ctypes.state_address, _NUMPY_LAYOUT.size)


def _read_numpy(_) -> bytes:
    return pickle.dumps(np.random.get_state(legacy=False))


def _write_numpy(_, state: bytes) -> None:
    np.random.set_state(pickle.loads(state))


def _from_memory(memory: bytes) -> bytes:
    """Return a state with the given memory and, of the number held back, what is true now."""
    state = np.random.get_state(legacy=False)
    *words, position = _NUMPY_LAYOUT.unpack(memory)
    state["state"] = {"key": np.array(words, np.uint32), "pos": position}
    return pickle.dumps(state)


PYTHON = Source("Python's random module", _read_python, _write_python, None)
NUMPY = Source("numpy.random", _read_numpy, _write_numpy, None)
_NUMPY_MEMORY = Source("numpy.random", _numpy_memory, lambda _, memory: _write_numpy(_, _from_memory(memory)), None)

_evaluated: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()
"""Modules of which one evaluation was watched with NumPy's whole state."""
_numpy_users: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()
"""Those among them that drew from it."""


def numpy_source(module: nn.Module) -> Source:
    """Return how NumPy's generator is watched in an evaluation of ``module``."""
    if module in _evaluated and module not in _numpy_users and _numpy_memory() is not None:
        return _NUMPY_MEMORY
    _evaluated.add(module)
    return NUMPY


def whole(source: Source, state: object, module: nn.Module) -> tuple[Source, object]:
    """Return source and state with which a drawing module can be replayed."""
    if source.name == NUMPY.name:
        _numpy_users.add(module)
    return (NUMPY, _from_memory(state)) if source is _NUMPY_MEMORY else (source, state)


# Generators that a module owns

OWNED: dict[type, tuple[str, Callable, Callable]] = {
    torch.Generator: ("its own torch.Generator", torch.Generator.get_state, torch.Generator.set_state),
    random.Random: ("its own random.Random", random.Random.getstate, random.Random.setstate),
    np.random.Generator: (
        "its own numpy.random.Generator", lambda g: pickle.dumps(g.bit_generator.state),
        lambda g, state: setattr(g.bit_generator, "state", pickle.loads(state))),
    np.random.RandomState: (
        "its own numpy.random.RandomState", lambda g: pickle.dumps(g.get_state(legacy=False)),
        lambda g, state: g.set_state(pickle.loads(state))),
}
"""By type: name, functions that read and set the state."""


def owned(generator: object) -> Source:
    """Return the source of a generator that a module owns."""
    return Source(*OWNED[type(generator)], generator)
