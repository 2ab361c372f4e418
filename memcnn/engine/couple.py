"""``split``, ``couple`` and ``merge``: the three functions that couplings are written with.

They are plain differentiable operations. Within ``recording()``, ``couple`` saves no activations (see recompute.py),
and ``split`` and ``merge`` record the halves of each tensor.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from memcnn.engine.arguments import Arguments, refuse_inference
from memcnn.engine.chain import Rearrangement, Value, dense, evaluation_lock, tag, tag_of, thread_state, value_of_whole
from memcnn.engine.checksum import differ, fingerprint
from memcnn.engine.exact import Grid
from memcnn.engine.recompute import Recomputation
from memcnn.engine.second import SecondEvaluation

NO_KEYWORDS: Mapping[str, object] = MappingProxyType({})


def split(x: Tensor, dim: int, grid: Grid | None = None) -> tuple[Tensor, Tensor]:
    """Return the two halves of x, or of x rounded to ``grid``, along ``dim``, as views.

    Raises:
        ValueError: the size along ``dim`` is odd, or x has no such dimension.
    """
    if not -x.dim() <= dim < x.dim():
        raise ValueError(
            f"cannot split an input of shape {tuple(x.shape)} along dimension {dim}: it has "
            f"{x.dim()} dimensions; choose another split_dim"
        )
    if x.shape[dim] % 2:
        raise ValueError(
            f"cannot split an input of shape {tuple(x.shape)} in two along dimension {dim}: its size "
            f"there, {x.shape[dim]}, is odd; give it an even size or choose another split_dim"
        )
    recording = thread_state.recording
    if recording is not None and x.is_inference():
        refuse_inference(x, "an input of a reversible block")
    if grid is not None and (recording is None or tag_of(x).grid != grid):
        x = grid.snap(x)
    x1, x2 = x.chunk(2, dim)
    if recording is not None:
        recording.split(x, (x1, x2), dim % x.dim())
    return x1, x2


def couple(
    a: Tensor,
    branch: nn.Module,
    b: Tensor,
    *,
    forward: Callable,
    inverse: Callable,
    verify: bool = False,
    kwargs: Mapping[str, object] = NO_KEYWORDS,
) -> Any:
    """Return ``forward(a, branch(b, **kwargs))``, where ``inverse(forward(a, h), h)`` is a.

    Args:
        a: the half that is changed.
        branch: the module that computes the change.
        b: the other half, the input of ``branch``.
        forward: called as ``forward(a, h)`` with h = ``branch(b)``. Returns out, a tensor of the shape and dtype of a,
            or a tuple whose first item is out. Backward rebuilds a from out alone.
        inverse: called as ``inverse(out, h)``. Returns a.
        verify: compare a checksum of the bits of ``branch(b)`` in the forward pass and in the recomputation. If they
            differ, raise a RuntimeError.
        kwargs: keyword arguments of ``branch``.
    """
    if thread_state.recording is None:
        return forward(a, _evaluated(branch, b, kwargs))
    return thread_state.recording.couple(a, branch, b, Change(forward, inverse, verify, kwargs))


class Change(NamedTuple):
    """The change of a half: the arguments of ``couple`` other than the halves and the branch."""

    forward: Callable
    inverse: Callable
    verify: bool
    kwargs: Mapping[str, object]


def _evaluated(branch: nn.Module, b: Tensor, kwargs: Mapping[str, object]) -> Any:
    """Return ``branch(b, **kwargs)``, where b is a half of the block's input or output.

    Raise a RuntimeError if the branch modifies b. That cannot happen if it is given a copy. The compiler cannot trace
    the check, and a tensor of ``torch.inference_mode()`` has no version to compare.
    """
    given = dense(b)
    if given is not b or torch.compiler.is_compiling() or b.is_inference():
        return branch(given, **kwargs)
    version = b._version
    h = branch(b, **kwargs)
    if b._version != version:
        raise RuntimeError(
            f"{type(branch).__name__} modifies its input in place, so that the block cannot be inverted "
            "and a tensor of the caller may have changed: make its first operation an out-of-place one"
        )
    return h


def misfit_error(out: Tensor, a: Tensor, branch: nn.Module) -> ValueError:
    """Return the error for a changed half ``out`` whose shape or dtype is not that of a."""
    return ValueError(
        f"{type(branch).__name__} does not fit its coupling: the half that it changes is {a.dtype} of shape "
        f"{tuple(a.shape)} and would become {out.dtype} of shape {tuple(out.shape)}; let the branch return the shape "
        "and dtype of that half"
    )


def merge(y1: Tensor, y2: Tensor, dim: int, grid: Grid | None = None) -> Tensor:
    """Return the two halves, concatenated along ``dim``.

    If ``grid`` is given, the caller has rounded both halves to it.
    """
    y = torch.cat((y1, y2), dim)
    if thread_state.recording is not None:
        thread_state.recording.merge((y1, y2), y, dim % y.dim(), grid)
    return y


def keep_only(*tensors: Tensor) -> None:
    """Stop tracking every other tensor: later blocks of the running recording receive only ``tensors``."""
    if thread_state.recording is not None:
        thread_state.recording.keep_only(tensors)


@contextmanager
def recording(**options: Any) -> Iterator[None]:
    """Within this context ``couple`` saves no activations.

    Args:
        **options: the keyword arguments of ``Recomputation``.
    """
    previous, thread_state.recording = thread_state.recording, Recording(options)
    try:
        yield
    finally:
        thread_state.recording = previous


class Recording:
    """Maps each tensor of one block, or of consecutive blocks that share halves, to its ``Value``."""

    def __init__(self, options: dict):
        self.options = options
        self.values: dict[int, tuple[Tensor, Value]] = {}  # the tensor is held, so that its id stays its own

    def value(self, x: Tensor) -> Value:
        """Return the value of x, a new one if x has none."""
        if id(x) not in self.values:
            self.values[id(x)] = x, Value(x)
        return self.values[id(x)][1]

    def keep_only(self, tensors: Sequence[Tensor]) -> None:
        self.values = {id(x): (x, self.value(x)) for x in tensors}

    def split(self, x: Tensor, halves: Sequence[Tensor], dim: int) -> None:
        """Note that x was split into ``halves``. If x is the output of a block, relate them to that block's values."""
        attached = tag_of(x)
        if attached.dim == dim:  # the block before has merged the same halves: continue with their values
            values = [reference() or Value(half) for reference, half in zip(attached.values, halves, strict=True)]
        else:  # the values of x as a whole, if it has any, are rebuilt from these halves
            values = [Value(half) for half in halves]
            if (whole := value_of_whole(x)) is not None:
                Rearrangement([whole], values, lambda tensors: [torch.cat(tensors, dim)])
        self.values.update((id(half), (half, value)) for half, value in zip(halves, values, strict=True))

    def couple(self, a: Tensor, branch: nn.Module, b: Tensor, change: Change) -> Any:
        """Return ``forward(a, branch(b))``, recorded as one step that rebuilds a."""
        source, b = self.value(b), dense(b)
        with evaluation_lock:
            step = CoupledBranch(branch, a, self.value(a), b, change, self.options)
            result = step.evaluate(step.first_evaluation, a, b, change.kwargs)
        out = result[0] if isinstance(result, tuple) else result
        if out.shape != a.shape or out.dtype != a.dtype:
            raise misfit_error(out, a, branch)
        step.complete((self.value(out), source))
        return result

    def merge(self, halves: Sequence[Tensor], y: Tensor, dim: int, grid: Grid | None) -> None:
        """Attach the values of ``halves`` to y. Those that store a tensor now share the memory of y."""
        values = [self.value(half) for half in halves]
        for value, view in zip(values, y.detach().chunk(2, dim), strict=True):
            if value.tensor is not None:
                value.store(view)
        tag(y, values, dim, grid)


class CoupledBranch(Recomputation):
    """The step out = forward(a, module(b)), undone by a = inverse(out, module(b)). Its sources are out and b.

    ``forward`` and ``inverse`` are those of ``couple``.
    """

    def __init__(self, module: nn.Module, a: Tensor, target: Value, b: Tensor, change: Change, options: dict):
        super().__init__(module, (a, b), (target,), **options)
        self.forward, self.inverse, self.verify, kwargs = change
        self.arguments = Arguments(self.name, (), kwargs) if kwargs else None
        self.fingerprint: Tensor | None = None

    def first_evaluation(self, a: Tensor, b: Tensor, kwargs: Mapping[str, object]) -> Tensor | tuple[Tensor, ...]:
        """Return ``forward(a, module(b))``. If ``verify``, note the checksum of the branch's output."""
        h = self.module(b, **kwargs)
        if self.verify:
            self.fingerprint = fingerprint(h)
        return self.forward(a, h)

    def recompute(self, second: SecondEvaluation) -> Sequence[Tensor | None]:
        """Evaluate the branch again, and return a. Return None for a if nothing needs it."""
        kwargs = self.arguments.read()[1] if self.arguments is not None else NO_KEYWORDS
        out, source = self.sources
        b = self.as_recorded(1, source.read())
        if not second.keep_graph:
            # b may be a copy. The tensor that it replaces may be a view, which keeps a whole output alive.
            source.store(b)
        target = self.targets[0]()
        a = target.read() if target is not None and target.tensor is not None else None
        with self.replay.again():
            h = second.run((b,), self.module, b, **kwargs)
            if self.fingerprint is not None and differ(self.fingerprint, fingerprint(h)):
                raise RuntimeError(
                    f"{self.name} does not reproduce itself bit for bit, so that an exact coupling is "
                    "not exact here: use deterministic kernels (torch.use_deterministic_algorithms) and "
                    "the same number of threads in forward and backward, or exact=False"
                )
            # If a is not stored, rebuild it for any of three readers: another link (through its value), ``forward``
            # (it must run again if it saved tensors that are still empty), or check_inverse.
            if a is None and (target is not None or not second.is_complete or self.expected):
                a = self._undone(out.read(), h)
            if not second.is_complete:
                leaf = self.as_recorded(0, a)
                second.run((leaf, b), self.forward, leaf, h)
        return (a,)

    def _undone(self, out: Tensor, h: Tensor) -> Tensor:
        """Return ``inverse(out, h)``, without a graph."""
        # ``no_grad()`` costs as much as the addition, and most backward passes have gradients disabled already
        if not torch.is_grad_enabled():
            return self.inverse(out, h)
        with torch.no_grad():
            return self.inverse(out, h)
