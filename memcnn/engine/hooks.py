"""Forward hooks of the user: a second evaluation needs the changes that they made, but must not call the others again.

1. A hook that changes nothing is called in the first evaluation only.
2. A hook that replaced a value or changed one in place is called in a second evaluation too, even if it was removed
   since.
3. A hook that was registered after the first evaluation is not called in a second one.
4. The hooks of PyTorch itself (spectral norm, FSDP) are called as they are registered.
5. Other threads may call the same modules in the meantime. They find every hook as it is registered.
"""

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from memcnn.engine.checksum import fingerprint, has_fingerprint
from memcnn.engine.torch_private import GLOBAL_FORWARD_HOOKS

Registry = tuple[dict[int, Callable], dict[int, bool]]
"""Hooks by key, and the keys of the hooks that receive keyword arguments."""


def hook_registries(modules: Sequence[tuple[nn.Module, bool]]) -> list[Registry]:
    """Return the registries that are not empty, of forward hooks and pre-hooks that run when the modules are called."""
    found = [registry for registry in GLOBAL_FORWARD_HOOKS if registry[0]]
    for module, _ in modules:
        if module._forward_pre_hooks:
            found.append((module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs))
        if module._forward_hooks:
            found.append((module._forward_hooks, module._forward_hooks_with_kwargs))
    return found


class Hooks:
    """The hooks that run in the first evaluation of a module, and what each of them does there."""

    def __init__(self, registries: Sequence[Registry]):
        self.seen = [
            (registry, key, _original(hook), key in with_kwargs)
            for registry, with_kwargs in registries
            for key, hook in registry.items()
        ]
        self.registries = registries
        self.changing: dict[int, Callable] = {}
        """The hooks that changed a value, by id. A second evaluation calls them too."""
        self.in_place: list[Callable] = []
        """The hooks in ``changing`` that changed a value in place."""
        self.suspects: list[tuple[Callable, Tensor, Tensor]] = []
        """Hooks, each with the fingerprints of a GPU tensor before and after the call. Backward compares these."""

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Return the context of the first evaluation. It notes which hooks change a value."""
        watched = []
        for registry, _ in self.registries:
            for key, hook in registry.items():
                if not _belongs_to_torch(hook):
                    watched.append((registry, key, hook, _Watched(self, hook)))
        for registry, key, _, wrapper in watched:
            registry[key] = wrapper
        try:
            yield
        finally:
            for registry, key, hook, wrapper in watched:
                if registry.get(key) is wrapper:  # else it has removed itself
                    registry[key] = hook

    def call(self, hook: Callable, args: tuple, kwargs: dict) -> object:
        """Call the hook and note whether it changes a value."""
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and not t.is_inference()]
        versions = [t._version for t in tensors]
        before = [(t, fingerprint(t)) for t in tensors if has_fingerprint(t)]
        result = hook(*args, **kwargs)
        original = _original(hook)
        in_place = versions != [t._version for t in tensors]
        if not in_place and result is None:
            pairs = [(then, fingerprint(t)) for t, then in before]
            in_place = any(then != now for then, now in pairs if not now.is_cuda)
            self.suspects += [(original, then, now) for then, now in pairs if now.is_cuda]
        if in_place:
            self.in_place.append(original)
        if in_place or result is not None:
            self.changing[id(original)] = original
        return result

    def check(self) -> None:
        """Raise a RuntimeError if a hook has changed a value on a GPU in a way that ``call`` could not see."""
        suspects, self.suspects = self.suspects, []
        for hook, then, now in suspects:
            if then != now:
                raise RuntimeError(
                    f"the forward hook {name_of(hook)} changed the values of a tensor in a way that "
                    "PyTorch does not count (.data, or a kernel of its own), so that it was not called "
                    "in the recomputation: let it return a new tensor"
                )


def restore_hooks(then: Hooks | None, registries: list[Registry], undo: list[tuple]) -> None:
    """Set the hooks in ``registries`` for a second evaluation. ``undo`` receives the calls that undo this."""
    if then is not None:
        then.check()
        registries += [other for other in then.registries if not any(other[0] is known for known, _ in registries)]
    for registry, with_kwargs in registries:
        seen = [(key, hook, keywords) for other, key, hook, keywords in then.seen if other is registry] if then else ()
        _exchange(registry, _for_second_evaluation(then, registry, seen), undo)
        for key, _, keywords in seen:
            if keywords and key not in with_kwargs:
                undo.append((with_kwargs.pop, key, None))
                with_kwargs[key] = True


def _for_second_evaluation(then: Hooks | None, registry: dict, seen: Sequence[tuple[int, Callable, bool]]) -> dict:
    """Return the hooks by key that a second evaluation finds in ``registry``.

    Args:
        then: the hooks of the first evaluation, None if there were none.
        registry: the registry as it is now.
        seen: key, hook and whether it receives keyword arguments, of each hook that the first evaluation found there.
    """
    hooks, thread = {}, threading.get_ident()
    for key, hook, _ in seen:
        if key not in registry:
            if id(hook) in then.changing:
                hooks[key] = _InThread(hook, thread)
        elif _belongs_to_torch(hook) or id(hook) in then.changing:
            hooks[key] = registry[key]
        else:
            hooks[key] = _NotInThread(registry[key], thread)
    for key, hook in registry.items():
        if key not in hooks:
            hooks[key] = hook if _belongs_to_torch(hook) else _NotInThread(hook, thread)
    return hooks


def _exchange(registry: dict, hooks: dict, undo: list[tuple]) -> None:
    """Set the content of ``registry`` to ``hooks``. ``undo`` receives the call that undoes this."""
    before = dict(registry)
    undo.append((_set, registry, before))
    _set(registry, hooks)


def _set(registry: dict, hooks: dict) -> None:
    if list(registry) == list(hooks):  # the same keys: another thread never finds the registry empty
        registry.update(hooks)
    else:
        registry.clear()
        registry.update(hooks)


class _Wrapper:
    """Takes the place of a hook in its registry during an evaluation."""

    def __init__(self, hook: Callable):
        self.hook = hook


class _Watched(_Wrapper):
    """Calls a hook through ``Hooks.call``, which notes whether it changes a value."""

    def __init__(self, hooks: Hooks, hook: Callable):
        super().__init__(hook)
        self.hooks = hooks

    def __call__(self, *args: Any, **kwargs: Any) -> object:
        return self.hooks.call(self.hook, args, kwargs)


class _InThread(_Wrapper):
    """Calls a hook in one thread only: a removed hook that the recomputation in this thread still needs."""

    def __init__(self, hook: Callable, thread: int):
        super().__init__(hook)
        self.thread = thread

    def __call__(self, *args: Any, **kwargs: Any) -> object:
        return self.hook(*args, **kwargs) if threading.get_ident() == self.thread else None


class _NotInThread(_InThread):
    """Calls a hook in all threads but one: the thread of a recomputation that must not call it."""

    def __call__(self, *args: Any, **kwargs: Any) -> object:
        return self.hook(*args, **kwargs) if threading.get_ident() != self.thread else None


def name_of(hook: Callable) -> str:
    """Return the name of the hook in the user's code, in quotes."""
    hook = unwrapped(hook)
    return repr(getattr(hook, "__qualname__", None) or type(hook).__qualname__)


def _original(hook: Callable) -> Callable:
    while isinstance(hook, _Wrapper):
        hook = hook.hook
    return hook


def unwrapped(hook: Callable) -> Callable:
    """Return the user's function, method or object that a hook calls, without partial functions around it."""
    hook = _original(hook)
    while isinstance(hook, functools.partial):
        hook = hook.func
    return hook


def _belongs_to_torch(hook: Callable) -> bool:
    hook = unwrapped(hook)
    return (getattr(hook, "__module__", None) or type(hook).__module__).partition(".")[0] == "torch"
