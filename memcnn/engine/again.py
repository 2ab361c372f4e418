"""The second evaluation as a context: restore what the first one saw, and undo that at the end."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from memcnn.engine.generators import check_drawn

if TYPE_CHECKING:
    from memcnn.engine.quiet import QuietReplay
    from memcnn.engine.replay import Replay


class ReplayContext:
    """The context of a further evaluation, which sees what the first one saw.

    Args:
        replay: what the first evaluation saw.
        check_generators: raise a RuntimeError if the generators do not end where the first evaluation left them.

    Attributes:
        undo: calls, each a function and its arguments. They are made in reverse order when the context ends.
    """

    def __init__(self, replay: "Replay | QuietReplay", check_generators: bool):
        self.replay, self.check_generators = replay, check_generators
        self.undo: list[tuple] = []

    def __enter__(self) -> None:
        self.replay.check_unchanged("between forward and backward", "call backward before it changes")
        try:
            self.replay.restore(self.undo)
        except BaseException:
            _undo_all(self.undo)
            raise

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None and self.check_generators and self.replay.generators:
                check_drawn(self.replay.name, self.replay.generators, self.replay.was_initialised_in_forward)
        finally:
            _undo_all(self.undo)
        if kind is None and self.replay.sets_parameters:
            self.replay.check_unchanged(
                "in every forward pass of its module", "modify it outside of forward, or only in the first pass"
            )


def _undo_all(undo: list[tuple]) -> None:
    """Make the calls, the last one first. If one raises, make the others all the same."""
    try:
        while undo:
            function, *arguments = undo.pop()
            function(*arguments)
    finally:
        if undo:
            _undo_all(undo)


def exchange(registry: dict, name: str, then: Tensor, undo: list[tuple]) -> None:
    """Register ``then`` again in place of what replaced it.

    ``functional_call`` and assignments such as ``self.buffer = x`` replace tensors. Tensors of a subclass are left
    alone: they belong to FSDP, which exchanges them itself. ``undo`` receives the call that undoes this.
    """
    now = registry.get(name)
    if type(then) in (Tensor, nn.Parameter) and (type(now) in (Tensor, nn.Parameter) or not isinstance(now, Tensor)):
        undo.append((registry.__setitem__, name, now) if name in registry else (registry.pop, name, None))
        registry[name] = then


def restore_autocast(states: Sequence[tuple[str, torch.dtype | None, bool, bool]], undo: list[tuple]) -> None:
    """Set autocast for each device type. ``undo`` receives the calls that undo this.

    Args:
        states: device type, dtype, whether autocast is enabled, and whether it caches weights, for each device type.
        undo: see ``ReplayContext``.
    """
    for kind, dtype, enabled, caches in states:
        if enabled or torch.is_autocast_enabled(kind):
            autocast = torch.autocast(kind, dtype, enabled, caches)
            autocast.__enter__()
            undo.append((autocast.__exit__, None, None, None))
