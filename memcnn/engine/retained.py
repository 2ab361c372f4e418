"""When rebuilt tensors are dropped again under ``retain_graph=True``.

Without ``retain_graph`` autograd frees each activation after use. With it, we cannot know when an activation is no
longer needed. We keep the tensors that the last ``KEPT_LINKS`` links have rebuilt and drop older ones. A dropped tensor
that is needed after all is rebuilt once more. When the pass ends, all are dropped.
"""

import functools
import weakref
from collections import deque
from collections.abc import Iterator

from torch import Tensor

from memcnn.engine.torch_private import at_end_of_backward, current_backward_pass, never_compiled

KEPT_LINKS = 8
"""Number of links (see chain.py) whose rebuilt tensors a pass with a retained graph keeps."""


class Stored:
    """A place that stores a tensor without its graph. The tensor can be dropped and stored again."""

    __slots__ = ("__weakref__", "tensor", "version")

    tensor: Tensor | None
    version: int
    """The version of the tensor when it was stored."""
    pending_reads = 0
    """Number of links that are waiting to be rebuilt from this tensor."""

    @never_compiled
    def store(self, tensor: Tensor) -> None:
        self.tensor, self.version = tensor.detach(), tensor._version


passes: dict[int, deque[list[tuple[weakref.ref[Stored], int]]]] = {}
"""For each running backward pass with a retained graph, by its number: a list for each link, of the places that the
link filled and the ids of their tensors."""


def start_link() -> None:
    """Begin the next link of the running backward pass. Later calls of ``drop_later`` belong to it."""
    number = current_backward_pass()
    if number not in passes:
        passes[number] = deque()
        if number != -1:
            end = functools.partial(end_pass, number)
            at_end_of_backward(end)
            # if the pass raises, PyTorch drops the callback without calling it; the finalizer then does the work
            weakref.finalize(end, end_pass, number)
    passes[number].append([])
    if len(passes[number]) > KEPT_LINKS:
        for stored in _still_rebuilt(passes[number].popleft()):
            if stored.pending_reads:
                drop_later(stored)
            else:
                stored.tensor = None


def drop_later(stored: Stored, number: int | None = None) -> None:
    """Drop the tensor again when the pass has rebuilt ``KEPT_LINKS`` further links, or ends.

    Args:
        stored: the place that stores the tensor.
        number: the pass; None means the running one.
    """
    passes[current_backward_pass() if number is None else number][-1].append((weakref.ref(stored), id(stored.tensor)))


def end_pass(number: int) -> None:
    """Drop all tensors that the backward pass of this number has rebuilt."""
    for link in passes.pop(number, ()):
        for stored in _still_rebuilt(link):
            stored.tensor = None


def _still_rebuilt(link: list[tuple[weakref.ref[Stored], int]]) -> Iterator[Stored]:
    """Yield the places that are still alive and still store the tensor that the link has rebuilt."""
    for reference, tensor_id in link:
        if (stored := reference()) is not None and id(stored.tensor) == tensor_id:
            yield stored
