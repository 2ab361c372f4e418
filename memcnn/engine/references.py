"""Plain attributes that are tensors, lists or dictionaries: a context, a mask, a cache, a history.

A tensor without a graph is treated as a buffer (buffers.py). For a tensor with a graph we note only its values, because
the graph would keep the previous evaluation alive, which would keep the one before it alive, and so on. For a small
container we note a copy. The second evaluation gets this copy, so that what it adds is dropped.
"""

from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from memcnn.engine.attributes import BASE_ATTRIBUTES, SCALARS

CONTAINERS = frozenset({list, dict, set, deque})
MOST_ENTRIES = 64
"""Largest container that is copied at every evaluation."""

HELD_BY_REFERENCE = CONTAINERS | {Tensor}


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
            with torch.enable_grad():
                leaf = self.values.detach().requires_grad_()
                self.own[self.name] = leaf.view_as(leaf)


class Container(NamedTuple):
    """A plain attribute that is a list, dictionary, set or deque.

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
            self.own[self.name] = self.content.copy()


def references(module: nn.Module) -> Iterator[tuple[str, Tensor | Container]]:
    """Yield the plain attributes that are tensors or small containers: the name, and the tensor or a ``Container``."""
    own = vars(module)
    for name, value in islice(own.items(), BASE_ATTRIBUTES, None):
        if type(value) is Tensor:
            yield name, value
        elif type(value) in CONTAINERS and len(value) <= MOST_ENTRIES:
            entries = value.values() if type(value) is dict else value
            if all(type(x) in SCALARS or (type(x) is Tensor and x.grad_fn is None) for x in entries):
                yield name, Container(own, name, value.copy())
