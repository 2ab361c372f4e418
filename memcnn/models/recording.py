"""Record the operations of a block's own ``forward`` with ``torch.fx``, each child module as one operation.

``torch.fx`` calls ``forward`` without values of tensors. Three things that it loses are recorded as well: custom
autograd functions with their backward, operations under ``torch.no_grad()``, and which keyword arguments were None.
What would be lost is refused: ``torch.autocast``, random numbers, and attributes or buffers that ``forward`` changes.
"""

import copy
import inspect
import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd import Function
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import CheckpointFunction

__all__ = ["CustomFunction", "NotResidual", "changes_restored", "detached", "record"]

_CONTAINERS = (dict, list, set, deque)


class NotResidual(Exception):
    """A block is not residual, or cannot be shown to be; the message is the reason."""


@dataclass(frozen=True)
class CustomFunction:
    """A custom autograd function as one operation of a graph, which keeps its backward.

    Args:
        function: the class that the user derived from ``torch.autograd.Function``.
    """

    function: type[Function]

    @property
    def __name__(self) -> str:
        return self.function.__name__

    def __call__(self, *args: Any) -> Any:
        return self.function.apply(*args)


def detached(value: Any) -> Any:
    """Return the result of an operation under ``torch.no_grad()``: without the graph of its tensors."""
    return tree_map_only(Tensor, Tensor.detach, value)


class _OwnForward(fx.Tracer):
    """Records the operations of one block. Every child module is one operation, whatever it does."""

    proxy_buffer_attributes = True

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m is not self.block

    def create_proxy(self, kind: str, *args: Any, **kwargs: Any) -> fx.Proxy:
        proxy = super().create_proxy(kind, *args, **kwargs)
        if kind.startswith("call") and not torch.is_grad_enabled():
            return super().create_proxy("call_function", detached, (proxy,), {})
        return proxy


def record(block: nn.Module, keywords: Mapping[str, bool], training: bool) -> tuple[fx.Graph, list[str]]:
    """Return the operations of the block in training or evaluation mode, and the names of attributes that it read.

    Args:
        block: the block. The names of its children and parameters in the graph begin with "block.".
        keywords: names of keyword arguments, and whether each has a value; the others are None.
        training: the mode.

    Raises:
        NotResidual: ``forward`` cannot be recorded, or does what the record would lose.
    """
    modes = [(module, module.training) for module in block.modules()]
    block.train(training)
    before = random.getstate(), torch.get_rng_state()
    try:
        with torch.random.fork_rng(), torch.enable_grad(), changes_restored(block) as changes:
            tracer, call = _OwnForward(block), _call_of(block, keywords)
            with _custom_functions_recorded(tracer), _autocast_refused(), _noted_attributes(block) as attributes:
                graph, error = _traced(tracer, call)
            if changed := changes():
                raise NotResidual(changed) from error
            if error is not None:
                raise error
            if random.getstate() != before[0] or not torch.equal(torch.get_rng_state(), before[1]):
                raise NotResidual(
                    "its forward draws random numbers itself: use a child module, such as nn.Dropout, for that"
                )
    finally:
        for module, mode in modes:
            module.training = mode
    if any(node.op == "get_attr" and not str(node.target).startswith("block.") for node in graph.nodes):
        raise NotResidual("its forward makes a tensor from numbers, which stays on one device: register it as a buffer")
    return graph, attributes


def _traced(tracer: _OwnForward, call: nn.Module) -> tuple[fx.Graph, NotResidual | None]:
    """Return the graph, or an empty one and the reason why there is none."""
    try:
        return tracer.trace(call), None
    except NotResidual as reason:
        return fx.Graph(), reason
    except Exception as error:  # whatever the block raises when it is given no values
        what = " ".join(str(error).split(". ")[0].split())
        refusal = NotResidual(
            f"torch.fx cannot trace its forward without values of tensors: {type(error).__name__}: {what}"
        )
        refusal.__cause__ = error
        return fx.Graph(), refusal


def _call_of(block: nn.Module, keywords: Mapping[str, bool]) -> nn.Module:
    """Return a module that calls the block with x and these keyword arguments, and leaves the others out."""
    takes = inspect.signature(block.forward).parameters
    if unknown := [name for name in keywords if name not in takes]:
        raise NotResidual(f"its forward takes no keyword argument {unknown[0]!r}")
    given = "".join(f", {name}" for name, has_value in keywords.items() if has_value)
    passed = "".join(f", {name}={name if has_value else None}" for name, has_value in keywords.items())
    names: dict[str, Any] = {}
    exec(f"def forward(self, x{given}):\n    return self.block(x{passed})", names)
    call = type("Call", (nn.Module,), {"forward": names["forward"]})()
    call.block = block
    return call


@contextmanager
def changes_restored(block: nn.Module) -> Iterator[Callable[[], str]]:
    """Restore the block's attributes, buffers and containers afterwards, unless it is lazy and was initialised.

    Yields:
        a function that returns the reason to refuse the block if they have changed, otherwise an empty string. New
        attributes do not count, so that a block may set them in its first call.
    """
    cls, saved = type(block), [(name, held, copy.copy(held)) for name, held in _containers(vars(block))]

    def changes() -> str:
        attributes = saved[0][2]
        named = [
            f"sets its attribute {n!r}" for n, value in vars(block).items() if attributes.get(n, value) is not value
        ]
        for name, container, before in saved[1:]:
            if name == "_buffers":
                named += [f"changes its buffer {n!r}" for n, b in before.items() if container.get(n) is not b]
            elif not _same(container, before):
                named.append(f"changes its attribute {name!r}")
        return f"its forward {named[0]}, which the residual functions would not do" if named else ""

    try:
        yield changes
    finally:
        for _, container, before in saved:
            if type(block) is cls and not _same(container, before):
                container.clear()
                (container.extend if hasattr(container, "extend") else container.update)(before)


def _containers(attributes: dict[str, Any]) -> list[tuple[str, Any]]:
    """Return the attributes and all containers in them, each with the name of the attribute that holds it."""
    found: list[tuple[str, Any]] = [("", attributes)]
    seen = {id(attributes)}
    for name, container in found:  # which grows
        for key, value in container.items() if isinstance(container, dict) else enumerate(container):
            if isinstance(value, _CONTAINERS) and id(value) not in seen:
                seen.add(id(value))
                found.append((name or str(key), value))
    return found


def _same(a: Any, b: Any) -> bool:
    """Return whether two containers hold the same objects."""
    if isinstance(a, set):
        return a == b
    if isinstance(a, dict):
        return list(a) == list(b) and all(map(is_, a.values(), b.values()))
    return len(a) == len(b) and all(map(is_, a, b))


@contextmanager
def _replaced(owner: type, name: str, value: object) -> Iterator[None]:
    original = vars(owner)[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def _custom_functions_recorded(tracer: _OwnForward) -> Any:
    """Record ``Function.apply`` as an operation: ``torch.fx`` would record its forward, and lose its backward."""

    def apply(cls: type[Function], *args: Any) -> Any:
        if cls is CheckpointFunction:  # its arguments: function, preserve_rng_state, and those of the function
            return args[0](*args[2:])
        return tracer.create_proxy("call_function", CustomFunction(cls), args, {})

    return _replaced(Function, "apply", classmethod(apply))


def _autocast_refused() -> Any:
    def enter(self: torch.autocast) -> None:
        raise NotResidual(
            "its forward enters torch.autocast, which its residual functions would not: move the operations under "
            "autocast to the forward of a child module"
        )

    return _replaced(torch.autocast, "__enter__", enter)


@contextmanager
def _noted_attributes(block: nn.Module) -> Iterator[list[str]]:
    """Yield a list of the names of plain attributes with a value that are read meanwhile."""
    cls: Any = type(block)
    read, plain = dict[str, None](), set(vars(block)) - set(vars(nn.Module()))

    def note(self: nn.Module, name: str) -> Any:
        value = cls.__getattribute__(self, name)
        if name in plain and self is block and value is not None and not callable(value):
            read[name] = None
        return value

    names: list[str] = []
    try:
        noting = type(cls)(cls.__name__, (cls,), {"__getattribute__": note, "__module__": cls.__module__})
    except Exception:  # a class may refuse to be derived from; then nothing is noted
        noting = cls
    object.__setattr__(block, "__class__", noting)
    try:
        yield names
    finally:
        object.__setattr__(block, "__class__", cls)
        names.extend(read)
