"""What a module's second evaluation must see as the first did: random numbers, autocast, modes, buffers.

And what it must not do again: call somebody's hooks, move a generator, update a buffer.

A replay is made for every evaluation of every branch, so that its loops are written out: where kernels are small, calls
of Python functions decide how long a step takes.
"""

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext

import torch
from torch import Tensor, nn

from memcnn.engine.capture import NoRandomNumbers, is_captured
from memcnn.engine.torch_private import (
    BATCH_NORM_FORWARD,
    GLOBAL_FORWARD_HOOKS,
    NORM_FORWARDS,
    NormBase,
    disabled_dispatch,
)


class Replay:
    """Made before the first evaluation of ``module`` on ``inputs``, which is followed by ``evaluated()``.

    A further evaluation within ``again()`` sees the parameters and buffers that ``module`` had, computes the same, and
    leaves generators, parameters, buffers and modes as it found them. Parameters that a layer initialised during the
    first evaluation keep their initialised values. A parameter that was modified in place since is a RuntimeError, and
    so is a buffer, unless the first evaluation modified it as well.

    Args:
        module: the module that is evaluated.
        inputs: the tensors that it is evaluated on, which say which devices take part.
        preserve_rng_state: give a further evaluation the random numbers of the first.
    """

    def __init__(self, module: nn.Module, inputs: Sequence[Tensor], preserve_rng_state: bool):
        self.name = type(module).__name__
        self.modes: list[tuple[nn.Module, bool]] = []
        self.parameters: list[tuple[dict, str, Tensor, bool, tuple[int, int]]] = []
        """Registry, name, tensor, ``requires_grad`` and identity of each parameter."""
        self.buffers: list[tuple[dict, str, Tensor]] = []
        """Registry, name and tensor of each buffer."""
        self.restored: list[tuple[dict, str, Tensor, Tensor | None, tuple[int, int] | None]] = []
        """Buffers that an evaluation may modify, the value it starts from (None: the present one), and identity."""
        self.unchanged: list[tuple[str, str, Tensor, tuple[int, int]]] = []
        """Kind, name, tensor and identity of what must not be modified in the meantime."""
        self.running_statistics: dict[int, nn.Module] = {}
        """By id, running statistics of plain BatchNorms that normalise with their batch's statistics."""
        self.untracked: dict[nn.Module, None] = {}
        """BatchNorms that a further evaluation evaluates without their running statistics, in order.

        Those whose running statistics autograd saved in the first evaluation, which proves that they run eagerly. The
        batch's statistics are the same without, and nothing has to be copied and restored. Compiled code saves other
        tensors, and would be compiled once more.
        """
        self.replacing_hooks: list[Callable] = []
        """User hooks that replaced a value in the first evaluation, so that further ones need them."""
        self.sets_parameters = False
        """Whether a layer set its own parameters in the first evaluation."""
        self._silent: set[int] = set()
        """Ids of the registries whose buffers change without a new version: those of norms in training mode."""
        self._survey(module)

        devices = {_CPU, *[x.device for x in inputs]}
        self.autocast = [(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind),
                          torch.is_autocast_cache_enabled())
                         for kind in {device.type for device in devices} if torch.amp.is_autocast_available(kind)]
        captured = {device for device in devices if is_captured(device)}
        self.captured = preserve_rng_state and bool(captured)
        self.generators = [(device, _rng_state(device)) for device in devices
                           if preserve_rng_state and device.type in ("cpu", "cuda") and device not in captured]

    def _survey(self, root: nn.Module) -> None:
        """Note the modes, parameters and buffers of all modules."""
        modules, seen = [root], {root}
        for module in modules:  # which grows
            for child in module._modules.values():
                if child is not None and child not in seen:
                    seen.add(child)
                    modules.append(child)
            self.modes.append((module, module.training))
            registry = module._parameters
            for name, parameter in registry.items():
                if parameter is not None:
                    value = parameter._version, parameter.untyped_storage()._cdata
                    self.parameters.append((registry, name, parameter, parameter.requires_grad, value))
            if module._buffers:
                self._survey_buffers(module)

    def _survey_buffers(self, module: nn.Module) -> None:
        registry, training = module._buffers, module.training
        is_norm = isinstance(module, NormBase)
        forward = type(module).forward if is_norm and "forward" not in vars(module) else None
        if forward is BATCH_NORM_FORWARD and module.track_running_stats and registry.keys() == _STATISTICS:
            if training:
                self.running_statistics[id(registry["running_mean"])] = module
                self.running_statistics[id(registry["running_var"])] = module
        if is_norm and training:
            self._silent.add(id(registry))
        ignored = training and forward in NORM_FORWARDS
        for name, buffer in registry.items():
            if buffer is not None:
                self.buffers.append((registry, name, buffer))
                value = buffer._version, buffer.untyped_storage()._cdata
                self.restored.append((registry, name, buffer, None if ignored else buffer.clone(), value))

    def watch(self) -> AbstractContextManager:
        """Return the context of the first evaluation. It notes which hooks replace a value."""
        hooks = self._user_hooks()
        if not hooks and not self.captured:
            return _NOTHING
        stack = ExitStack()
        for registry, key, hook in hooks:
            stack.callback(registry.__setitem__, key, hook)
            registry[key] = functools.partial(self._noted, hook)
        if self.captured:
            stack.enter_context(NoRandomNumbers(self.name))
        return stack

    def evaluated(self) -> None:
        """Note what the first evaluation changed, and let go of all that it did not."""
        self.generators = [(device, state) for device, state in self.generators
                           if not _equal(state, _rng_state(device))]
        # a layer that initialises itself in its first forward pass sets its parameters, but does so once
        set_by = set()
        for registry, name, p, _, before in self.parameters:
            now = p._version, p.untyped_storage()._cdata
            self.unchanged.append(("parameter", name, p, now))
            if now != before:
                set_by.add(id(registry))
        self.sets_parameters = bool(set_by)
        initialised = {id(m._buffers) for m, _ in self.modes if id(m._parameters) in set_by} if set_by else set_by
        # torch moves running statistics without a new version; a branch that moves them itself has them restored
        moved = {id(registry) for registry, _, b, _, value in self.restored
                 if id(b) in self.running_statistics and (b._version, b.untyped_storage()._cdata) != value}
        self.untracked = {m: None for m in self.untracked if id(m._buffers) not in moved}
        untracked = {id(m._buffers) for m in self.untracked}
        restored, self.restored = self.restored, []
        for registry, name, b, before, value in restored:
            if id(registry) in untracked:
                continue
            if id(registry) in initialised and (now := registry.get(name)) is not None:
                b, value = now, identity(now)  # the layer may say in a buffer that it is initialised
            if before is not None and identity(b) == value and id(registry) not in self._silent:
                self.unchanged.append(("buffer", name, b, value))
                before = None
            self.restored.append((registry, name, b, before, value))
        if initialised:
            self.buffers = [(registry, name, now if id(registry) in initialised and now is not None else b)
                            for registry, name, b in self.buffers for now in (registry.get(name),)]

    def again(self) -> "_Again":
        """Return the context of a further evaluation."""
        return _Again(self)

    def check_unchanged(self, when: str, fix: str) -> None:
        """Raise a RuntimeError if a parameter or a buffer was modified."""
        for kind, name, tensor, value in self.unchanged:
            if (tensor._version, tensor.untyped_storage()._cdata) != value:
                raise RuntimeError(f"the {kind} {name!r} of shape {tuple(tensor.shape)} was modified {when}, so that "
                                   f"the activations cannot be rebuilt: {fix}")

    def restore(self, undo: list[tuple]) -> None:
        """Set everything as the first evaluation found it. ``undo`` receives the calls that undo this."""
        for kind, *state in self.autocast:
            if state[1] or torch.is_autocast_enabled(kind):
                autocast = torch.autocast(kind, *state)
                autocast.__enter__()
                undo.append((autocast.__exit__, None, None, None))
        for module, training in self.modes:
            if module.training != training:
                undo.append((setattr, module, "training", module.training))
                module.training = training
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
        for device, state in self.generators:
            undo.append((_set_rng_state, device, _rng_state(device)))
            _set_rng_state(device, state)
        for _, _, buffer, before, _ in self.restored:
            # .data: autograd must not take a value that is put back for a modification
            undo.append((buffer.data.copy_, buffer.clone()))
            if before is not None:
                buffer.data.copy_(before)
        for registry, key, hook in self._user_hooks():
            if not any(hook is other for other in self.replacing_hooks):
                undo.append((registry.__setitem__, key, hook))
                registry[key] = _silence

    def _user_hooks(self) -> list[tuple[dict, int, Callable]]:
        """Return the forward hooks that run with the module, except those of torch itself (spectral norm, FSDP)."""
        registries = [hooks for hooks in GLOBAL_FORWARD_HOOKS if hooks]
        for module, _ in self.modes:
            if module._forward_pre_hooks:
                registries.append(module._forward_pre_hooks)
            if module._forward_hooks:
                registries.append(module._forward_hooks)
        return registries and [(hooks, key, hook) for hooks in registries for key, hook in hooks.items()
                               if not _is_torchs(hook)]

    def _noted(self, hook: Callable, *args, **kwargs):
        result = hook(*args, **kwargs)
        if result is not None:
            self.replacing_hooks.append(hook)
        return result


_STATISTICS = {"running_mean", "running_var", "num_batches_tracked"}
_CPU = torch.device("cpu")
_NOTHING = nullcontext()


class _Again:
    """The context of a further evaluation: restores what the first saw, and undoes that at the end."""

    def __init__(self, replay: Replay):
        self.replay = replay
        self.undo: list[tuple] = []

    def __enter__(self) -> None:
        self.replay.check_unchanged("between forward and backward", "call backward before it changes")
        try:
            self.replay.restore(self.undo)
        except BaseException:
            _run_backwards(self.undo)
            raise

    def __exit__(self, kind: type | None, *_) -> None:
        _run_backwards(self.undo)
        if kind is None and self.replay.sets_parameters:
            self.replay.check_unchanged("by its module's every forward pass", "modify it outside of forward, or just "
                                        "once")


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


def _is_torchs(hook: Callable) -> bool:
    while isinstance(hook, functools.partial):
        hook = hook.func
    return (getattr(hook, "__module__", None) or type(hook).__module__).partition(".")[0] == "torch"


def _silence(*_, **__) -> None:
    """In place of a hook that only looks on: it has seen the first evaluation."""


def _exchange(registry: dict, name: str, then: Tensor, undo: list[tuple]) -> None:
    """Put back ``then``, which gave way to another tensor, as after functional_call or an assignment to self.buffer.

    Tensors of a subclass are those of FSDP, which exchanges them itself.
    """
    now = registry.get(name)
    if all(type(t) in (Tensor, nn.Parameter) for t in (now, then)):
        undo.append((registry.__setitem__, name, now))
        registry[name] = then


def _rng_state(device: torch.device) -> Tensor:
    return torch.default_generator.get_state() if device.type == "cpu" else torch.cuda.get_rng_state(device)


def _equal(state: Tensor, other: Tensor) -> bool:
    """Return whether two states of a generator are the same. They are real tensors, under a mode of fake ones too."""
    with disabled_dispatch():
        return torch.equal(state, other)


def _set_rng_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cpu":
        torch.default_generator.set_state(state)
    else:
        torch.cuda.set_rng_state(state, device)
