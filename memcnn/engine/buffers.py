"""Note which buffers a module modifies, and which values a second evaluation must find in them."""

import inspect
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from memcnn.engine.again import exchange
from memcnn.engine.attributes import layer_of
from memcnn.engine.checksum import checksum
from memcnn.engine.hooks import Hooks, unwrapped
from memcnn.engine.identity import identity, refuse_unless_lazy
from memcnn.engine.torch_private import BATCH_NORM_FORWARD, NORM_FORWARDS, NormBase

_STATISTICS = {"running_mean", "running_var", "num_batches_tracked"}

_READING = _STATISTICS | {"_buffers", "buffers", "eval", "get_buffer", "named_buffers", "state_dict", "train"}
"""Names that occur in code that may read the running statistics of a norm, or switch its mode."""

_readers: "weakref.WeakKeyDictionary[type | FunctionType, bool]" = weakref.WeakKeyDictionary()
"""The results of ``reads_statistics`` by class, and of ``hook_reads_statistics`` by function."""

KEPT_BUFFER = 2**20
"""Largest size, in bytes, of an unmodified GPU buffer that is restored from a copy.

Comparing values instead would wait for the GPU."""


class Buffer(NamedTuple):
    """A buffer as it was before an evaluation.

    Attributes:
        registry: the dictionary that has the buffer under ``name``.
        name: its name.
        tensor: the buffer.
        before: a copy of its value. None means that a further evaluation begins with the present value.
        identity: its version and storage.
        checksum: a checksum of its value, to notice changes without a new version. None if there is none.
        kind: "buffer", or "attribute" for a tensor that is a plain attribute.
        is_only_written: the module's output does not depend on its value, so that a further evaluation may write to
            other memory instead.
    """

    registry: dict
    name: str
    tensor: Tensor
    before: Tensor | None
    identity: tuple[int, int]
    checksum: int | None
    kind: str = "buffer"
    is_only_written: bool = False


class ReplayedBuffers:
    """The part of ``Replay`` for buffers.

    ``Replay`` sets the attributes in its constructor. A constructor here would add a call to every evaluation.
    """

    modes: list[tuple[nn.Module, bool]]
    buffers: list[tuple[dict, str, Tensor]]
    """Registry, name and tensor of each buffer."""
    restored: list[Buffer]
    """Buffers that an evaluation may modify."""
    unchanged: list[tuple[str, str, Tensor, tuple[int, int]]]
    """Kind, name, tensor and identity of each tensor that must not be modified between the evaluations."""
    checksums: list[tuple[str, str, Tensor, int]]
    """Kind, name, tensor and checksum of those in ``unchanged`` that have a checksum."""
    running_statistics: dict[int, nn.Module]
    """The plain BatchNorms in training mode, by the ids of their running means and variances."""
    untracked: dict[nn.Module, None]
    """BatchNorms that a further evaluation runs without their running statistics. The values have no meaning.

    Their output does not change without running statistics, and no statistic has to be copied and restored. Autograd
    has saved the running statistics of each of them in the first evaluation, so they were not compiled: compiled code
    saves other tensors, and would have to be compiled a second time.
    """
    reads_statistics: bool
    """True if a user's module or hook may read running statistics. They are then restored like other buffers."""
    hooks: Hooks | None
    """The user's hooks; None if there are none."""
    silent: set[int]
    """Ids of the registries of norms in training mode. Their buffers change without a new version."""

    def survey_buffers(self, module: nn.Module) -> None:
        """Note the buffers of a module before the first evaluation."""
        registry, training = module._buffers, module.training
        is_norm = isinstance(module, NormBase)
        forward = layer_of(type(module)).forward if is_norm and "forward" not in vars(module) else None
        is_plain = forward is BATCH_NORM_FORWARD and module.track_running_stats and registry.keys() == _STATISTICS
        # without a float32 weight, autocast would save other dtypes than with running statistics
        is_plain = is_plain and module.affine and not self.reads_statistics
        if is_plain and training:
            self.running_statistics[id(registry["running_mean"])] = module
            self.running_statistics[id(registry["running_var"])] = module
        if is_norm and training:
            self.silent.add(id(registry))
        ignored = training and forward in NORM_FORWARDS and not self.reads_statistics
        for name, buffer in registry.items():
            if buffer is not None:
                self.buffers.append((registry, name, buffer))
                try:
                    found = buffer._version, buffer.untyped_storage()._cdata
                except (RuntimeError, ValueError):
                    refuse_unless_lazy(buffer, f"the buffer {name!r} of {type(module).__name__}")
                    continue
                if ignored:
                    self.restored.append(Buffer(registry, name, buffer, None, found, None, is_only_written=True))
                else:
                    self.restored.append(Buffer(registry, name, buffer, buffer.clone(), found, checksum(buffer)))

    def survey_statistics_again(self) -> None:
        """Note running statistics like other buffers, because a hook or a later module may read them."""
        self.reads_statistics = True
        again = {id(b.registry) for b in self.restored if b.is_only_written}
        if not again:
            return
        self.restored = [b for b in self.restored if id(b.registry) not in again]
        self.buffers = [b for b in self.buffers if id(b[0]) not in again]
        self.running_statistics.clear()
        for module, _ in self.modes:
            if id(module._buffers) in again:
                self.survey_buffers(module)

    def survey_tensor(self, own: dict, name: str, tensor: Tensor) -> None:
        """Note a plain attribute that is a tensor without a graph, before the first evaluation. ``own`` holds it."""
        before = tensor.detach().clone()
        self.buffers.append((own, name, tensor))
        self.restored.append(Buffer(own, name, tensor, before, identity(tensor), checksum(tensor), "attribute"))

    def note_buffers(self, self_initialised: set[int]) -> None:
        """Note what the first evaluation changed in buffers.

        Args:
            self_initialised: ids of the ``_parameters`` of modules that set their own parameters in that evaluation.
        """
        initialised = set()
        if self_initialised:
            initialised = {id(m._buffers) for m, _ in self.modes if id(m._parameters) in self_initialised}
        # PyTorch updates running statistics without a new version. If a branch updates them itself, restore them.
        changed = {
            id(b.registry)
            for b in self.restored
            if id(b.tensor) in self.running_statistics
            and (b.tensor._version, b.tensor.untyped_storage()._cdata) != b.identity
        }
        self.untracked = {m: None for m in self.untracked if id(m._buffers) not in changed}
        untracked = {id(m._buffers) for m in self.untracked}
        restored, self.restored = self.restored, []
        for buffer in restored:
            if id(buffer.registry) not in untracked:
                self._note_buffer(buffer, id(buffer.registry) in initialised)
        if initialised:
            self.buffers = [
                (registry, name, now if id(registry) in initialised and now is not None else b)
                for registry, name, b in self.buffers
                for now in (registry.get(name),)
            ]

    def _note_buffer(self, buffer: Buffer, initialised: bool) -> None:
        """Note whether the first evaluation modified a buffer. If it may have, keep the value that it began with."""
        registry, name, b, before, found, bits, kind, is_only_written = buffer
        if initialised and (now := registry.get(name)) is not None:
            # the layer may note here that it is initialised: a further evaluation begins with that
            b, before, found, bits = now, None if before is None else now.detach().clone(), identity(now), checksum(now)
        if before is not None and identity(b) == found and id(registry) not in self.silent and checksum(b) == bits:
            self.unchanged.append((kind, name, b, found))
            if bits is not None:
                self.checksums.append((kind, name, b, bits))
            if (
                b.is_cpu
                or b.nbytes > KEPT_BUFFER
                or any(m._buffers is registry and layer_of(type(m)).forward in NORM_FORWARDS for m, _ in self.modes)
            ):
                before = None
        self.restored.append(Buffer(registry, name, b, before, found, bits, kind, is_only_written))

    def exchange_statistics(self, undo: list[tuple]) -> set[int]:
        """Register uninitialised memory in place of running statistics that a further evaluation only writes.

        This saves two copies of each. Statistics that share memory with another buffer or attribute stay registered,
        because other code may read them; with hooks, all stay. Return the ids of the statistics that were replaced.
        ``undo`` receives the calls that put them back.
        """
        if self.hooks is not None or not any(buffer.is_only_written for buffer in self.restored):
            return set()
        names = Counter(b.untyped_storage()._cdata for _, _, b in self.buffers)
        exchanged = {}
        for buffer in self.restored:
            b, registry = buffer.tensor, buffer.registry
            if not buffer.is_only_written or type(b) is not Tensor or registry.get(buffer.name) is not b:
                continue
            if names[b.untyped_storage()._cdata] == 1:
                exchanged[id(b)] = memory = torch.empty_like(b)
                exchange(registry, buffer.name, memory, undo)
                if (module := self.running_statistics.get(id(b))) is not None:
                    self.running_statistics[id(memory)] = module
                    undo.append((self.running_statistics.pop, id(memory)))
        return {*exchanged}


def reads_statistics(kind: type[nn.Module]) -> bool:
    """Return whether the forward function of a user's class may read the running statistics of a norm, or set its mode.

    We look for the names of ``_READING`` in its code, and in that of the methods and functions that it calls by name.
    """
    if (known := _readers.get(kind)) is None:
        known = _readers[kind] = _may_read(kind, kind.forward)
    return known


def hook_reads_statistics(hook: Callable) -> bool:
    """Return the same for a user's forward hook: a function, a method or an object that can be called."""
    hook = unwrapped(hook)
    owner = type(getattr(hook, "__self__", hook))
    function = getattr(hook, "__func__", hook if isinstance(hook, FunctionType) else type(hook).__call__)
    if not isinstance(function, FunctionType):
        return False
    if (known := _readers.get(function)) is None:
        known = _readers[function] = _may_read(owner, function)
    return known


def _may_read(kind: type, function: object) -> bool:
    return any(not _READING.isdisjoint(names) for names in _names_in(kind, function, set()))


def _names_in(kind: type, function: object, seen: set[object]) -> Iterator[set[str]]:
    """Yield the names in the code of a function, and in that of what it calls. ``seen`` has functions to leave out."""
    function = function.fget if isinstance(function, property) else function
    function = inspect.unwrap(function) if callable(function) else function
    if not isinstance(function, FunctionType) or function in seen or function.__module__.startswith("torch."):
        return
    seen.add(function)
    names = set(_words(function.__code__))
    yield names
    for name in names:
        yield from _names_in(kind, getattr(kind, name, None), seen)
        yield from _names_in(kind, function.__globals__.get(name), seen)


def _words(code: CodeType) -> Iterator[str]:
    """Yield the names and the strings in a function's code, and in functions within it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _words(constant)
        elif isinstance(constant, str):
            yield constant
