"""Random generators that a module may draw from: PyTorch's, Python's and NumPy's global ones, and the module's own.

Each kind has a function that reads a state and one that sets it. States are compared by ``==``, or by ``same_state``.

Reading the state of Python's generator takes 15 us, of NumPy's 100 us: too long for every evaluation of a branch. The
2.5 KB of memory of either are read in 1 us. But NumPy's generator makes two numbers of ``randn`` at a time and keeps
the second one outside of that memory. So its whole state is read at the first evaluation of a module and, if that drew
from it, at every later one.
"""

import ctypes
import pickle
import random
import struct
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from memcnn.engine.torch_private import disabled_dispatch


class GeneratorAccess(NamedTuple):
    """How to read and set the state of a generator: its name for messages, and functions of ``key``."""

    name: str
    read: Callable[[Any], Any]
    write: Callable[[Any, Any], None]
    key: Any


class Drawn(NamedTuple):
    """A generator that the first evaluation draws from, with its states before and after."""

    access: GeneratorAccess
    before: object
    after: object


def rng_state(device: torch.device) -> Tensor:
    """Return the state of PyTorch's default generator of the device."""
    return torch.default_generator.get_state() if device.type == "cpu" else torch.cuda.get_rng_state(device)


def set_rng_state(device: torch.device, state: Tensor) -> None:
    """Set the state of PyTorch's default generator of the device."""
    if device.type == "cpu":
        torch.default_generator.set_state(state)
    else:
        torch.cuda.set_rng_state(state, device)


def same_state(state: Any, other: Any) -> bool:
    """Return whether two states are the same. States are real tensors even under ``FakeTensorMode``."""
    if isinstance(state, Tensor):
        with disabled_dispatch():
            return torch.equal(state, other)
    return state == other


def check_drawn(name: str, generators: Sequence[Drawn], initialised: bool) -> None:
    """Raise a RuntimeError if a further evaluation has left a generator in another state than the first.

    Args:
        name: the name of the module, for the message.
        generators: the generators that the first evaluation drew from.
        initialised: whether the first evaluation initialised the module, which a further one does not repeat.
    """
    for access, before, after in generators:
        now = access.read(access.key)
        if initialised and same_state(before, now):
            continue  # only the initialisation drew random numbers
        if after is not None and not same_state(after, now):
            raise RuntimeError(
                f"{name} drew other random numbers from {access.name} in the recomputation than in "
                "the forward pass: another thread drew from it at the same time, or the module draws another "
                "number of them, or it initialised itself in that forward pass; draw in one thread at a time, or "
                "from a torch.Generator that the module owns, and give a module that initialises itself a forward "
                "pass under torch.no_grad() first"
            )


# Python's global generator: ``_random.Random`` is an object's header, an int (the position) and 624 words of 32 bits

_PYTHON = random.random.__self__  # type: ignore[attr-defined]  # a bound method; typeshed has a function
_PYTHON_ADDRESS = id(_PYTHON) + object.__basicsize__
_PYTHON_LAYOUT = struct.Struct("=i624I")


def python_is_readable() -> bool:
    """Return whether the memory of Python's generator has the layout of CPython, which the functions below read."""
    if type(_PYTHON).__mro__[1].__basicsize__ < object.__basicsize__ + _PYTHON_LAYOUT.size:
        return False
    position, *words = _PYTHON_LAYOUT.unpack(ctypes.string_at(_PYTHON_ADDRESS, _PYTHON_LAYOUT.size))
    return random.getstate()[1] == (*words, position)


if python_is_readable():

    def _read_python(_: object = None) -> object:
        return ctypes.string_at(_PYTHON_ADDRESS, 2500), _PYTHON.gauss_next

    def _write_python(_: object, state: Any) -> None:
        position, *words = _PYTHON_LAYOUT.unpack(state[0])
        random.setstate((3, (*words, position), state[1]))
else:

    def _read_python(_: object = None) -> object:
        return random.getstate()

    def _write_python(_: object, state: Any) -> None:
        random.setstate(state)


# NumPy's global generator: its memory is 624 words of 32 bits and an int (the position)

_NUMPY_LAYOUT = struct.Struct("=624Ii")
_numpy_bits: Callable[[], Any] = np.random.get_bit_generator  # type: ignore[attr-defined]  # the stubs leave it out
_numpy_default = _numpy_bits()
_numpy_address = _numpy_default.ctypes.state_address


def numpy_memory() -> bytes:
    """Return the memory of NumPy's generator, or its whole state if the user has set another bit generator."""
    if _numpy_bits() is not _numpy_default:
        return _read_numpy()
    return ctypes.string_at(_numpy_address, 2500)


def numpy_state_from(memory: bytes) -> bytes:
    """Return a NumPy state with the given memory.

    The memory lacks the second number of the last ``randn`` pair. It is taken from the present state.
    """
    if len(memory) != _NUMPY_LAYOUT.size:
        return memory
    state = np.random.get_state(legacy=False)
    *words, position = _NUMPY_LAYOUT.unpack(memory)
    state["state"] = {"key": np.array(words, np.uint32), "pos": position}
    return pickle.dumps(state)


def _read_numpy(_: object = None) -> bytes:
    return pickle.dumps(np.random.get_state(legacy=False))


def _write_numpy(_: object, state: bytes) -> None:
    np.random.set_state(pickle.loads(state))


PYTHON = GeneratorAccess("Python's random module", _read_python, _write_python, None)
NUMPY = GeneratorAccess("NumPy's generator", _read_numpy, _write_numpy, None)

_without_numpy: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()
"""Modules that have not drawn from NumPy's generator in the evaluations so far."""
_numpy_users: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()
"""Modules that have drawn from it."""

GlobalStates = tuple[object, bytes, bytes | None]
"""The state of Python's generator, the memory of NumPy's generator, and the whole state of NumPy's if it was read."""


def global_states(module: nn.Module) -> GlobalStates:
    """Return the states of Python's and NumPy's generators before an evaluation of ``module``."""
    return _read_python(), numpy_memory(), None if module in _without_numpy else _read_numpy()


def drawn_from_globals(module: nn.Module, before: GlobalStates) -> list[tuple[GeneratorAccess, object]]:
    """Return which of the two generators ``module`` has drawn from, each with its state before that."""
    python, memory, whole = before
    drawn: list[tuple[GeneratorAccess, object]] = []
    if python != _read_python():
        drawn.append((PYTHON, python))
    if (numpy := _numpy_before_draw(module, memory, whole)) is not None:
        drawn.append((NUMPY, numpy))
    return drawn


def _numpy_before_draw(module: nn.Module, memory: bytes, whole: bytes | None) -> bytes | None:
    """Return the state of NumPy's generator before ``module`` drew from it; None if it did not draw."""
    if whole is None:
        if memory == numpy_memory():
            return None
        whole = numpy_state_from(memory)
    elif whole == _read_numpy():
        if module not in _numpy_users:
            _without_numpy.add(module)
        return None
    _numpy_users.add(module)
    _without_numpy.discard(module)
    return whole


# Generators that a module owns

OWNED: dict[type, tuple[str, Callable, Callable]] = {
    torch.Generator: ("its own torch.Generator", torch.Generator.get_state, torch.Generator.set_state),
    random.Random: ("its own random.Random", random.Random.getstate, random.Random.setstate),
    np.random.Generator: (
        "its own numpy.random.Generator",
        lambda g: pickle.dumps(g.bit_generator.state),
        lambda g, state: setattr(g.bit_generator, "state", pickle.loads(state)),
    ),
    np.random.RandomState: (
        "its own numpy.random.RandomState",
        lambda g: pickle.dumps(g.get_state(legacy=False)),
        lambda g, state: g.set_state(pickle.loads(state)),
    ),
}
"""For each type of generator: its name for messages, and functions that read and set its state."""


def owned(generator: object) -> GeneratorAccess:
    """Return how to access a generator that a module owns."""
    return GeneratorAccess(*OWNED[type(generator)], generator)
