"""The short replay of a quiet branch: one that consists of simple layers of PyTorch, as most branches do.

``Replay`` allows for everything that a module may do. For small tensors that takes longer than the layers themselves. A
quiet branch (survey.py has the conditions) updates the running statistics of its BatchNorms and changes nothing else.
If the branch is as it was in the first evaluation, as it nearly always is, the second evaluation has nothing to check
or to restore, except that the BatchNorms must not update their statistics again. If anything differs, ``QuietReplay``
makes a ``Replay`` from the surveys, which restores what has changed or raises an error.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from memcnn.engine.again import ReplayContext, restore_autocast
from memcnn.engine.replay import Replay
from memcnn.engine.survey import ALWAYS_READ, ORDINARY, ParameterStates, Snapshot, take_snapshot
from memcnn.engine.torch_private import is_observed


class QuietReplay:
    """Replays the evaluation of quiet module trees. Has those attributes and methods of ``Replay`` that a step uses.

    Args:
        modules: the roots of the trees.
        inputs: the tensors that they are evaluated on.
        snapshot: the trees before the first evaluation.
    """

    hooks, generators = None, ()
    watch = None
    """There is nothing to watch in the first evaluation, and nothing to note after it."""
    sets_parameters = was_initialised_in_forward = False
    may_reuse = True

    def __init__(self, modules: Sequence[nn.Module], inputs: Sequence[Tensor], snapshot: Snapshot):
        self.modules, self.snapshot = modules, snapshot
        self.parameter_states: ParameterStates = [
            (p.requires_grad, p._version, p.untyped_storage()._cdata) for p in snapshot.parameters
        ]
        self.running_statistics = snapshot.running_statistics
        self.untracked: dict[Any, None] = {}
        kind = inputs[0].device.type
        self.autocast = [
            (kind, torch.get_autocast_dtype(kind), True, torch.is_autocast_cache_enabled())
            if torch.is_autocast_enabled(kind)
            else (kind, None, False, True)
            for kind in (("cpu",) if kind == "cpu" else ("cpu", kind))
        ]
        self.full_replay: Replay | None = None
        """Takes over for a second evaluation if the tree has changed since the first."""

    @property
    def name(self) -> str:
        return type(self.modules[0]).__name__

    def again(self, *, check_generators: bool = True) -> ReplayContext:
        """Return the context of a further evaluation, as ``Replay`` does."""
        return ReplayContext(self, check_generators)

    def evaluated(self) -> None:
        """Note nothing: a quiet module changes nothing that a further evaluation has to know."""

    def check_unchanged(self, when: str, fix: str) -> None:
        """Survey the tree again. If it has changed, raise a RuntimeError or prepare to restore it."""
        self.full_replay = None
        if is_observed() or not self.snapshot.is_unchanged(self.modules, self.parameter_states):
            self.full_replay = self._full_replay()
            self.full_replay.check_unchanged(when, fix)

    def restore(self, undo: list[tuple]) -> None:
        """Set everything as the first evaluation found it. ``undo`` receives the calls that undo this."""
        if self.full_replay is not None:
            self.full_replay.restore(undo)
            return
        restore_autocast(self.autocast, undo)
        for survey in self.snapshot.surveys:
            for own, _, _ in survey.batch_norms:
                undo.append((own.__setitem__, "track_running_stats", own["track_running_stats"]))
                own["track_running_stats"] = False

    def _full_replay(self) -> Replay:
        """Return the ``Replay`` that would have been made before the first evaluation."""
        # start from the replay of an empty module, and fill in what the surveys noted before the first evaluation
        replay = Replay(nn.Identity(), (), preserve_rng_state=False)
        replay.name, replay.hooks, replay.autocast = self.name, None, self.autocast
        replay.modes.clear()
        states = iter(self.parameter_states)
        for root, survey in zip(self.modules, self.snapshot.surveys, strict=True):
            modules = [root, *survey.modules]
            replay.modes += [(module, values[0]) for module, (_, values) in zip(modules, survey.values, strict=True)]
            replay.attributes += [
                (own, names, values[len(ALWAYS_READ) :])
                for own, (names, values) in zip(survey.attributes, survey.values, strict=True)
                if names
            ]
            replay.children += survey.containers
            for registry, name, p in survey.parameters:
                requires_grad, version, storage = next(states)
                replay.parameters.append((registry, name, p, requires_grad, (version, storage)))
                replay.unchanged.append(("parameter", name, p, (version, storage)))
            replay.buffers += [(registry, name, b) for _, registry, items in survey.batch_norms for name, b in items]
            batch_norms = {id(own) for own, _, _ in survey.batch_norms}
            replay.untracked |= {module: None for module in modules if id(vars(module)) in batch_norms}
        return replay


def replay_of(module: nn.Module, inputs: Sequence[Tensor], preserve_rng_state: bool) -> Replay | QuietReplay:
    """Return what replays the evaluation of ``module`` on ``inputs``: the short replay if the module is quiet."""
    for x in inputs:
        if type(x) not in ORDINARY or not (x.is_cpu or x.is_cuda):
            break
    else:
        if inputs and not is_observed() and (snapshot := take_snapshot((module,))) is not None:
            return QuietReplay((module,), inputs, snapshot)
    return Replay(module, inputs, preserve_rng_state)
