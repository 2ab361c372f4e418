"""What a module's second evaluation must see as the first did: random numbers, autocast, modes, buffers, attributes.

And what it must not do again: call somebody's hooks, move a generator, update a buffer, count its calls.

A replay is made for every evaluation of every branch, so that its loops are written out: where kernels are small, calls
of Python functions decide how long a step takes.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from operator import is_
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from memcnn.engine.attributes import (
    Attributes,
    defaults_hidden,
    expose_defaults,
    have_changed,
    known_class,
    known_classes,
    noted,
    present,
    set_again,
)
from memcnn.engine.capture import NoRandomNumbers, is_captured
from memcnn.engine.checksum import checksum
from memcnn.engine.generators import (
    NUMPY,
    OWNED,
    PYTHON,
    Source,
    moved_outside,
    outside_state,
    owned,
    rng_state,
    same_state,
    set_rng_state,
)
from memcnn.engine.hooks import Hooks, hooked, restore_hooks
from memcnn.engine.torch_private import BATCH_NORM_FORWARD, NORM_FORWARDS, NormBase

KEPT_BUFFER = 2**20
"""Number of bytes of a buffer on a GPU up to which a copy is kept for backward, since nothing can be compared there."""


class Buffer(NamedTuple):
    """A buffer before an evaluation: where it is registered, itself, its value (None: the present one), and identity.

    ``checksum`` is that of its value, for changes without a new version; None where it has none.
    """

    registry: dict
    name: str
    tensor: Tensor
    before: Tensor | None
    identity: tuple[int, int]
    checksum: int | None


class Drawn(NamedTuple):
    """A generator that the first evaluation draws from, with its states before and after."""

    source: Source
    before: object
    after: object


class Replay:
    """Made before the first evaluation of ``module`` on ``inputs``, which is followed by ``evaluated()``.

    A further evaluation within ``again()`` sees the parameters, buffers and plain attributes that ``module`` had,
    computes the same, and leaves generators, parameters, buffers, attributes and modes as it found them. Parameters
    that a layer initialised during the first evaluation keep their initialised values. A parameter that was modified
    in place since is a RuntimeError, and so is a buffer, unless the first evaluation modified it as well.

    Args:
        module: the module that is evaluated.
        inputs: the tensors that it is evaluated on, which say which devices take part.
        preserve_rng_state: give a further evaluation the random numbers of the first.
    """

    def __init__(self, module: nn.Module, inputs: Sequence[Tensor], preserve_rng_state: bool):
        self.module, self.name = module, type(module).__name__
        self.modes: list[tuple[nn.Module, bool]] = []
        self.children: list[tuple[dict, list[nn.Module | None]]] = []
        """Registry and content of the modules that have children; after ``evaluated()``, with those built in it."""
        self.attributes: list[Attributes] = []
        """Plain attributes of PyTorch's own layers, which do not change them."""
        self.users_attributes: list[Attributes] = []
        """Plain attributes of other modules."""
        self.users_modules: list[tuple[nn.Module, int]] = []
        """Those modules, and how many attributes each has."""
        self.hidden_defaults: list[tuple[dict, tuple[str, ...]]] = []
        """Attributes that the first evaluation has set for the first time, in place of those of a class."""
        self.own_generators: list[object] = []
        """Generators that are attributes of a module."""
        self.is_foreign = False
        """Whether code other than that of PyTorch's layers runs, which may draw from other generators."""
        self.parameters: list[tuple[dict, str, Tensor, bool, tuple[int, int] | None]] = []
        """Registry, name, tensor, ``requires_grad`` and identity (None: uninitialised) of each parameter."""
        self.buffers: list[tuple[dict, str, Tensor]] = []
        """Registry, name and tensor of each buffer."""
        self.restored: list[Buffer] = []
        """Buffers that an evaluation may modify."""
        self.unchanged: list[tuple[str, str, Tensor, tuple[int, int]]] = []
        """Kind, name, tensor and identity of what must not be modified in the meantime."""
        self.checksums: list[tuple[str, Tensor, int]] = []
        """Name, tensor and checksum of the buffers among them that have one."""
        self.running_statistics: dict[int, nn.Module] = {}
        """By id, running statistics of plain BatchNorms that normalise with their batch's statistics."""
        self.untracked: dict[nn.Module, None] = {}
        """BatchNorms that a further evaluation evaluates without their running statistics, in order.

        Those whose running statistics autograd saved in the first evaluation, which proves that they run eagerly. The
        batch's statistics are the same without, and nothing has to be copied and restored. Compiled code saves other
        tensors, and would be compiled once more.
        """
        self.sets_parameters = False
        """Whether a layer set its own parameters in the first evaluation."""
        self.is_initialised_by_it = False
        """Whether the first evaluation set parameters or built modules, which a further one does not repeat."""
        self.moved_attributes: list[Attributes] = []
        """Attributes that the first evaluation changed, as they were before."""
        self._silent: set[int] = set()
        """Ids of the registries whose buffers change without a new version: those of norms in training mode."""
        self._survey(module)
        registries = hooked(self.modes)
        self.hooks = Hooks(registries) if registries else None

        devices = {_CPU, *[x.device for x in inputs]}
        self.autocast = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), torch.is_autocast_cache_enabled())
            for kind in {device.type for device in devices}
            if torch.amp.is_autocast_available(kind)
        ]
        captured = {device for device in devices if is_captured(device)}
        self.captured = preserve_rng_state and bool(captured)
        self.generators: list[Drawn] = []
        """The generators that the module may draw from; after ``evaluated()``, those that it drew from."""
        if preserve_rng_state:
            self.generators = [
                Drawn(Source("PyTorch's", rng_state, set_rng_state, device), rng_state(device), None)
                for device in devices
                if device.type in ("cpu", "cuda") and device not in captured
            ]
            for generator in {id(g): g for g in self.own_generators}.values() if self.own_generators else ():
                if getattr(generator, "device", None) not in captured:
                    source = owned(generator)
                    self.generators.append(Drawn(source, source.read(source.key), None))
        is_watched = preserve_rng_state and (self.is_foreign or self.hooks is not None)
        self.outside = outside_state(module) if is_watched else None
        """Python's and NumPy's generators before the first evaluation; None after it, or if nobody draws from them."""

    def _survey(self, root: nn.Module) -> None:
        """Note the modes, attributes, parameters and buffers of all modules."""
        modules, seen = [root], {root}
        for module in modules:  # which grows
            registry = module._modules
            if registry:
                content = [*registry.values()]
                self.children.append((registry, content))
                for child in content:
                    if child is not None and child not in seen:
                        seen.add(child)
                        modules.append(child)
            self.modes.append((module, module.training))
            own, known = vars(module), known_classes.get(type(module))
            if known is None or known[0] != len(own):
                self._survey_attributes(module)
            elif known[1]:
                self.attributes.append((own, known[1], tuple(map(own.get, known[1]))))
            parameters = module._parameters
            for name, parameter in parameters.items():
                if parameter is not None:
                    value: tuple[int, int] | None = None
                    try:
                        value = parameter._version, parameter.untyped_storage()._cdata
                    except (RuntimeError, ValueError):
                        _refuse_unless_lazy(parameter, f"the parameter {name!r} of {type(module).__name__}")
                    self.parameters.append((parameters, name, parameter, parameter.requires_grad, value))
            if module._buffers:
                self._survey_buffers(module)

    def _survey_attributes(self, module: nn.Module) -> None:
        if (known := known_class(module)) is None:
            self.is_foreign = True
            self.users_attributes.append(noted(module))
            self.users_modules.append((module, len(vars(module))))
        elif known[1]:
            own = vars(module)
            self.attributes.append((own, known[1], tuple(map(own.get, known[1]))))
        if not OWNED.keys().isdisjoint(map(type, vars(module).values())):
            self.own_generators += [value for value in vars(module).values() if type(value) in OWNED]

    def _survey_buffers(self, module: nn.Module) -> None:
        registry, training = module._buffers, module.training
        is_norm = isinstance(module, NormBase)
        forward = type(module).forward if is_norm and "forward" not in vars(module) else None
        is_plain = forward is BATCH_NORM_FORWARD and module.track_running_stats and registry.keys() == _STATISTICS
        if is_plain and training:
            self.running_statistics[id(registry["running_mean"])] = module
            self.running_statistics[id(registry["running_var"])] = module
        if is_norm and training:
            self._silent.add(id(registry))
        ignored = training and forward in NORM_FORWARDS
        for name, buffer in registry.items():
            if buffer is not None:
                self.buffers.append((registry, name, buffer))
                try:
                    value = buffer._version, buffer.untyped_storage()._cdata
                except (RuntimeError, ValueError):
                    _refuse_unless_lazy(buffer, f"the buffer {name!r} of {type(module).__name__}")
                    continue
                if ignored:
                    self.restored.append(Buffer(registry, name, buffer, None, value, None))
                else:
                    self.restored.append(Buffer(registry, name, buffer, buffer.clone(), value, checksum(buffer)))

    def watch(self) -> AbstractContextManager:
        """Return the context of the first evaluation. It notes which hooks change a value."""
        if self.hooks is None and not self.captured:
            return _NOTHING
        stack = ExitStack()
        if self.hooks is not None:
            stack.enter_context(self.hooks.watch())
        if self.captured:
            stack.enter_context(NoRandomNumbers(self.name))
        return stack

    def evaluated(self) -> None:
        """Note what the first evaluation changed, and let go of all that it did not."""
        generators, self.generators = self.generators, []
        for source, before, _ in generators:
            if not same_state(before, after := source.read(source.key)):
                self.generators.append(Drawn(source, before, after))
        if self.outside is not None:
            self.generators += [
                Drawn(source, before, source.read(source.key))
                for source, before in moved_outside(self.module, self.outside)
            ]
            self.outside = None
        # a layer that initialises itself in its first forward pass sets its parameters, but does so once
        set_by = set()
        for registry, name, p, _, before in self.parameters:
            now = p._version, p.untyped_storage()._cdata
            self.unchanged.append(("parameter", name, p, now))
            if now != before:
                set_by.add(id(registry))
        self.sets_parameters = self.is_initialised_by_it = bool(set_by)
        if self.is_foreign:
            self.children = [(registry, [*registry.values()]) for registry, _ in self.children]
            self._note_attributes()
        initialised = {id(m._buffers) for m, _ in self.modes if id(m._parameters) in set_by} if set_by else set_by
        # torch moves running statistics without a new version; a branch that moves them itself has them restored
        moved = {
            id(b.registry)
            for b in self.restored
            if id(b.tensor) in self.running_statistics
            and (b.tensor._version, b.tensor.untyped_storage()._cdata) != b.identity
        }
        self.untracked = {m: None for m in self.untracked if id(m._buffers) not in moved}
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
        """Note whether the first evaluation modified a buffer, and keep the value it began with if it may have."""
        registry, name, b, before, value, bits = buffer
        if initialised and (now := registry.get(name)) is not None:
            b, value, bits = now, identity(now), checksum(now)  # the layer may note here that it is initialised
        if before is not None and identity(b) == value and id(registry) not in self._silent and checksum(b) == bits:
            self.unchanged.append(("buffer", name, b, value))
            if bits is not None:
                self.checksums.append((name, b, bits))
            if (
                b.device.type == "cpu"
                or b.nbytes > KEPT_BUFFER
                or any(m._buffers is registry and type(m).forward in NORM_FORWARDS for m, _ in self.modes)
            ):
                before = None
        self.restored.append(Buffer(registry, name, b, before, value, bits))

    def _note_attributes(self) -> None:
        """Note which attributes the first evaluation changed.

        If it has set parameters or built modules, attributes say that this is done: a further evaluation sees them as
        they are now.
        """
        moved = [then for then in self.users_attributes if have_changed(then)]
        if not self.sets_parameters and (moved or self.generators):
            self.is_initialised_by_it = self._has_grown()
        if self.is_initialised_by_it:
            self.users_attributes = [present(then) for then in self.users_attributes]
            return
        self.moved_attributes = moved
        for (module, size), then in zip(self.users_modules, self.users_attributes, strict=True):
            if len(then[0]) != size and (names := defaults_hidden(then, type(module))):
                self.hidden_defaults.append((then[0], names))

    def _has_grown(self) -> bool:
        modules = list(self.module.modules())
        return (
            len(modules),
            sum(p is not None for m in modules for p in m._parameters.values()),
            sum(b is not None for m in modules for b in m._buffers.values()),
        ) != (len(self.modes), len(self.parameters), len(self.buffers))

    def again(self, *, compare: bool = True) -> "_Again":
        """Return the context of a further evaluation.

        Args:
            compare: raise a RuntimeError if it has not moved the generators as the first has.
        """
        return _Again(self, compare)

    def check_unchanged(self, when: str, fix: str) -> None:
        """Raise a RuntimeError if a parameter, a buffer or a module was modified or exchanged."""
        for kind, name, tensor, value in self.unchanged:
            if (tensor._version, tensor.untyped_storage()._cdata) != value:
                raise RuntimeError(
                    f"the {kind} {name!r} of shape {tuple(tensor.shape)} was modified {when}, so that "
                    f"the activations cannot be rebuilt: {fix}"
                )
        for name, tensor, bits in self.checksums:
            if checksum(tensor) != bits:
                raise RuntimeError(
                    f"the buffer {name!r} of shape {tuple(tensor.shape)} was modified {when} through "
                    ".data, NumPy or a kernel that counts no version, so that the activations cannot be "
                    f"rebuilt: {fix}"
                )
        for registry, content in self.children:
            if [*registry.values()] != content:
                raise RuntimeError(
                    f"a module within {self.name} was exchanged, added or removed {when}, so that the "
                    f"activations cannot be rebuilt: {fix}"
                )

    def restore(self, undo: list[tuple]) -> None:
        """Set everything as the first evaluation found it. ``undo`` receives the calls that undo this."""
        for kind, dtype, enabled, caches in self.autocast:
            if enabled or torch.is_autocast_enabled(kind):
                autocast = torch.autocast(kind, dtype, enabled, caches)
                autocast.__enter__()
                undo.append((autocast.__exit__, None, None, None))
        for module, training in self.modes:
            if module.training != training:
                undo.append((setattr, module, "training", module.training))
                module.training = training
        for then in self.attributes:
            own, names, values = then
            if not all(map(is_, values, map(own.get, names))):
                set_again(then, undo)
        moved = {id(own) for own, _, _ in self.moved_attributes} if self.moved_attributes else ()
        for then in self.users_attributes:
            own, names, values = then
            if id(own) in moved or not all(map(is_, values, map(own.get, names))):
                set_again(then, undo)
        for own, names in self.hidden_defaults:
            expose_defaults(own, names, undo)
        for module in self.untracked:
            undo.append((vars(module).__setitem__, "track_running_stats", module.track_running_stats))
            vars(module)["track_running_stats"] = False
        for registry, name, parameter, requires_grad, _ in self.parameters:
            if registry.get(name) is not parameter:
                _exchange(registry, name, parameter, undo)
            if parameter.requires_grad != requires_grad:
                undo.append((parameter.requires_grad_, parameter.requires_grad))
                parameter.requires_grad_(requires_grad)
        for registry, name, buffer in self.buffers:
            if registry.get(name) is not buffer:
                _exchange(registry, name, buffer, undo)
        for source, before, _ in self.generators:
            undo.append((source.write, source.key, source.read(source.key)))
            source.write(source.key, before)
        if self.outside is not None:  # nothing was evaluated before
            undo += [(source.write, source.key, source.read(source.key)) for source in (PYTHON, NUMPY)]
        for _, _, buffer, before, _, _ in self.restored:
            # .data: autograd must not take a value that is put back for a modification
            undo.append((buffer.data.copy_, buffer.clone()))
            if before is not None:
                buffer.data.copy_(before)
        if (registries := hooked(self.modes)) or self.hooks is not None:
            restore_hooks(self.hooks, registries, undo)

    def check_drawn(self) -> None:
        """Raise a RuntimeError if a further evaluation has left a generator in another state than the first."""
        for source, before, after in self.generators:
            now = source.read(source.key)
            if self.is_initialised_by_it and same_state(before, now):
                continue  # the initialisation drew, and nothing else
            if after is not None and not same_state(after, now):
                raise RuntimeError(
                    f"{self.name} drew other random numbers from {source.name} generator in the recomputation than in "
                    "the forward pass: another thread drew from it at the same time, or the module draws another "
                    "number of them, or it initialised itself in that forward pass; draw in one thread at a time, or "
                    "from a torch.Generator that the module owns, and give a module that initialises itself a forward "
                    "pass under torch.no_grad() first"
                )


_STATISTICS = {"running_mean", "running_var", "num_batches_tracked"}
_CPU = torch.device("cpu")
_NOTHING = nullcontext()


class _Again:
    """The context of a further evaluation: restores what the first saw, and undoes that at the end."""

    def __init__(self, replay: Replay, compare: bool):
        self.replay, self.compare = replay, compare
        self.undo: list[tuple] = []

    def __enter__(self) -> None:
        self.replay.check_unchanged("between forward and backward", "call backward before it changes")
        try:
            self.replay.restore(self.undo)
        except BaseException:
            _run_backwards(self.undo)
            raise

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None and self.compare and self.replay.generators:
                self.replay.check_drawn()
        finally:
            _run_backwards(self.undo)
        if kind is None and self.replay.sets_parameters:
            self.replay.check_unchanged(
                "by its module's every forward pass", "modify it outside of forward, or just once"
            )


def _run_backwards(undo: list[tuple]) -> None:
    """Make the calls, the last one first; a call that fails keeps none of the others from being made."""
    try:
        while undo:
            function, *arguments = undo.pop()
            function(*arguments)
    finally:
        if undo:
            _run_backwards(undo)


def identity(x: Tensor) -> tuple[int, int]:
    """Return another pair after x was modified in place, or was given other values by ``x.data = ...``."""
    return x._version, x.untyped_storage()._cdata


def _refuse_unless_lazy(x: Tensor, what: str) -> None:
    """Raise a RuntimeError for a tensor without a version, unless it is an uninitialised one of a lazy layer."""
    if not is_lazy(x):
        raise RuntimeError(
            f"{what} was made under torch.inference_mode(), so that autograd cannot use it: make or "
            "load the module outside of inference_mode, or under torch.no_grad()"
        )


def _exchange(registry: dict, name: str, then: Tensor, undo: list[tuple]) -> None:
    """Put back ``then``, which gave way to another tensor, as after functional_call or an assignment to self.buffer.

    Tensors of a subclass are those of FSDP, which exchanges them itself.
    """
    now = registry.get(name)
    if type(then) in (Tensor, nn.Parameter) and (now is None or type(now) in (Tensor, nn.Parameter)):
        undo.append((registry.__setitem__, name, now) if name in registry else (registry.pop, name, None))
        registry[name] = then
