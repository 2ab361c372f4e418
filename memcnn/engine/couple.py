"""``split``, ``couple`` and ``merge``: the three functions that couplings are written with.

They are plain differentiable operations. Within ``recording()`` they forget their activations (see ``recompute``).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from memcnn.engine.arguments import Arguments, refuse_inference
from memcnn.engine.chain import Rearrangement, Value, dense, rebuilding, tag, tag_of, thread_state, value_of_whole
from memcnn.engine.checksum import fingerprint
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
        forward: called as ``forward(a, h)`` with h = ``branch(b)``; returns a tensor of the shape and dtype of a, or a
            tuple of such a tensor and further values; nothing is rebuilt from those.
        inverse: called as ``inverse(out, h)``, returns a.
        verify: raise a RuntimeError if the recomputation of ``branch(b)`` has other bits.
        kwargs: keyword arguments of ``branch``.
    """
    if thread_state.recording is None:
        return forward(a, _evaluated(branch, b, kwargs))
    return thread_state.recording.couple(a, branch, b, CouplingStep(forward, inverse, verify, kwargs))


class CouplingStep(NamedTuple):
    """What ``couple`` is given beside the halves and the branch."""

    join: Callable
    part: Callable
    verify: bool
    kwargs: Mapping[str, object]


def _evaluated(branch: nn.Module, b: Tensor, kwargs: Mapping[str, object]) -> Any:
    """Return ``branch(b, **kwargs)``. Raise a RuntimeError if it modifies b, which is a half of the input or output."""
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


def misfit(out: Tensor, a: Tensor, branch: nn.Module) -> ValueError:
    """Return the error for a changed half ``out`` that has not the shape or the dtype of a."""
    return ValueError(
        f"{type(branch).__name__} does not fit its coupling: the half that it changes is {a.dtype} of shape "
        f"{tuple(a.shape)} and would become {out.dtype} of shape {tuple(out.shape)}; let the branch keep both"
    )


def merge(y1: Tensor, y2: Tensor, dim: int, grid: Grid | None = None) -> Tensor:
    """Return the two halves side by side along ``dim``. They lie on ``grid`` if that is given."""
    y = torch.cat((y1, y2), dim)
    if thread_state.recording is not None:
        thread_state.recording.merge((y1, y2), y, dim % y.dim(), grid)
    return y


def keep_only(*tensors: Tensor) -> None:
    """Forget all other tensors: the later blocks of the running recording receive only these."""
    if thread_state.recording is not None:
        thread_state.recording.keep_only(tensors)


@contextmanager
def recording(**options: Any) -> Iterator[None]:
    """Within this context ``split``, ``couple`` and ``merge`` forget activations. Options as for ``Recomputation``."""
    previous, thread_state.recording = thread_state.recording, Recording(options)
    try:
        yield
    finally:
        thread_state.recording = previous


class Recording:
    """The values of the tensors within one block, or within several that pass on their halves."""

    def __init__(self, options: dict):
        self.options = options
        self.values: dict[int, tuple[Tensor, Value]] = {}  # the tensor is held, so that its id stays its own

    def value(self, x: Tensor) -> Value:
        if id(x) not in self.values:
            self.values[id(x)] = x, Value(x)
        return self.values[id(x)][1]

    def keep_only(self, tensors: Sequence[Tensor]) -> None:
        self.values = {id(x): (x, self.value(x)) for x in tensors}

    def split(self, x: Tensor, halves: Sequence[Tensor], dim: int) -> None:
        found = tag_of(x)
        if found.dim == dim:
            values = [reference() or Value(half) for reference, half in zip(found.values, halves, strict=True)]
        else:
            values = [Value(half) for half in halves]
            if (whole := value_of_whole(x)) is not None:
                Rearrangement([whole], values, lambda tensors: [torch.cat(tensors, dim)])
        self.values.update((id(half), (half, value)) for half, value in zip(halves, values, strict=True))

    def couple(self, a: Tensor, branch: nn.Module, b: Tensor, how: CouplingStep) -> Any:
        source, b = self.value(b), dense(b)
        with rebuilding:
            step = CoupledBranch(branch, a, self.value(a), b, how, self.options)
            result = step.evaluate(step.forward, a, b, how.kwargs)
        out = result[0] if isinstance(result, tuple) else result
        if out.shape != a.shape or out.dtype != a.dtype:
            raise misfit(out, a, branch)
        step.complete((self.value(out), source))
        return result

    def merge(self, halves: Sequence[Tensor], y: Tensor, dim: int, grid: Grid | None) -> None:
        values = [self.value(half) for half in halves]
        for value, view in zip(values, y.detach().chunk(2, dim), strict=True):
            if value.tensor is not None:
                value.store(view)
        tag(y, values, dim, grid)


class CoupledBranch(Recomputation):
    """The step out = join(a, module(b)), undone by a = part(out, module(b)). Its sources are out and b."""

    def __init__(self, module: nn.Module, a: Tensor, target: Value, b: Tensor, how: CouplingStep, options: dict):
        super().__init__(module, (a, b), (target,), **options)
        self.join, self.part, self.verify, kwargs = how
        self.arguments = Arguments(self.name, (), kwargs) if kwargs else None
        self.fingerprint: Tensor | None = None

    def forward(self, a: Tensor, b: Tensor, kwargs: Mapping[str, object]) -> Tensor | tuple[Tensor, ...]:
        h = self.module(b, **kwargs)
        if self.verify:
            self.fingerprint = fingerprint(h)
        return self.join(a, h)

    def recompute(self, second: SecondEvaluation) -> Sequence[Tensor | None]:
        kwargs = self.arguments.read()[1] if self.arguments is not None else NO_KEYWORDS
        out, source = self.sources
        b = self.as_recorded(1, source.read())
        if not second.keep_graph:
            source.store(b)  # b may be a copy: the view that it replaces would keep a whole output alive
        target = self.targets[0]()
        a = target.read() if target is not None and target.tensor is not None else None
        with self.replay.again():
            h = second.run((b,), self.module, b, **kwargs)
            if self.fingerprint is not None and not torch.equal(self.fingerprint, fingerprint(h)):
                raise RuntimeError(
                    f"{self.name} does not reproduce itself bit for bit, so that an exact coupling is "
                    "not exact here: use deterministic kernels (torch.use_deterministic_algorithms) and "
                    "the same number of threads in forward and backward, or exact=False"
                )
            # a is needed as the target, for the tensors that the join saves, or to compare it (check_inverse)
            if a is None and (target is not None or not second.is_complete or self.expected):
                a = self._undone(out.read(), h)
            if not second.is_complete:  # the join saves tensors too
                leaf = self.as_recorded(0, a)
                second.run((leaf, b), self.join, leaf, h)
        return (a,)

    def _undone(self, out: Tensor, h: Tensor) -> Tensor:
        if not torch.is_grad_enabled():  # as in most backward passes, where the context would take as long as the sum
            return self.part(out, h)
        with torch.no_grad():
            return self.part(out, h)
