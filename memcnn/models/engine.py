"""The idea: forward, forget, invert, re-run locally, differentiate.

*Forward.* A branch of a reversible block runs as always and autograd records it as always, so hooks, gradient
accumulators and distributed wrappers see the ordinary graph. *Forget.* What the graph wants to save is dropped and a
``Handle`` saved in its place (``torch.autograd.graph.saved_tensors_hooks``). *Invert, re-run.* When backward asks for
the first handle of a ``Step``, the step evaluates its branch once more on the branch's own input, gives each handle its
activation and, with that same value, computes the tensor that the step had changed. *Differentiate.* Autograd goes on,
and frees what it has used.

The tensors between steps are ``Cell`` objects. A cell holds its tensor only at the end of a chain. As soon as a further
step consumes it, it holds that step instead, which can rebuild the tensor, so that a chain of any length stores its end
alone (Gomez et al., "The Reversible Residual Network", arXiv:1707.04585). Where blocks are nested, the end of an inner
chain is forgotten as well: the step around it evaluates it again. No tensor that a user can see is written to.

References point from a chain's start towards its end (handle, step, source cell, next step) and never back, so that
reference counting alone frees everything.
"""

import functools
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from memcnn.models.capture import refuse_capture
from memcnn.models.replay import Replay
from memcnn.rounding import relative_error

_uncompiled = torch.compiler.disable(reason="the engine of reversible blocks is no part of compiled code")
"""For what autograd calls from within code that may be compiled, as a branch is."""


class Cell:
    """One tensor of a chain: stored, or rebuilt by the link that consumed it."""

    __slots__ = ("tensor", "version", "link", "awaited", "__weakref__")

    def __init__(self, tensor: Tensor):
        self.link = None
        self.awaited = 0  # by how many links that are about to be rebuilt from it
        self.store(tensor)

    def store(self, tensor: Tensor) -> None:
        self.tensor, self.version = tensor.detach(), tensor._version

    def value(self) -> Tensor:
        if self.tensor._version != self.version:
            raise RuntimeError(
                f"an output (or kept input) of a reversible block, shape {tuple(self.tensor.shape)}, was modified in "
                "place after the forward pass, but backward rebuilds the block's activations from it: use an "
                "out-of-place operation, or modify a clone")
        return self.tensor


class Handle:
    """What autograd saves in the place of an activation. It lives as long as the graph node that saved it."""

    __slots__ = ("tensor", "version", "shape", "dtype", "__weakref__")

    def __init__(self, tensor: Tensor):
        self.tensor, self.shape, self.dtype = None, tensor.shape, tensor.dtype

    def store(self, tensor: Tensor) -> None:
        self.tensor, self.version = tensor.detach(), tensor._version


class Link:
    """Rebuilds its ``targets`` from its ``sources``."""

    def __init__(self, targets: Sequence[Cell], *, keep: bool = False):
        self.targets = [weakref.ref(cell) for cell in targets]
        self.kept = targets if keep else ()
        self.sources: Sequence[Cell] | None = None

    def complete(self, sources: Sequence[Cell]) -> None:
        """From now on the targets, unless kept or another link has them, hold this link and no tensor."""
        self.sources = sources
        if not self.kept:
            self._take(self.targets)

    def recompute(self) -> Sequence[Tensor | None]:
        """The targets' values from the sources' values; None for a target that nobody holds any more."""
        raise NotImplementedError

    def check(self, values: Sequence[Tensor | None]) -> None:
        """RuntimeError if ``values`` are known to be wrong."""

    def rebuild(self, keep_graph: bool) -> None:
        """Give the targets their values: for good, or for a while in this pass if the graph is kept for another."""
        if keep_graph:
            _open_link()
        values = self.recompute()
        self.check(values)
        self._give(self.targets, values, keep_graph)
        if not keep_graph:
            self.sources = ()

    def _take(self, cells: Sequence[weakref.ref[Cell]]) -> None:
        for reference in cells:
            if (cell := reference()) is not None and cell.link is None:
                cell.tensor, cell.link = None, self

    def _give(self, cells: Sequence[weakref.ref[Cell]], values: Sequence[Tensor | None], keep_graph: bool) -> None:
        for reference, value in zip(cells, values, strict=True):
            if (cell := reference()) is not None and cell.tensor is None and value is not None:
                cell.store(value)
                if keep_graph:
                    _forget_later(cell)
                else:
                    cell.link = None


class Rearrange(Link):
    """Rebuilds a tensor from its halves, or halves from their tensor."""

    def __init__(self, targets: Sequence[Cell], sources: Sequence[Cell], operation: Callable):
        super().__init__(targets)
        self.operation = operation
        self.complete(sources)

    def recompute(self) -> Sequence[Tensor]:
        return self.operation([cell.value() for cell in self.sources])


class Step(Link):
    """One recorded evaluation of ``module`` on ``inputs``, which are dense. A subclass says how to recompute it.

    Args:
        keep_input: leave the targets' tensors stored.
        preserve_rng_state: give the recomputation the random numbers of the forward evaluation.
        check_inverse: the largest relative error that the rebuilt targets may have, which are stored for that.
    """

    def __init__(self, module: nn.Module, inputs: Sequence[Tensor], targets: Sequence[Cell], *,
                 keep_input: bool = False, preserve_rng_state: bool = True, check_inverse: float | None = None):
        self.check_inverse = check_inverse
        self.expected = [cell.tensor for cell in targets] if check_inverse is not None and not keep_input else []
        super().__init__(targets, keep=keep_input)
        if not keep_input and inputs and inputs[0].dtype in (torch.bfloat16, torch.float16):
            warnings.warn(f"rebuilding a {inputs[0].dtype} stream rounds as much again as computing in it, so that "
                          "gradients drift by percents, growing with depth: give the blocks float32 (x.float()) and "
                          "run their branches under torch.autocast, or use keep_input=True", stacklevel=2)
        self.module, self.inputs = module, inputs
        self.handles: list[weakref.ref[Handle]] = []
        self.nested: list[weakref.ref[Cell]] = []
        self.requires_grad = [t.requires_grad for t in inputs]
        self.strides = [t.stride() for t in inputs]
        self.replay = Replay(module, inputs, preserve_rng_state)

    @contextmanager
    def record(self) -> Iterator[None]:
        """Within this context the forward evaluation leaves handles in place of what autograd saves."""
        versions = [t._version for t in self.inputs]
        with self.replay.first(), saved_tensors_hooks(self._pack, self._unpack), _NotingSources() as self.nested:
            yield
        if versions != [t._version for t in self.inputs]:
            raise RuntimeError(f"{self.name} modifies its input in place, so that the block cannot be inverted: make "
                               "its first operation an out-of-place one")
        self.inputs = ()

    def complete(self, sources: Sequence[Cell]) -> None:
        """The ends of chains within the evaluation are forgotten as what autograd saves is: blocks may be nested."""
        super().complete(sources)
        if self.nested:  # one that was modified in place since is kept, and an error when it is asked for its value
            self._take([reference for reference in self.nested if (cell := reference()) is not None
                        and cell.tensor is not None and cell.tensor._version == cell.version])
        if (enclosing := getattr(_local, "sources", None)) is not None:
            enclosing += map(weakref.ref, sources)

    def check(self, values: Sequence[Tensor | None]) -> None:
        for got, wanted in zip(values, self.expected, strict=False):
            if wanted is not None:
                refuse_capture(wanted.device, "check_inverse compares values", "leave it out there")
            error = 0.0 if wanted is None else relative_error(got, wanted)
            if not error <= self.check_inverse:
                raise RuntimeError(
                    f"{self.name} is not inverted: its input of shape {tuple(wanted.shape)} is rebuilt with a relative "
                    f"error of {error:.1e}, more than check_inverse={self.check_inverse:.1e}, and gradients would be "
                    "as wrong; mend its inverse, or use keep_input=True, which needs none")

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Within this context a second evaluation gives the handles, in the same order, what autograd would save."""
        if self.wanted:
            with torch.enable_grad(), saved_tensors_hooks(self._collect, _unused), _NotingSources() as sources:
                yield
                self.nested_values += [cell and cell.tensor for cell in (reference() for reference in sources)]
        else:
            with torch.no_grad():
                yield

    def rebuild(self, keep_graph: bool) -> None:
        self.keep_graph, self.seen, self.nested_values = keep_graph, 0, []
        self.wanted = any(handle() is not None for handle in self.handles) or any(
            cell is not None and cell.link is self for cell in (reference() for reference in self.nested))
        super().rebuild(keep_graph)
        self.inputs = ()
        if self.wanted:
            if self.seen != len(self.handles):
                raise self._diverged(f"{len(self.handles)} saved tensors", f"{self.seen}")
            if len(self.nested_values) != len(self.nested):
                raise self._diverged(f"{len(self.nested)} tensors of nested blocks", f"{len(self.nested_values)}")
            if self.nested:
                self._give(self.nested, self.nested_values, keep_graph)
                self.nested_values = []

    def as_recorded(self, index: int, value: Tensor) -> Tensor:
        """An input as the forward evaluation saw it: its strides, on which kernels depend, and its requires_grad.

        What was expanded then is dense now: it cannot be written to, and only elementwise operations see it.
        """
        if value.stride() != self.strides[index] and 0 not in self.strides[index]:
            like = torch.empty_strided(value.shape, self.strides[index], dtype=value.dtype, device=value.device)
            value = like.copy_(value)
        return value.detach().requires_grad_(self.requires_grad[index])

    @property
    def name(self) -> str:
        return type(self.module).__name__

    def _outside(self, tensor: Tensor) -> bool:
        """Parameters, and other leaves that autograd keeps alive anyway, are saved as they are."""
        return tensor.is_leaf and tensor.requires_grad and not any(tensor is t for t in self.inputs)

    @_uncompiled
    def _pack(self, tensor: Tensor) -> Handle | tuple[Tensor, int] | Tensor:
        if self.replay.is_running_statistic(tensor):
            return tensor
        if self._outside(tensor):
            return tensor, tensor._version
        handle = Handle(tensor)
        self.handles.append(weakref.ref(handle))
        return handle

    @_uncompiled
    def _unpack(self, saved: Handle | tuple[Tensor, int] | Tensor) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        if isinstance(saved, tuple):
            tensor, version = saved
            if tensor._version != version:
                raise RuntimeError(f"a parameter of shape {tuple(tensor.shape)} that {self.name} used was modified "
                                   "between forward and backward: call backward before the parameters change")
            return tensor
        if saved.tensor is None:
            if torch._C._current_graph_task_id() == -1:  # no backward pass: somebody looks into the graph
                try:
                    _rebuild(self)
                    return saved.tensor
                finally:
                    _end_pass(-1)
            _rebuild(self)
        if saved.tensor._version != saved.version:
            raise RuntimeError(f"{self.name} modifies in place a tensor of shape {tuple(saved.shape)} that is needed "
                               "for its gradient: use an out-of-place operation there, as ordinary autograd also asks")
        return saved.tensor

    @_uncompiled
    def _collect(self, tensor: Tensor) -> None:
        if self._outside(tensor) or self.replay.is_running_statistic(tensor):
            return
        handle = self.handles[self.seen]() if self.seen < len(self.handles) else None
        self.seen += 1
        if handle is None:
            return
        if (tensor.shape, tensor.dtype) != (handle.shape, handle.dtype):
            raise self._diverged(f"{handle.dtype} of shape {tuple(handle.shape)} as saved tensor {self.seen}",
                                 f"{tensor.dtype} of shape {tuple(tensor.shape)}")
        handle.store(tensor)
        if self.keep_graph:
            _forget_later(handle)

    def _diverged(self, then: str, now: str) -> RuntimeError:
        return RuntimeError(f"{self.name} computed something else in the recomputation than in the forward pass "
                            f"({then} then, {now} now): its forward must depend on its input, parameters, buffers and "
                            "torch's random numbers alone; if it initialises itself from its first batch, give it one "
                            "before it is wrapped")


_local = threading.local()


class _NotingSources:
    """Gives the sources of the steps that are completed within this context, one after the other."""

    def __enter__(self) -> list[weakref.ref[Cell]]:
        self.enclosing, _local.sources = getattr(_local, "sources", None), []
        return _local.sources

    def __exit__(self, *_) -> None:
        _local.sources = self.enclosing


def dense(x: Tensor) -> Tensor:
    """x, or a copy of it in the same order of dimensions if it is a view with gaps or overlaps.

    What is rebuilt has neither, and a kernel may compute otherwise, or save other tensors, for other strides. A
    compiler chooses its own kernels, and cannot trace the question.
    """
    return x if torch.compiler.is_compiling() or torch.ops.aten.is_non_overlapping_and_dense(x) else x.clone()


_rebuilding = threading.RLock()
"""A recomputation sets generators, buffers and modes for a while, which all threads share."""


def _rebuild(step: Step) -> None:
    """Rebuild ``step``, and first, from the chain's stored end, whatever it needs. A loop: chains can be long."""
    if step.sources is None:
        raise RuntimeError(f"{step.name} differentiates within its own forward pass, of which a reversible block "
                           "stores nothing: wrap the block with disable=True")
    keep_graph = torch._C._autograd._get_current_graph_task_keep_graph()
    with _rebuilding:
        waiting = [(step, _await(step.sources, 1))]
        try:
            while waiting:
                link, sources = waiting[-1]
                missing = [cell.link for cell in sources if cell.tensor is None]
                if missing:
                    waiting.append((missing[0], _await(missing[0].sources, 1)))
                else:
                    link.rebuild(keep_graph)
                    _await(waiting.pop()[1], -1)
        finally:
            for _, sources in waiting:
                _await(sources, -1)


def _await(cells: Sequence[Cell], count: int) -> Sequence[Cell]:
    for cell in cells:
        cell.awaited += count
    return cells


_KEPT_LINKS = 8
"""A pass that keeps its graph cannot tell when autograd is done with activations, and holds those of so many links."""

_passes: dict[int, deque[list[tuple[weakref.ref, int]]]] = {}


def _open_link() -> None:
    """What is remembered from now on belongs to a further link of the running backward pass."""
    task = torch._C._current_graph_task_id()
    if task not in _passes:
        _passes[task] = deque()
        if task != -1:
            end = functools.partial(_end_pass, task)
            torch.autograd.Variable._execution_engine.queue_callback(end)
            weakref.finalize(end, _end_pass, task)  # a pass that ends in an error drops its callbacks uncalled
    _passes[task].append([])
    if len(_passes[task]) > _KEPT_LINKS:
        for holder in _remembered(_passes[task].popleft()):
            if isinstance(holder, Cell) and holder.awaited:
                _forget_later(holder)
            else:
                holder.tensor = None


def _forget_later(holder: Cell | Handle) -> None:
    _passes[torch._C._current_graph_task_id()][-1].append((weakref.ref(holder), id(holder.tensor)))


def _end_pass(task: int) -> None:
    for link in _passes.pop(task, ()):
        for holder in _remembered(link):
            holder.tensor = None


def _remembered(link: list[tuple[weakref.ref, int]]) -> Iterator[Cell | Handle]:
    """Those that still are, and have not been given another tensor since."""
    for reference, tensor_id in link:
        if (holder := reference()) is not None and id(holder.tensor) == tensor_id:
            yield holder


def _unused(_) -> Tensor:
    raise AssertionError("the graph of a recomputation is never differentiated")
