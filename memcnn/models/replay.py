"""What a module's second evaluation must see as the first did: random numbers, autocast, modes, buffers.

And what it must not do again: call somebody's hooks, move a generator, update a buffer.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm, _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from memcnn.models.capture import NoRandomNumbers, is_captured


class Replay:
    """Made before the first evaluation of ``module`` on ``inputs``, which runs within ``first()``.

    A further evaluation within ``again()`` sees the parameters and buffers that ``module`` had, computes the same, and
    leaves generators, parameters, buffers and modes as it found them. A layer in it that set its own parameters in the
    first evaluation is seen as that left it. RuntimeError if a parameter, or a buffer that the first evaluation did not
    change, was modified in place in the meantime.
    """

    def __init__(self, module: nn.Module, inputs: Sequence[Tensor], preserve_rng_state: bool):
        self.modules = [(m, m.training) for m in module.modules()]
        self.parameters = [(m._parameters, name, p, p.requires_grad) for m, _ in self.modules
                           for name, p in m._parameters.items() if p is not None]
        self.buffers = [(m._buffers, name, b, None if _ignores_its_buffers(m) else b.clone()) for m, _ in self.modules
                        for name, b in m._buffers.items() if b is not None]
        # torch.batch_norm moves running statistics without a new version, so these count as changed
        self._moving = {id(m._buffers) for m, _ in self.modules if isinstance(m, _NormBase) and m.training}
        self._running_statistics = {id(b): m for m, _ in self.modules if _is_plain_batch_norm(m)
                                    for b in (m.running_mean, m.running_var)}
        self._batch_norms: dict[nn.Module, None] = {}  # those to evaluate again without their buffers, in order
        self.unchanged: list[tuple[str, str, Tensor, tuple[int, int]]] = []
        devices = {torch.device("cpu"), *(x.device for x in inputs)}
        self.autocast = [(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind),
                          torch.is_autocast_cache_enabled())
                         for kind in {d.type for d in devices} if torch.amp.is_autocast_available(kind)]
        self.captured = preserve_rng_state and any(is_captured(device) for device in devices)
        self.generators = [(device, _rng_state(device)) for device in devices
                           if preserve_rng_state and device.type in ("cpu", "cuda") and not is_captured(device)]
        self.replacing_hooks: list[Callable] = []
        self.sets_parameters = False

    def is_running_statistic(self, tensor: Tensor) -> bool:
        """Return whether ``tensor`` is a running statistic of a BatchNorm that normalises with its batch's statistics.

        Autograd saves it, but the gradient does not depend on it. Seeing it saved in the first evaluation is the proof
        that the BatchNorm runs eagerly, so that ``again`` can switch off its running statistics. Compiled code saves
        other tensors, and would be compiled once more without them.
        """
        module = self._running_statistics.get(id(tensor))
        if module is not None:
            self._batch_norms[module] = None
        return module is not None

    @contextmanager
    def first(self) -> Iterator[None]:
        """Notes which hooks replace a value, and at the end lets go of all that the evaluation did not change."""
        values = [identity(p) for _, _, p, _ in self.parameters], [identity(b) for _, _, b, _ in self.buffers]
        with ExitStack() as stack:
            for hooks, key, hook in self._user_hooks():
                _substitute(stack, hooks, key, functools.partial(self._noted, hook))
            if self.captured:
                stack.enter_context(NoRandomNumbers(type(self.modules[0][0]).__name__))
            yield
        self.generators = [(device, state) for device, state in self.generators
                           if not _equal(state, _rng_state(device))]
        self.unchanged = [("parameter", name, p, identity(p)) for _, name, p, _ in self.parameters]
        # a layer that initialises itself in its first forward pass sets its parameters, but does so once
        changed = [registry for (registry, *_), before, (*_, after) in
                   zip(self.parameters, values[0], self.unchanged, strict=True) if before != after]
        self.sets_parameters = bool(changed)
        initialised = [m._buffers for m, _ in self.modules if any(m._parameters is registry for registry in changed)]
        buffers, self.buffers = self.buffers, []
        for (registry, name, b, before), value in zip(buffers, values[1], strict=True):
            now = registry.get(name)
            if now is not None and any(registry is other for other in initialised):  # it may say so in a buffer
                b, value = now, identity(now)
            if before is not None and identity(b) == value and id(registry) not in self._moving:
                self.unchanged.append(("buffer", name, b, value))
                before = None
            self.buffers.append((registry, name, b, before))
        untouched = {id(module._buffers) for module in self._batch_norms}
        self.buffers = [buffer for buffer in self.buffers if id(buffer[0]) not in untouched]

    @contextmanager
    def again(self) -> Iterator[None]:
        self._check_unchanged("between forward and backward", "call backward before it changes")
        with ExitStack() as stack:
            for kind, *state in self.autocast:
                if state[1] or torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, *state))
            for module, training in self.modules:
                if module.training != training:
                    stack.callback(setattr, module, "training", module.training)
                    module.training = training
            for module in self._batch_norms:  # the batch's statistics are the same without buffers to copy and restore
                stack.callback(setattr, module, "track_running_stats", module.track_running_stats)
                module.track_running_stats = False
            for registry, name, tensor, *_ in (*self.parameters, *self.buffers):
                if _was_exchanged(registry.get(name), tensor):
                    _substitute(stack, registry, name, tensor)
            for _, _, parameter, requires_grad in self.parameters:
                if parameter.requires_grad != requires_grad:
                    stack.callback(parameter.requires_grad_, parameter.requires_grad)
                    parameter.requires_grad_(requires_grad)
            for device, state in self.generators:
                stack.callback(_set_rng_state, device, _rng_state(device))
                _set_rng_state(device, state)
            for _, _, buffer, before in self.buffers:
                # .data: autograd must not take a value that is put back for a modification
                stack.callback(buffer.data.copy_, buffer.clone())
                if before is not None:
                    buffer.data.copy_(before)
            for hooks, key, hook in self._user_hooks():
                if not any(hook is other for other in self.replacing_hooks):
                    _substitute(stack, hooks, key, _silence)
            yield
        if self.sets_parameters:
            self._check_unchanged("by its module's every forward pass", "modify it outside of forward, or just once")

    def _check_unchanged(self, when: str, fix: str) -> None:
        for kind, name, tensor, value in self.unchanged:
            if identity(tensor) != value:
                raise RuntimeError(f"the {kind} {name!r} of shape {tuple(tensor.shape)} was modified {when}, so that "
                                   f"the activations cannot be rebuilt: {fix}")

    def _user_hooks(self) -> list[tuple[dict, int, Callable]]:
        """The forward hooks that run with ``module``, but for those by which torch computes (spectral norm, FSDP)."""
        registries = [torch_module._global_forward_pre_hooks, torch_module._global_forward_hooks]
        for module, _ in self.modules:
            registries += module._forward_pre_hooks, module._forward_hooks
        return [(hooks, key, hook) for hooks in registries if hooks
                for key, hook in hooks.items() if not _is_torchs(hook)]

    def _noted(self, hook: Callable, *args, **kwargs):
        result = hook(*args, **kwargs)
        if result is not None:
            self.replacing_hooks.append(hook)
        return result


def identity(x: Tensor) -> tuple[int, int]:
    """Another one after x was modified in place, or was given other values by ``x.data = ...``."""
    return x._version, x.untyped_storage()._cdata


_BATCH_STATISTICS = (_BatchNorm.forward, SyncBatchNorm.forward, _InstanceNorm.forward)
"""The forward functions that, in training mode, normalise with statistics of their input and update their buffers."""


def _ignores_its_buffers(module: nn.Module) -> bool:
    """Return whether the module's output does not depend on its buffers; a subclass may have a forward that does."""
    return (isinstance(module, _NormBase) and module.training and type(module).forward in _BATCH_STATISTICS
            and "forward" not in vars(module))


def _is_plain_batch_norm(module: nn.Module) -> bool:
    """Return whether ``track_running_stats = False`` leaves the module's output as it is and its buffers alone."""
    return _ignores_its_buffers(module) and type(module).forward is _BatchNorm.forward and module.track_running_stats \
        and module.running_mean is not None and module.running_var is not None


def _is_torchs(hook: Callable) -> bool:
    while isinstance(hook, functools.partial):
        hook = hook.func
    return (getattr(hook, "__module__", None) or type(hook).__module__).partition(".")[0] == "torch"


def _silence(*_, **__) -> None:
    """In the place of a hook that only looks on: it has seen the first evaluation."""


def _substitute(stack: ExitStack, registry: dict, key: int | str, value: Callable | Tensor) -> None:
    stack.callback(registry.__setitem__, key, registry[key])
    registry[key] = value


def _was_exchanged(now: Tensor | None, then: Tensor) -> bool:
    """Whether ``then`` gave way to ``now``, as after functional_call, or in a forward that assigns to self.buffer.

    Tensors of a subclass are those of FSDP, which exchanges them itself.
    """
    return now is not then and all(type(t) in (Tensor, nn.Parameter) for t in (now, then))


def _rng_state(device: torch.device) -> Tensor:
    return torch.get_rng_state() if device.type == "cpu" else torch.cuda.get_rng_state(device)


def _equal(state: Tensor, other: Tensor) -> bool:
    """Whether two states of a generator are the same. They are real tensors, under a mode of fake ones, too."""
    with torch._C._DisableTorchDispatch():
        return torch.equal(state, other)


def _set_rng_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.cuda.set_rng_state(state, device)
