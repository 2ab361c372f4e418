"""Plain attributes that are tensors or containers: a context, a mask, a cache, a history, the state of an LSTM.

A tensor without a graph is treated as a buffer (buffers.py). For a tensor with a graph we note only its values, because
the graph would keep the previous evaluation alive, which would keep the one before it alive, and so on. For a small
container we note a copy, also of the containers in it. The second evaluation gets a copy of this copy, so that what it
adds is dropped.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from memcnn.engine.attributes import BASE_ATTRIBUTES, CONTAINERS, is_constant

MOST_ENTRIES = 64
"""Largest number of entries of a container that is copied at every evaluation, with those of inner containers."""


class NotCopied(Exception):
    """A value is neither a constant, a tensor nor a small container of such values."""


class DetachedTensor:
    """Stands for a tensor with a graph in the copy of a container. Holds its values without the graph."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor.detach()


class WithGraph(NamedTuple):
    """A plain attribute that is a tensor with a graph.

    Attributes:
        own: ``vars(module)`` of its module.
        name: the name of the attribute.
        values: the tensor without its graph.
    """

    own: dict[str, Any]
    name: str
    values: Tensor

    def set_again(self, undo: list[tuple]) -> None:
        """Set the attribute to a tensor of the same values, which is no leaf either.

        ``undo`` receives the call that undoes this.
        """
        if self.name in self.own:
            undo.append((self.own.__setitem__, self.name, self.own[self.name]))
            self.own[self.name] = _with_graph(self.values)


class Container(NamedTuple):
    """A plain attribute that is a container.

    Attributes:
        own: ``vars(module)`` of its module.
        name: the name of the attribute.
        content: a copy of the container.
    """

    own: dict[str, Any]
    name: str
    content: Any

    def set_again(self, undo: list[tuple]) -> None:
        """Set the attribute to a new copy of the container. ``undo`` receives the call that undoes this."""
        if self.name in self.own:
            undo.append((self.own.__setitem__, self.name, self.own[self.name]))
            self.own[self.name] = deep_copy(self.content, _given_again)


def references(module: nn.Module) -> Iterator[tuple[str, Tensor | Container]]:
    """Yield the plain attributes that are tensors or small containers: the name, and the tensor or a ``Container``."""
    own = vars(module)
    for name, value in islice(own.items(), BASE_ATTRIBUTES, None):
        if type(value) is Tensor:
            yield name, value
        elif type(value) in CONTAINERS or (isinstance(value, (tuple, frozenset)) and not is_constant(value)):
            with suppress(NotCopied):
                yield name, Container(own, name, deep_copy(value, _noted))


def deep_copy(value: Any, of_tensor: Callable[[Any], Any], room: list[int] | None = None) -> Any:
    """Return a copy of a constant, a tensor or a container, with copies of the containers in it.

    Args:
        value: the value.
        of_tensor: a function; its result replaces each tensor or ``DetachedTensor``.
        room: a list with one number, how many entries may still be copied. None means ``MOST_ENTRIES``.

    Raises:
        NotCopied: another object is in it, or it has too many entries.
    """
    kind = type(value)
    if is_constant(value):
        return value
    if kind is Tensor or kind is DetachedTensor:
        return of_tensor(value)
    if kind not in CONTAINERS and not isinstance(value, (tuple, frozenset)):
        raise NotCopied
    room = [MOST_ENTRIES] if room is None else room
    room[0] -= len(value)
    if room[0] < 0:
        raise NotCopied
    if isinstance(value, dict):
        content = value.copy()  # keeps the default of a defaultdict
        for key, entry in value.items():
            content[key] = deep_copy(entry, of_tensor, room)
        return content
    if kind is bytearray:
        return value.copy()
    entries = [deep_copy(entry, of_tensor, room) for entry in value]
    if kind is deque:
        return deque(entries, value.maxlen)
    return getattr(kind, "_make", kind)(entries)  # named tuples have ``_make``


def _noted(tensor: Tensor) -> Tensor | DetachedTensor:
    return tensor if tensor.grad_fn is None else DetachedTensor(tensor)


def _given_again(noted: Tensor | DetachedTensor) -> Tensor:
    return _with_graph(noted.tensor) if isinstance(noted, DetachedTensor) else noted


def _with_graph(values: Tensor) -> Tensor:
    """Return a tensor of these values that requires a gradient and is no leaf."""
    with torch.enable_grad():
        leaf = values.detach().requires_grad_()
        return leaf.view_as(leaf)
