"""The values between blocks, and the order in which they are rebuilt.

A ``Value`` stands for one tensor of a chain of blocks. The end of the chain is stored. Every other value has a ``Link``
that rebuilds it from later values (rule 3 in recompute.py). Most links are steps (``Recomputation``); the others are
``Rearrangement`` and ``DirectRun``. ``tag`` attaches the values to a block's output, where the next block finds them.
"""

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from memcnn.engine.exact import Grid
from memcnn.engine.identity import identity
from memcnn.engine.retained import Stored, drop_later, start_link
from memcnn.engine.torch_private import keeps_graph

if TYPE_CHECKING:
    from memcnn.engine.couple import Recording


class ThreadState(threading.local):
    """The state of the calling code that a block must know, such as the recording that is running.

    Each thread has its own, because several threads may be within a block, as under ``nn.DataParallel``.
    """

    recording: "Recording | None" = None
    """Holds the values of the tensors within the running block. None outside of blocks and in branches."""
    storing = False
    """True while blocks store their activations, as under ordinary autograd."""
    noted_sources: "list[weakref.ref[Value]] | None" = None
    """The sources of all steps completed within the running branch, ends of nested chains among them; else None."""


thread_state = ThreadState()

evaluation_lock = threading.RLock()
"""Held during every evaluation of a branch, the first and the second: they read and set generators, buffers and modes
that all threads share. Blocks of several threads therefore take turns."""


class Value(Stored):
    """One tensor of a chain: stored, or rebuilt by ``link``, which dropped it."""

    __slots__ = ("link", "pending_reads")

    def __init__(self, tensor: Tensor):
        self.link: Link | None = None
        self.pending_reads = 0
        self.store(tensor)

    def read(self) -> Tensor:
        """Return the stored tensor. Raise a RuntimeError if it was modified in place."""
        if self.tensor._version != self.version:
            raise RuntimeError(
                f"an output (or kept input) of a reversible block, shape {tuple(self.tensor.shape)}, was modified in "
                "place after the forward pass, but backward rebuilds the block's activations from it: use an "
                "out-of-place operation, or modify a clone"
            )
        return self.tensor


class Link:
    """Rebuilds its ``targets`` from its ``sources``.

    ``sources`` is None until ``complete``, then the values to rebuild from. When they are no longer needed, it is ().

    References point from targets to link to sources. A link refers to its targets weakly, except to those that it
    keeps, which hold no link. There are no cycles, so that reference counting frees everything.
    """

    def __init__(self, targets: Sequence[Value], *, keep: bool = False):
        self.targets = [weakref.ref(value) for value in targets]
        self.kept = targets if keep else ()
        self.sources: Sequence[Value] | None = None

    def complete(self, sources: Sequence[Value]) -> None:
        """Let the targets refer to this link instead of their tensors, unless they are kept or have another link."""
        self.sources = sources
        if not self.kept:
            self._take(self.targets)

    def rebuild(self, keep_graph: bool) -> None:
        """Restore the targets: permanently, or only for this pass if the graph is retained."""
        raise NotImplementedError

    def _take(self, values: Sequence[weakref.ref[Value]]) -> None:
        """Drop the tensors of those values that have no link yet. This link rebuilds them."""
        for reference in values:
            if (value := reference()) is not None and value.link is None:
                value.tensor, value.link = None, self

    def _give(self, values: Sequence[weakref.ref[Value]], tensors: Sequence[Tensor | None], keep_graph: bool) -> None:
        """Store the rebuilt tensors in those values that are still alive and have none."""
        for reference, tensor in zip(values, tensors, strict=True):
            if (value := reference()) is not None and value.tensor is None and tensor is not None:
                value.store(tensor)
                if keep_graph:
                    drop_later(value)
                else:
                    value.link = None


class Rearrangement(Link):
    """Rebuilds a tensor from its halves, or the halves from their tensor."""

    def __init__(self, targets: Sequence[Value], sources: Sequence[Value], operation: Callable):
        super().__init__(targets)
        self.operation = operation
        self.complete(sources)

    def rebuild(self, keep_graph: bool) -> None:
        if keep_graph:
            start_link()
        self._give(self.targets, self.operation([value.read() for value in self.sources]), keep_graph)
        if not keep_graph:
            self.sources = ()


def rebuild(first: Link, action: Callable[[bool], Any] | None = None) -> Any:
    """Rebuild ``first`` after the links that it needs, from the chain's stored end.

    This is a loop and no recursion, because chains can be long.

    Args:
        first: the link.
        action: called with ``keep_graph`` in place of ``first.rebuild``. Its result is returned.
    """
    keep_graph, link, result = keeps_graph(), first, None
    with evaluation_lock:
        waiting = [(link, _add_pending_reads(link.sources, 1))]
        try:
            while waiting:
                link, sources = waiting[-1]
                # a source that is empty: rebuild its link first; if there is none, this link is ready
                for value in sources:
                    if value.tensor is None:
                        waiting.append((value.link, _add_pending_reads(value.link.sources, 1)))
                        break
                else:
                    if action is not None and link is first:
                        result = action(keep_graph)
                    else:
                        link.rebuild(keep_graph)
                    _add_pending_reads(waiting.pop()[1], -1)
        finally:
            for _, sources in waiting:
                _add_pending_reads(sources, -1)
    return result


def _add_pending_reads(values: Sequence[Value], change: int) -> Sequence[Value]:
    """Add ``change`` to the number of pending reads of each value. Return the values."""
    for value in values:
        value.pending_reads += change
    return values


@contextmanager
def storing() -> Iterator[None]:
    """Within this context blocks store their activations, as under ordinary autograd."""
    previous, thread_state.storing = thread_state.storing, True
    try:
        yield
    finally:
        thread_state.storing = previous


def is_storing() -> bool:
    """Return whether the caller is within ``storing()``."""
    return thread_state.storing


def dense(x: Tensor) -> Tensor:
    """Return x, or a dense copy in the same order of dimensions if x is a view with gaps or overlaps.

    A rebuilt tensor is dense, and kernels may compute other bits or save other tensors for other strides. Compiled code
    chooses its own kernels, and the compiler cannot trace this check, so there x is returned as it is.
    """
    if torch.compiler.is_compiling() or x.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(x):
        return x
    return x.clone()


def restrided(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """Return x, or a copy with the strides that the forward evaluation saw, because results of kernels depend on them.

    Strides of 0 are not restored. Only the half that ``couple`` changes can have them, and no branch reads that half.
    """
    if x.stride() == strides or 0 in strides:
        return x
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)


_TAG = "memcnn.values"


class Tag(NamedTuple):
    """The values that a block attaches to its output, for the block that receives it.

    The references to the values are weak, because the graph outlives rebuilt tensors. Links hold the values they need.
    """

    values: Sequence["weakref.ref[Value]"]
    dim: int | None
    """None if there is one value, that of the tensor itself. Otherwise the values are those of its halves along
    ``dim``."""
    grid: Grid | None
    identity: tuple[int, int] | None


_NO_TAG = Tag((), -1, None, None)


def tag(y: Tensor, values: Sequence[Value], dim: int | None, grid: Grid | None = None) -> None:
    """Attach ``values`` to the output y, in the metadata of its graph node."""
    if y.grad_fn is not None:
        metadata: Any = y.grad_fn.metadata  # a dictionary; the stub takes the property for a method
        metadata[_TAG, y.output_nr] = Tag([weakref.ref(value) for value in values], dim, grid, identity(y))


def tag_of(x: Tensor) -> Tag:
    """Return what a block has attached to x. Return an empty tag if there is none, or if x was modified since."""
    node: Any = x.grad_fn
    found = node.metadata.get((_TAG, x.output_nr)) if node is not None else None
    return found if found is not None and found.identity == identity(x) else _NO_TAG


def value_of_whole(x: Tensor) -> Value | None:
    """Return the value of x as one tensor, not as halves, if a block has attached values to it that are still needed.

    Return None otherwise.
    """
    found = tag_of(x)
    values = [reference() for reference in found.values]
    if not any(values):
        return None
    if found.dim is None:
        return values[0]
    whole = Value(x)
    halves = x.detach().chunk(2, found.dim)
    Rearrangement(
        [value or Value(half) for value, half in zip(values, halves, strict=True)],
        [whole],
        lambda tensors: tensors[0].chunk(2, found.dim),
    )
    return whole


def rebuild_from(value: Value, y: Tensor) -> None:
    """Let the values that a nested block has attached to y be rebuilt from ``value``, the value of y."""
    found = tag_of(y)
    if found.values:
        halves = [y] if found.dim is None else y.detach().chunk(2, found.dim)
        Rearrangement(
            [reference() or Value(half) for reference, half in zip(found.values, halves, strict=True)],
            [value],
            lambda tensors: tensors if found.dim is None else tensors[0].chunk(2, found.dim),
        )
