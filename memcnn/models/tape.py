"""The steps that reversible blocks are written with, and how they are recorded.

``split``, ``lift`` and ``merge`` are plain differentiable operations. Within ``recording()`` they forget their
activations (see ``memcnn.models.engine``). ``call`` records a module of which nothing is known but ``forward`` and
``inverse``.
"""

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from memcnn.models.engine import Cell, Rearrange, Step, dense
from memcnn.models.exact import Grid
from memcnn.models.replay import identity
from memcnn.rounding import relative_error

_TAG = "memcnn.cells"
_STREAM = object()
_local = threading.local()


def split(x: Tensor, dim: int, grid: Grid | None = None) -> tuple[Tensor, Tensor]:
    """The two halves of x, or of x snapped to ``grid``, along ``dim``, as views; an odd size there is a ValueError."""
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"cannot split an input of shape {tuple(x.shape)} along dimension {dim}: it has "
                         f"{x.dim()} dimensions; choose another split_dim")
    if x.shape[dim] % 2:
        raise ValueError(f"cannot split an input of shape {tuple(x.shape)} in two along dimension {dim}: its size "
                         f"there, {x.shape[dim]}, is odd; give it an even size or choose another split_dim")
    tape = _tape()
    if grid is not None and (tape is None or _tagged(x).grid != grid):
        x = grid.snap(x)
    x1, x2 = x.chunk(2, dim)
    if tape is not None:
        tape.split(x, (x1, x2), dim % x.dim())
    return x1, x2


def lift(a: Tensor, branch: nn.Module, b: Tensor, join: Callable, part: Callable, *,
         verify: bool = False) -> Tensor | tuple[Tensor, ...]:
    """out = join(a, branch(b)) of the shape of a, where ``part(out, h)`` gives back a if h = branch(b).

    join may return a tuple of out and of further values of which nothing is rebuilt; so does lift then. With ``verify``
    it is a RuntimeError if the recomputation of branch(b) has other bits.
    """
    tape = _tape()
    return join(a, branch(dense(b))) if tape is None else tape.lift(a, branch, b, join, part, verify)


def merge(y1: Tensor, y2: Tensor, dim: int, grid: Grid | None = None) -> Tensor:
    """The two halves, which are on ``grid`` if that is given, side by side along ``dim``."""
    y = torch.cat((y1, y2), dim)
    if (tape := _tape()) is not None:
        tape.merge((y1, y2), y, dim % y.dim(), grid)
    return y


def only(*tensors: Tensor) -> None:
    """Within a recording of several blocks: these are all that the blocks to come are given."""
    if (tape := _tape()) is not None:
        tape.cells = {id(x): (x, tape.cell(x)) for x in tensors}


@contextmanager
def recording(**options) -> Iterator[None]:
    """Within this context ``split``, ``lift`` and ``merge`` forget activations. The options are those of ``Step``."""
    with _use(Tape(options)):
        yield


def call(run: Callable, undo: Callable, module: nn.Module, inputs: Sequence, kwargs: dict, *, log_det: bool = False,
         keep_input: bool = False, **options):
    """run(*inputs, **kwargs) recorded as one step, where undo(*outputs, **kwargs) gives back the inputs.

    Streams, that is floating-point and complex tensors among the positional inputs, are rebuilt; other arguments are
    kept. Where ``run`` returns fewer values than it takes, the inputs that are no streams are handed to ``undo`` after
    them. With ``log_det``, run returns (outputs, log_det), of which undo takes the outputs. For other options see
    ``Step``.
    """
    # a kept input has a cell of its own, which no nested block forgets
    cells = [Cell(x) if keep_input else _whole(x) or Cell(x) for x in inputs if is_stream(x)]
    inputs = [dense(x) if is_stream(x) else x for x in inputs]
    step = Call(run, undo, module, inputs, kwargs, cells, log_det,
                options | {"keep_input": keep_input})
    with _use(None), step.record():
        result = run(*inputs, **kwargs)
    step.finish(result)
    return result


@contextmanager
def storing() -> Iterator[None]:
    """Within this context blocks store their activations, as under ordinary autograd."""
    previous, _local.storing = is_storing(), True
    try:
        yield
    finally:
        _local.storing = previous


def is_storing() -> bool:
    return getattr(_local, "storing", False)


def is_stream(x: object) -> bool:
    return isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())


class Tape:
    """The cells of the tensors inside of one block."""

    def __init__(self, options: dict):
        self.options = options
        self.cells: dict[int, tuple[Tensor, Cell]] = {}  # the tensor, so that its id stays its own

    def cell(self, x: Tensor) -> Cell:
        if id(x) not in self.cells:
            self.cells[id(x)] = x, Cell(x)
        return self.cells[id(x)][1]

    def split(self, x: Tensor, halves: Sequence[Tensor], dim: int) -> None:
        tag = _tagged(x)
        if tag.dim == dim:
            cells = [reference() or Cell(half) for reference, half in zip(tag.cells, halves, strict=True)]
        else:
            cells = [Cell(half) for half in halves]
            if (whole := _whole(x)) is not None:
                Rearrange([whole], cells, lambda values: [torch.cat(values, dim)])
        self.cells.update((id(half), (half, cell)) for half, cell in zip(halves, cells, strict=True))

    def lift(self, a: Tensor, branch: nn.Module, b: Tensor, join: Callable, part: Callable, verify: bool):
        source, b = self.cell(b), dense(b)
        step = Lift(branch, a, self.cell(a), b, join, part, self.options)
        with _use(None), step.record():
            h = branch(b)
            result = join(a, h)
        step.fingerprint = _fingerprint(h) if verify else None
        out = result[0] if isinstance(result, tuple) else result
        if out.shape != a.shape or out.dtype != a.dtype:
            raise ValueError(f"{step.name} does not fit its coupling: the half that it changes is {a.dtype} of shape "
                             f"{tuple(a.shape)} and would become {out.dtype} of shape {tuple(out.shape)}")
        step.complete((self.cell(out), source))
        return result

    def merge(self, halves: Sequence[Tensor], y: Tensor, dim: int, grid: Grid | None) -> None:
        cells = [self.cell(half) for half in halves]
        for cell, view in zip(cells, y.detach().chunk(2, dim), strict=True):
            if cell.tensor is not None:
                cell.store(view)
        _tag(y, cells, dim, grid)


class Lift(Step):
    """out = join(a, module(b)), undone by a = part(out, module(b)); the sources are out and b."""

    def __init__(self, module, a, a_cell, b, join, part, options):
        super().__init__(module, (a, b), (a_cell,), **options)
        self.join, self.part = join, part

    def recompute(self) -> Sequence[Tensor | None]:
        out, source = self.sources
        b = self.as_recorded(1, source.value())
        if not self.keep_graph:
            source.store(b)  # where b is a dense copy, the view that it replaces would keep a whole output alive
        target = self.targets[0]()
        a = target.value() if target is not None and target.tensor is not None else None
        self.inputs = (b,)
        with self.replay.again():
            with self.collect():
                h = self.module(b)
            if self.fingerprint is not None and not torch.equal(self.fingerprint, _fingerprint(h)):
                raise RuntimeError(f"{self.name} does not reproduce itself bit for bit, so that an exact coupling is "
                                   "not exact here: use deterministic kernels (torch.use_deterministic_algorithms) and "
                                   "the same number of threads in forward and backward, or exact=False")
            unjoined = self.wanted and self.seen < len(self.handles)
            if a is None and (target is not None or unjoined or self.expected):
                with torch.no_grad():
                    a = self.part(out.value(), h)
            if unjoined:
                leaf = self.as_recorded(0, a)
                self.inputs = (leaf, b)
                with self.collect():
                    self.join(leaf, h)
        return (a,)


class Call(Step):
    """result = run(*inputs, **kwargs), undone by inputs = undo(*result, **kwargs)."""

    def __init__(self, run, undo, module, inputs, kwargs, cells, log_det, options):
        self.run, self.undo, self.kwargs, self.log_det = run, undo, kwargs, log_det
        self.positions = [i for i, x in enumerate(inputs) if is_stream(x)]
        self.arguments = [None if i in self.positions else x for i, x in enumerate(inputs)]
        self.versions = [(t, t._version) for t in (*self.arguments, *kwargs.values()) if isinstance(t, Tensor)]
        streams = [inputs[i] for i in self.positions]
        self.kinds = [(x.dtype, tuple(x.shape)) for x in streams]
        super().__init__(module, streams, cells, **options)

    def finish(self, result: object) -> None:
        outputs = self._outputs(result)
        streams = [y for y in outputs if is_stream(y)]
        if not streams:
            raise TypeError(f"{self.name} must return a floating-point tensor, or a tuple with some, from which its "
                            f"inverse gives back the input: got {type(result).__name__}")
        # the graph refers to this step, which must not refer to the graph
        self.results = [_STREAM if is_stream(y) else tree_map_only(Tensor, Tensor.detach, y) for y in outputs]
        cells = [Cell(y) for y in streams]
        for y, cell in zip(streams, cells, strict=True):
            _rebuild_from(cell, y)
            _tag(y, [cell], None)
        self.complete(cells)

    def recompute(self) -> Sequence[Tensor]:
        for tensor, version in self.versions:
            if tensor._version != version:
                raise RuntimeError(f"an argument of {self.name}, shape {tuple(tensor.shape)}, was modified in place "
                                   "between forward and backward, which uses it again: use an out-of-place operation")
        values = [cell.value() for cell in self.kept] or self._undone()
        draws = bool(self.replay.generators) and not self.kept
        if self.wanted or draws:
            leaves = self.inputs = [self.as_recorded(i, value) for i, value in enumerate(values)]
            arguments = list(self.arguments)
            for position, leaf in zip(self.positions, leaves, strict=True):
                arguments[position] = leaf
            with self.replay.again(), self.collect():
                result = self.run(*arguments, **self.kwargs)
            if draws:
                self._check_draws([y for y in self._outputs(result) if is_stream(y)])
        return values

    def _outputs(self, result: object) -> list:
        return _as_list(result[0] if self.log_det else result)

    def _check_draws(self, streams: Sequence[Tensor]) -> None:
        """The inverse was given the random numbers of the forward pass, but may use them in another order."""
        for got, cell in zip(streams, self.sources, strict=True):
            if relative_error(got, wanted := cell.value()) > torch.finfo(wanted.dtype).eps ** 0.5:  # NaN is loud anyway
                raise RuntimeError(f"{self.name} draws random numbers (dropout), and its inverse does not undo what it "
                                   "computed with them: let both draw them in the same order, use keep_input=True, or "
                                   "build the block from a coupling, such as AdditiveCoupling, whose branches may draw")

    def _undone(self) -> Sequence[Tensor]:
        streams = iter(self.sources)
        outputs = [next(streams).value() if y is _STREAM else y for y in self.results]
        if len(outputs) < len(self.arguments):
            outputs += [x for i, x in enumerate(self.arguments) if i not in self.positions]
        with self.replay.again(), torch.no_grad():
            inputs = _as_list(self.undo(*outputs, **self.kwargs))
        if len(inputs) == len(self.arguments):
            inputs = [inputs[i] for i in self.positions]
        kinds = [(x.dtype, tuple(x.shape)) if isinstance(x, Tensor) else type(x).__name__ for x in inputs]
        if kinds != self.kinds:
            raise RuntimeError(f"{self.name} does not invert itself: it was given {self.kinds} and its inverse "
                               f"returned {kinds}")
        return inputs


def _as_list(values: object) -> list:
    return list(values) if isinstance(values, (tuple, list)) else [values]


class Tag(NamedTuple):
    """What a block leaves with its output, for the block that is given it.

    The cells are held weakly, since the graph outlives what is rebuilt; the steps that need a cell hold it.
    """

    cells: Sequence["weakref.ref[Cell]"]
    dim: int | None  # of the tensor itself where it is None, else of its halves along this dimension
    grid: Grid | None
    identity: tuple[int, int] | None


def _tag(y: Tensor, cells: Sequence[Cell], dim: int | None, grid: Grid | None = None) -> None:
    if y.grad_fn is not None:
        y.grad_fn.metadata[_TAG, y.output_nr] = Tag([weakref.ref(cell) for cell in cells], dim, grid, identity(y))


def _tagged(x: Tensor) -> Tag:
    tag = x.grad_fn.metadata.get((_TAG, x.output_nr)) if x.grad_fn is not None else None
    return tag if tag is not None and tag.identity == identity(x) else Tag((), -1, None, None)


def _fingerprint(h: Tensor) -> Tensor:
    """The sum of the bits of h, taken as integers."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return h.detach().view(integers[h.element_size()]).sum(dtype=torch.int64)


def _whole(x: Tensor) -> Cell | None:
    """The cell of the whole of x if x is a block's output that somebody upstream needs, else None."""
    tag = _tagged(x)
    cells = [reference() for reference in tag.cells]
    if not any(cells):
        return None
    if tag.dim is None:
        return cells[0]
    whole = Cell(x)
    halves = x.detach().chunk(2, tag.dim)
    Rearrange([cell or Cell(half) for cell, half in zip(cells, halves, strict=True)], [whole],
              lambda values: values[0].chunk(2, tag.dim))
    return whole


def _rebuild_from(cell: Cell, y: Tensor) -> None:
    """Let the cells that a nested block has left with y, the value of ``cell``, be rebuilt from that."""
    tag = _tagged(y)
    if tag.cells:
        halves = [y] if tag.dim is None else y.detach().chunk(2, tag.dim)
        Rearrange([reference() or Cell(half) for reference, half in zip(tag.cells, halves, strict=True)], [cell],
                  lambda values: values if tag.dim is None else values[0].chunk(2, tag.dim))


def _tape() -> Tape | None:
    return getattr(_local, "tape", None)


@contextmanager
def _use(tape: Tape | None) -> Iterator[None]:
    previous, _local.tape = _tape(), tape
    try:
        yield
    finally:
        _local.tape = previous
