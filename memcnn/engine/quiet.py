"""The short replay of a branch that consists of PyTorch's own quiet layers, as most branches do.

``Replay`` allows for everything that a module may do. For small tensors that takes longer than the layers themselves. A
module tree is *quiet* if all of this holds:

1. Every module is one of ``QUIET``, or a subclass of ``nn.Sequential`` that defines nothing but its constructor. Such
   layers draw no random numbers, and set no attribute, parameter or module in their forward function.
2. No instance has an attribute that its class does not give it, such as another ``forward`` or a compiled call.
3. No hook is registered, neither on a module nor, for forward, globally, and no mode of ``torch.overrides`` or
   ``torch.utils._python_dispatch`` is active, since these may do anything.
4. All parameters are ordinary ones. The only buffers are running statistics of BatchNorms in training mode: they are
   moved by the first evaluation and ignored by the second.

Whoever knows that a container of his own only calls its children says so with ``quiet_container``.

``Survey`` walks the tree, notes what it finds, and stops at the first module that is not quiet: ``Replay`` then takes
over. A ``Snapshot`` holds the surveys of one tree or of several that are evaluated one after the other, as flat lists.
The last snapshot is kept. Before each evaluation, the second ones too, all that it found is compared with the trees as
they are now, so that nothing can be stale. If all is as it was, as it nearly always is, the second evaluation has
nothing to check or to restore, except that the BatchNorms must not move their statistics again. If anything differs,
``QuietReplay`` hands over to a ``Replay`` of the surveys, which restores or refuses what has changed.
"""

import weakref
from collections.abc import Callable, Sequence
from itertools import chain
from operator import is_, itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from memcnn.engine.again import Again, restore_autocast
from memcnn.engine.attributes import BASE_ATTRIBUTES, known_class
from memcnn.engine.identity import has_no_version
from memcnn.engine.replay import Replay
from memcnn.engine.torch_private import is_observed

NORMS = frozenset({nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d})

QUIET = NORMS | {
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.Linear, nn.Bilinear, nn.Identity, nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.Upsample),
    *(nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm),
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus),
    *(nn.Tanh, nn.Sigmoid, nn.LogSigmoid, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Softsign, nn.Softmax, nn.GLU),
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d),
    *(nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReplicationPad1d, nn.ReplicationPad2d),
}
"""Layers that draw no random numbers and keep no state but running statistics."""

_ORDINARY = frozenset({Tensor, nn.Parameter})
PARTS = (
    *("training", "_modules", "_parameters", "_buffers"),
    *("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"),
)
_PLAIN_DEFINITIONS = frozenset(vars(type("Plain", (nn.Sequential,), {}))) | {
    *("__init__", "__annotations__", "__annotate_func__", "__annotations_cache__", "__firstlineno__"),
    "__static_attributes__",
}
"""What a subclass of ``nn.Sequential`` may define without changing what it computes."""

Names = tuple[str, ...]
Marks = list[tuple[bool, int, int]]

_kinds: dict[type, tuple[int, Names, Callable, bool]] = {}
"""For each class seen: number of attributes of an instance (-1: it is not quiet), names of the watched attributes, what
gets ``PARTS`` and their values, and whether it is a BatchNorm."""

_snapshots: "weakref.WeakKeyDictionary[nn.Module, dict[bool, Snapshot | int]]" = weakref.WeakKeyDictionary()
"""By first tree, the last snapshot of this tree alone (False) and of several (True). In place of a snapshot, the number
of the tree that was not quiet."""


class Survey:
    """A quiet module tree as it is now.

    The root itself is not held, so that a survey can be kept for it as long as it lives.

    Attributes:
        is_quiet: False if a module is not quiet. The lists then end there.
        attributes: the attributes of each module, the root first. A shared layer stands there as often as it is used;
            a shared container is not quiet.
        modules: the modules below the root, in the same order.
        containers: registry and children of each container.
        norms: attributes of each BatchNorm with running statistics, with registry, names and tensors of these.
        owned: registry, name and tensor of each parameter in turn.
        parts: for each module, the names of its watched attributes, and its ``PARTS`` and their values.
    """

    __slots__ = ("attributes", "containers", "is_quiet", "modules", "norms", "owned", "parts")

    def __init__(self, root: nn.Module):
        self.modules: list[nn.Module] = []
        self.attributes: list[dict] = []
        self.containers: list[tuple[dict, list[nn.Module]]] = []
        self.norms: list[tuple[dict, dict, list[tuple[str, Tensor]]]] = []
        self.owned: list[Any] = []
        self.parts: list[tuple[Names, tuple]] = []
        self.is_quiet = self._note(root)

    def _note(self, root: nn.Module) -> bool:
        """Note all modules of the tree. Return whether they are quiet; if not, stop at the first that is not."""
        modules, known = self.modules, set()
        for module in chain((root,), modules):  # which grows
            if module is None:
                return False
            own = vars(module)
            size, names, get, is_norm = _kinds.get(type(module)) or _kind(module)
            if size != len(own):
                return False
            values = get(own)
            training, children, parameters, buffers, *hooks = values[: len(PARTS)]
            if any(hooks):
                return False
            self.attributes.append(own)
            self.parts.append((names, values))
            if children:
                if id(children) in known:
                    return False  # a container that is shared, or that contains itself
                known.add(id(children))
                content = [*children.values()]
                self.containers.append((children, content))
                modules += content
            for name, parameter in parameters.items():
                if parameter is not None:
                    if type(parameter) not in _ORDINARY:
                        return False
                    self.owned += (parameters, name, parameter)
            if buffers:
                if not is_norm or len(buffers) != 3 or parameters["weight"] is None:
                    return False
                mean, variance, count = buffers.values()
                if mean is not None or variance is not None or count is not None:
                    ordinary = type(mean) is Tensor and type(variance) is Tensor and type(count) is Tensor
                    if not (ordinary and training and own["track_running_stats"]):
                        return False
                    self.norms.append((own, buffers, [*buffers.items()]))
        return True


class Snapshot:
    """Quiet module trees as they are now.

    Attributes:
        surveys: that of each tree.
        parameters: those of all trees. A shared parameter stands there as often as it is used.
        running_statistics: by id, the running statistics of BatchNorms. The values do not matter.
        plan: what others derive from the snapshot, kept with it.
    """

    plan: Any = None

    def __init__(self, roots: Sequence[nn.Module], surveys: Sequence[Survey]):
        self.surveys = surveys
        self.parameters: list[Tensor] = [p for survey in surveys for p in survey.owned[2::3]]
        self.running_statistics = {
            id(b): 0 for survey in surveys for _, _, content in survey.norms for _, b in content[:2]
        }
        # all that follows is compared in ``is_unchanged``
        self.roots = [*map(vars, roots)]
        self.modules = [module for survey in surveys for module in survey.modules]
        self.types = [*map(type, chain(roots, self.modules))]
        self.attributes = [own for survey in surveys for own in survey.attributes]
        self.values = [own.copy() for own in self.attributes]
        places = [(own, name) for own in self.attributes for name in PARTS[1:]]
        self.filled = [(own, name) for own, name in places if own[name]]
        self.registries = [own[name] for own, name in self.filled]
        self.empty = [own[name] for own, name in places if not own[name]]
        self.things = [*chain.from_iterable(map(dict.values, self.registries))]

    def is_unchanged(self, roots: Sequence[nn.Module], marks: Marks | None = None) -> bool:
        """Return whether a new snapshot of ``roots`` would find the same and, if ``marks`` are given, those marks.

        Dictionaries of attributes are compared as a whole, where Python takes identical objects for equal. A registry
        that holds anything must also be the same object. Empty ones need not be: they are equal as long as both are.
        """
        try:
            return (
                len(roots) == len(self.roots)
                and all(map(is_, map(vars, roots), self.roots))
                and [*map(type, chain(roots, self.modules))] == self.types
                and all(map(is_, [own[name] for own, name in self.filled], self.registries))
                and self.attributes == self.values
                and not any(self.empty)
                and len(things := [*chain.from_iterable(map(dict.values, self.registries))]) == len(self.things)
                and all(map(is_, things, self.things))
                and (
                    marks is None
                    or [(p.requires_grad, p._version, p.untyped_storage()._cdata) for p in self.parameters] == marks
                )
            )
        except (KeyError, RuntimeError):  # a registry was deleted, or an attribute is a tensor of several numbers
            return False


def snapshot(roots: Sequence[nn.Module]) -> Snapshot | None:
    """Return the snapshot of module trees as they are now, or None if one of them is not quiet."""
    if (kept := _snapshots.get(roots[0])) is None:
        kept = _snapshots[roots[0]] = {}
    last = kept.get(len(roots) > 1)
    if isinstance(last, Snapshot):
        if last.is_unchanged(roots):
            return last
    elif last is not None and last < len(roots) and not Survey(roots[last]).is_quiet:
        return None
    surveys: list[Survey] = []
    for root in roots:
        found = Survey(root)
        if not found.is_quiet or any(map(has_no_version, found.owned[2::3])):  # which ``Replay`` refuses
            kept[len(roots) > 1] = len(surveys)
            return None
        surveys.append(found)
    new = Snapshot(roots, surveys)
    if all(root._modules for root in roots):  # else a list of the snapshot may hold the root itself
        kept[len(roots) > 1] = new
    return new


def bare_layers(root: nn.Module, *, tracking: bool) -> list[nn.Module]:
    """Return copies of the layers of a quiet tree, in the order in which they run.

    All containers of a quiet tree are ``nn.Sequential``. A copy has the tensors of its layer as plain attributes, where
    Python finds them ten times as fast as in the registries of a module, and has none of the hooks. It stands for the
    layer as long as the snapshot of the tree is unchanged.

    Args:
        root: the tree.
        tracking: whether BatchNorms move their running statistics.
    """
    if isinstance(root, nn.Sequential):
        return [layer for child in root for layer in bare_layers(child, tracking=tracking)]
    bare = object.__new__(type(root))
    vars(bare).update(vars(root) | root._parameters | root._buffers)
    if not tracking and type(root) in NORMS:
        vars(bare)["track_running_stats"] = False
    return [bare]


def quiet_container(kind: type[nn.Sequential]) -> type[nn.Sequential]:
    """Declare that a subclass of ``nn.Sequential`` computes what its base does, though it defines methods. A decorator.

    Such a class must draw no random numbers and set no attributes in its forward function.
    """
    _kinds[kind] = BASE_ATTRIBUTES, (), itemgetter(*PARTS), False
    return kind


def _kind(module: nn.Module) -> tuple[int, Names, Callable | None, bool]:
    """Return the entry of the module's class in ``_kinds``, made if need be."""
    kind = type(module)
    entry: tuple[int, Names, Callable, bool] = -1, (), itemgetter(*PARTS), False
    if kind in QUIET:
        if (known := known_class(module)) is None:
            return entry  # this instance is not quiet, another one may be
        is_norm = kind in NORMS
        names = known[1] + (("track_running_stats",) if is_norm else ())
        entry = known[0], names, itemgetter(*PARTS, *names), is_norm
    elif issubclass(kind, nn.Sequential):
        between = kind.__mro__[: kind.__mro__.index(nn.Sequential)]
        if all(vars(base).keys() <= _PLAIN_DEFINITIONS for base in between):
            entry = BASE_ATTRIBUTES, (), itemgetter(*PARTS), False
    _kinds[kind] = entry
    return entry


class QuietReplay:
    """Replays the evaluation of quiet module trees: ``Replay``, as far as a step needs it.

    Args:
        modules: the roots of the trees.
        inputs: the tensors that they are evaluated on.
        found: the trees before the first evaluation.
    """

    hooks, generators = None, ()
    watch = None
    """There is nothing to watch in the first evaluation, and nothing to note after it."""
    sets_parameters = is_initialised_by_it = False

    def __init__(self, modules: Sequence[nn.Module], inputs: Sequence[Tensor], found: Snapshot):
        self.modules, self.found = modules, found
        self.marks = [(p.requires_grad, p._version, p.untyped_storage()._cdata) for p in found.parameters]
        """For each parameter, whether it requires a gradient, its version and its storage."""
        self.running_statistics = found.running_statistics
        self.untracked: dict[Any, None] = {}
        kind = inputs[0].device.type
        self.autocast = [
            (kind, torch.get_autocast_dtype(kind), True, torch.is_autocast_cache_enabled())
            if torch.is_autocast_enabled(kind)
            else (kind, None, False, True)
            for kind in (("cpu",) if kind == "cpu" else ("cpu", kind))
        ]
        self.changed: Replay | None = None
        """Takes over for a second evaluation if the tree has changed since the first."""

    @property
    def name(self) -> str:
        return type(self.modules[0]).__name__

    def again(self, *, compare: bool = True) -> Again:
        """Return the context of a further evaluation, as ``Replay`` does."""
        return Again(self, compare)

    def evaluated(self) -> None:
        """Note nothing: a quiet module changes nothing that a further evaluation has to know."""

    def check_unchanged(self, when: str, fix: str) -> None:
        """Survey the tree again. If it has changed, raise a RuntimeError or prepare to restore it."""
        self.changed = None
        if is_observed() or not self.found.is_unchanged(self.modules, self.marks):
            self.changed = self._full_replay()
            self.changed.check_unchanged(when, fix)

    def restore(self, undo: list[tuple]) -> None:
        """Set everything as the first evaluation found it. ``undo`` receives the calls that undo this."""
        if self.changed is not None:
            self.changed.restore(undo)
            return
        restore_autocast(self.autocast, undo)
        for survey in self.found.surveys:
            for own, _, _ in survey.norms:
                undo.append((own.__setitem__, "track_running_stats", own["track_running_stats"]))
                own["track_running_stats"] = False

    def _full_replay(self) -> Replay:
        """Return the ``Replay`` that would have been made before the first evaluation."""
        replay = Replay(nn.Identity(), (), preserve_rng_state=False)
        replay.name, replay.hooks, replay.autocast = self.name, None, self.autocast
        replay.modes.clear()
        marks = iter(self.marks)
        for root, then in zip(self.modules, self.found.surveys, strict=True):
            modules = [root, *then.modules]
            replay.modes += [(module, values[0]) for module, (_, values) in zip(modules, then.parts, strict=True)]
            replay.attributes += [
                (own, names, values[len(PARTS) :])
                for own, (names, values) in zip(then.attributes, then.parts, strict=True)
                if names
            ]
            replay.children += then.containers
            for registry, name, p in zip(then.owned[::3], then.owned[1::3], then.owned[2::3], strict=True):
                requires_grad, *identity = next(marks)
                replay.parameters.append((registry, name, p, requires_grad, tuple(identity)))
                replay.unchanged.append(("parameter", name, p, tuple(identity)))
            replay.buffers += [(registry, name, b) for _, registry, content in then.norms for name, b in content]
            norms = {id(own) for own, _, _ in then.norms}
            replay.untracked |= {module: None for module in modules if id(vars(module)) in norms}
        return replay


def replay_of(module: nn.Module, inputs: Sequence[Tensor], preserve_rng_state: bool) -> Replay | QuietReplay:
    """Return what replays the evaluation of ``module`` on ``inputs``: the short replay if the module is quiet."""
    for x in inputs:
        if type(x) not in _ORDINARY or not (x.is_cpu or x.is_cuda):
            break
    else:
        if inputs and not is_observed() and (found := snapshot((module,))) is not None:
            return QuietReplay((module,), inputs, found)
    return Replay(module, inputs, preserve_rng_state)
