"""Let the second evaluation of a module see what the first one saw, and leave no side effects.

It sees the same random numbers, autocast state, modes, parameters, buffers and attributes. It calls only those hooks of
the user that changed a value. Generators, buffers and counters are restored afterwards.

``Replay`` surveys the module before the first evaluation, notes after it what it has changed, and restores everything
for a further evaluation, in the context of again.py. buffers.py and generators.py have parts of it. quiet.py has a
shorter way for most branches. The loops are written out, because calls of Python functions take long.
"""

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from operator import is_

import torch
from torch import Tensor, nn

from memcnn.engine.again import ReplayContext, exchange, restore_autocast
from memcnn.engine.attributes import (
    BASE_ATTRIBUTES,
    Attributes,
    have_changed,
    known_class,
    known_classes,
    layer_of,
    names_added_since,
    note_constants,
    remove,
    set_again,
    with_present_values,
)
from memcnn.engine.buffers import Buffer, ReplayedBuffers, hook_reads_statistics, reads_statistics
from memcnn.engine.capture import NoRandomNumbers, is_captured
from memcnn.engine.checksum import checksum
from memcnn.engine.generators import (
    NUMPY,
    OWNED,
    PYTHON,
    Drawn,
    GeneratorAccess,
    drawn_from_globals,
    global_states,
    owned,
    rng_state,
    same_state,
    set_rng_state,
)
from memcnn.engine.hooks import Hooks, hook_registries, restore_hooks
from memcnn.engine.identity import identity, refuse_unless_lazy
from memcnn.engine.references import Container, WithGraph, references
from memcnn.engine.survey import draws_nothing
from memcnn.engine.torch_private import is_compiled

_CPU = torch.device("cpu")


class Replay(ReplayedBuffers):
    """Replays the evaluation of ``module`` on ``inputs``.

    Construct it before the first evaluation, and call ``evaluated()`` after it. A further evaluation within ``again()``
    sees the parameters, buffers and plain attributes that ``module`` had before the first, and so computes the same
    result. It leaves generators, parameters, buffers, attributes and modes as it found them. Parameters that a layer
    initialised during the first evaluation keep their initialised values. If a parameter or buffer was modified in
    place since, ``again()`` raises a RuntimeError, except for buffers that the first evaluation modified as well.

    Args:
        module: the module that is evaluated.
        inputs: the tensors that it is evaluated on. Their devices are those whose state is replayed.
        preserve_rng_state: give a further evaluation the random numbers of the first.
    """

    def __init__(self, module: nn.Module, inputs: Sequence[Tensor], preserve_rng_state: bool):
        self.module, self.name = module, type(module).__name__
        self.modes: list[tuple[nn.Module, bool]] = []
        self.children: list[tuple[dict, list[nn.Module | None]]] = []
        """Registry and children of each module with children. ``evaluated()`` adds modules that were built since."""
        self.attributes: list[Attributes] = []
        """Plain attributes of PyTorch's own layers. The layers do not change them, but the user may."""
        self.users_attributes: list[Attributes] = []
        """Plain attributes of other modules."""
        self.users_modules: list[tuple[nn.Module, int]] = []
        """Modules that are not PyTorch's own layers, and the number of attributes of each."""
        self.own_generators: list[object] = []
        """Generators that are attributes of a module."""
        self.is_foreign = False
        """True if code runs that is not of PyTorch's layers. It may draw from Python's and NumPy's generators."""
        self.parameters: list[tuple[dict, str, Tensor, bool, tuple[int, int] | None]] = []
        """Registry, name, tensor, ``requires_grad`` and identity (None: uninitialised) of each parameter."""
        self.buffers: list[tuple[dict, str, Tensor]] = []
        self.restored: list[Buffer] = []
        self.unchanged: list[tuple[str, str, Tensor, tuple[int, int]]] = []
        self.checksums: list[tuple[str, str, Tensor, int]] = []
        self.references: list[WithGraph | Container] = []
        """Plain attributes of users' modules that are containers, or tensors with a graph."""
        self.running_statistics: dict[int, nn.Module] = {}
        self.untracked: dict[nn.Module, None] = {}
        self.reads_statistics = False
        self.silent: set[int] = set()

        # what the first evaluation changed: ``evaluated()`` sets these
        self.sets_modes = False
        """True if the first evaluation left a module in another mode. A further one does the same."""
        self.sets_parameters = False
        """True if a layer changed its own parameters in the first evaluation."""
        self.was_initialised_in_forward = False
        """True if the first evaluation changed parameters or built modules. A further one does not repeat that."""
        self.changed_attributes: list[Attributes] = []
        """Attributes that the first evaluation changed, as they were before."""
        self.added_attributes: list[tuple[dict, tuple[str, ...]]] = []
        """Attributes that modules have only since the first evaluation."""

        self._survey(module)
        registries = hook_registries(self.modes)
        self.hooks = Hooks(registries) if registries else None
        hooks = self.hooks.seen if self.hooks is not None else ()
        if self.reads_statistics or any(hook_reads_statistics(hook) for _, _, hook, _ in hooks):
            self.survey_statistics_again()

        self.may_reuse = self.hooks is None and not self.reads_statistics
        """True if the second evaluation may take results from the first (memcnn/reuse.py).

        False if there are hooks, since the second evaluation does not call all of them; and if the module reads running
        statistics, since the second evaluation must then update them."""
        devices = {_CPU, *[x.device for x in inputs]}
        self.autocast = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), torch.is_autocast_cache_enabled())
            for kind in {device.type for device in devices}
            if torch.amp.is_autocast_available(kind)
        ]
        captured = {device for device in devices if is_captured(device)}
        self.refuses_random_numbers = (
            preserve_rng_state
            and bool(captured)
            and (self.hooks is not None or not all(draws_nothing(module) for module, _ in self.modes))
        )
        """True if drawing random numbers raises: a CUDA graph is captured, and a layer may draw some."""
        self.generators: list[Drawn] = []
        """The generators that the module may draw from; after ``evaluated()``, those that it drew from."""
        if preserve_rng_state:
            self.generators = [
                Drawn(GeneratorAccess("PyTorch's generator", rng_state, set_rng_state, device), rng_state(device), None)
                for device in devices
                if device.type in ("cpu", "cuda") and device not in captured
            ]
            for generator in {id(g): g for g in self.own_generators}.values() if self.own_generators else ():
                if getattr(generator, "device", None) not in captured:
                    access = owned(generator)
                    self.generators.append(Drawn(access, access.read(access.key), None))
        is_watched = preserve_rng_state and (self.is_foreign or self.hooks is not None)
        self.global_states = global_states(module) if is_watched else None
        """Python's and NumPy's generators before the first evaluation. None after it, or if no code may use them."""

    def _survey(self, root: nn.Module) -> None:
        """Note the modes, attributes, parameters and buffers of all modules."""
        modules, seen = [root], {root}
        for module in modules:  # ``modules`` grows during this loop
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
                    found: tuple[int, int] | None = None
                    try:
                        found = parameter._version, parameter.untyped_storage()._cdata
                    except (RuntimeError, ValueError):
                        refuse_unless_lazy(parameter, f"the parameter {name!r} of {type(module).__name__}")
                    self.parameters.append((parameters, name, parameter, parameter.requires_grad, found))
            if module._buffers:
                self.survey_buffers(module)

    def _survey_attributes(self, module: nn.Module) -> None:
        """Note the plain attributes and the own generators of a module."""
        if (known := known_class(module, layer_of(type(module)))) is None:
            self.is_foreign = True
            self.reads_statistics = self.reads_statistics or reads_statistics(type(module))
            self.users_attributes.append(note_constants(module))
            self.users_modules.append((module, len(vars(module))))
            if len(vars(module)) > BASE_ATTRIBUTES:
                self._survey_references(module)
        elif known[1]:
            own = vars(module)
            self.attributes.append((own, known[1], tuple(map(own.get, known[1]))))
        if not OWNED.keys().isdisjoint(map(type, vars(module).values())):
            self.own_generators += [value for value in vars(module).values() if type(value) in OWNED]

    def _survey_references(self, module: nn.Module) -> None:
        """Note the plain attributes of a user's module that are tensors or containers."""
        own = vars(module)
        for name, value in references(module):
            if isinstance(value, Container):
                self.references.append(value)
            elif value.grad_fn is not None:
                self.references.append(WithGraph(own, name, value.detach()))
                self.unchanged.append(("attribute", name, value.detach(), identity(value)))
            elif not value.is_inference():
                self.survey_tensor(own, name, value)

    def watch(self) -> AbstractContextManager:
        """Return the context of the first evaluation. It notes which hooks change a value.

        While a CUDA graph is captured, it also refuses random numbers.
        """
        if self.hooks is None and not self.refuses_random_numbers:
            return nullcontext()
        stack = ExitStack()
        if self.hooks is not None:
            stack.enter_context(self.hooks.watch())
        if self.refuses_random_numbers:
            # if torch.compile met this code under a dispatch mode, it would skip it from then on and never compile it
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(NoRandomNumbers(self.name))
        return stack

    def evaluated(self) -> None:
        """Note what the first evaluation changed, and drop what backward does not need."""
        if self.refuses_random_numbers and any(is_compiled(module) for module, _ in self.modes):
            name = type(getattr(self.module, "_orig_mod", self.module)).__name__
            warnings.warn(
                f"{name} is compiled, but runs uncompiled in this capture of a CUDA graph: the engine must see every "
                "operation to notice random numbers. If it never draws any, give the block preserve_rng_state=False",
                stacklevel=2,
            )
        generators, self.generators = self.generators, []
        for access, before, _ in generators:
            if not same_state(before, after := access.read(access.key)):
                self.generators.append(Drawn(access, before, after))
        if self.global_states is not None:
            self.generators += [
                Drawn(access, before, access.read(access.key))
                for access, before in drawn_from_globals(self.module, self.global_states)
            ]
            self.global_states = None
        # a layer that initialises itself in its first forward pass sets its parameters, but does so once
        self_initialised = set()
        for registry, name, p, _, identity_before in self.parameters:
            now = p._version, p.untyped_storage()._cdata
            self.unchanged.append(("parameter", name, p, now))
            if now != identity_before:
                self_initialised.add(id(registry))
        self.sets_parameters = self.was_initialised_in_forward = bool(self_initialised)
        if self.is_foreign:
            self.sets_modes = any(module.training != training for module, training in self.modes)
            self.children = [(registry, [*registry.values()]) for registry, _ in self.children]
            self._note_attributes()
        self.note_buffers(self_initialised)

    def _note_attributes(self) -> None:
        """Note which attributes the first evaluation changed.

        If it has changed parameters or built modules, an attribute may say that this is done. A further evaluation then
        sees the attributes as they are now.
        """
        changed = [then for then in self.users_attributes if have_changed(then)]
        if not self.sets_parameters and (changed or self.generators):
            self.was_initialised_in_forward = self._has_grown()
        if self.was_initialised_in_forward:
            self.users_attributes = [with_present_values(then) for then in self.users_attributes]
            self.references = []
            return
        self.changed_attributes = changed
        for module, size in self.users_modules:
            own = vars(module)
            if len(own) != size and (names := names_added_since(own, size)):
                self.added_attributes.append((own, names))

    def _has_grown(self) -> bool:
        """Return whether the first evaluation built modules, parameters or buffers."""
        modules = list(self.module.modules())
        registries = {id(m._buffers) for m in modules}
        buffers = sum(id(registry) in registries for registry, _, _ in self.buffers)  # the others are plain attributes
        return (
            len(modules),
            sum(p is not None for m in modules for p in m._parameters.values()),
            sum(b is not None for m in modules for b in m._buffers.values()),
        ) != (len(self.modes), len(self.parameters), buffers)

    def again(self, *, check_generators: bool = True) -> ReplayContext:
        """Return the context of a further evaluation.

        Args:
            check_generators: raise a RuntimeError if the generators do not end where the first evaluation left them.
        """
        return ReplayContext(self, check_generators)

    def check_unchanged(self, when: str, fix: str) -> None:
        """Raise a RuntimeError if a parameter, a buffer or a module was modified or exchanged."""
        for kind, name, tensor, identity_before in self.unchanged:
            if (tensor._version, tensor.untyped_storage()._cdata) != identity_before:
                raise RuntimeError(
                    f"the {kind} {name!r} of shape {tuple(tensor.shape)} was modified {when}, so that "
                    f"the activations cannot be rebuilt: {fix}"
                )
        for kind, name, tensor, checksum_before in self.checksums:
            if checksum(tensor) != checksum_before:
                raise RuntimeError(
                    f"the {kind} {name!r} of shape {tuple(tensor.shape)} was modified {when} in a way that "
                    "PyTorch does not count (.data, NumPy or a custom kernel), so that the activations cannot be "
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
        restore_autocast(self.autocast, undo)
        if self.refuses_random_numbers:  # uncompiled, as in the first evaluation: compiled code saves other tensors
            stance = torch.compiler.set_stance("force_eager")
            stance.__enter__()
            undo.append((stance.__exit__, None, None, None))
        for module, training in self.modes:
            if module.training != training or self.sets_modes:
                undo.append((setattr, module, "training", module.training))
                module.training = training
        for then in self.attributes:
            own, names, values = then
            if not all(map(is_, values, map(own.get, names))):
                set_again(then, undo)
        changed = {id(own) for own, _, _ in self.changed_attributes} if self.changed_attributes else ()
        for then in self.users_attributes:
            own, names, values = then
            if id(own) in changed or not all(map(is_, values, map(own.get, names))):
                set_again(then, undo)
        for own, names in self.added_attributes:
            remove(own, names, undo)
        for module in self.untracked:
            undo.append((vars(module).__setitem__, "track_running_stats", module.track_running_stats))
            vars(module)["track_running_stats"] = False
        for registry, name, parameter, requires_grad, _ in self.parameters:
            if registry.get(name) is not parameter:
                exchange(registry, name, parameter, undo)
            if parameter.requires_grad != requires_grad:
                undo.append((parameter.requires_grad_, parameter.requires_grad))
                parameter.requires_grad_(requires_grad)
        for registry, name, buffer in self.buffers:
            if registry.get(name) is not buffer:
                exchange(registry, name, buffer, undo)
        for access, before, _ in self.generators:
            undo.append((access.write, access.key, access.read(access.key)))
            access.write(access.key, before)
        if self.global_states is not None:  # ``evaluated()`` was not called
            undo += [(access.write, access.key, access.read(access.key)) for access in (PYTHON, NUMPY)]
        for reference in self.references:
            reference.set_again(undo)
        exchanged = self.exchange_statistics(undo) if self.restored else ()
        for _, _, buffer, before, *_ in self.restored:
            if id(buffer) in exchanged:
                continue
            # by ``.data``, so that autograd does not count the restored value as a modification
            undo.append((buffer.data.copy_, buffer.clone()))
            if before is not None:
                buffer.data.copy_(before)
        if (registries := hook_registries(self.modes)) or self.hooks is not None:
            restore_hooks(self.hooks, registries, undo)
