"""The short replay of a branch that consists of PyTorch's own quiet layers, as most branches do.

``Replay`` allows for everything that a module may do. For small tensors that takes longer than the layers themselves. A
module tree is *quiet* if all of this holds:

1. Every module is one of ``QUIET``, or a subclass of ``nn.Sequential`` that defines nothing but its constructor. Such
   layers draw no random numbers, and set no attribute, parameter or module in their forward function.
2. No instance has an attribute that its class does not give it, such as another ``forward`` or a compiled call.
3. No forward hook is registered, neither on a module nor globally, and no mode of ``torch.overrides`` or
   ``torch.utils._python_dispatch`` is active, since these may do anything.
4. All parameters are ordinary ones. The only buffers are running statistics of BatchNorms in training mode: they are
   moved by the first evaluation and ignored by the second.

Whoever knows that a container of his own only calls its children says so with ``quiet_container``.

``Survey`` walks the tree before each evaluation, notes what it finds in a few flat lists, and stops at the first module
that is not quiet: ``Replay`` then takes over. Nothing is cached for a tree, so that nothing can be stale. Nothing needs
to be noted after the first evaluation. Before the second one the tree is surveyed again. If both surveys agree, as they
nearly always do, there is nothing to check or to restore, except that the BatchNorms must not move their statistics
again. If they differ in anything, ``QuietReplay`` hands over to a ``Replay`` of the first survey, which restores or
refuses what has changed.
"""

from collections.abc import Sequence
from itertools import chain
from operator import is_, itemgetter

import torch
from torch import Tensor, nn

from memcnn.engine.again import Again, restore_autocast
from memcnn.engine.attributes import BASE_ATTRIBUTES, known_class
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
_PARTS = itemgetter("training", "_modules", "_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks")
_PLAIN_DEFINITIONS = frozenset(vars(type("Plain", (nn.Sequential,), {}))) | {
    *("__init__", "__annotations__", "__annotate_func__", "__annotations_cache__", "__firstlineno__"),
    "__static_attributes__",
}
"""What a subclass of ``nn.Sequential`` may define without changing what it computes."""

_kinds: dict[type, tuple[int, tuple[str, ...], bool]] = {}
"""For each class seen: number of attributes of an instance (-1: it is not quiet), names of the watched attributes,
and whether it is a BatchNorm."""


class Survey:
    """A quiet module tree as it is now.

    Attributes:
        is_quiet: False if a module is not quiet. The lists then end there.
        modules: all modules, a shared layer as often as it is used. A shared container is not quiet.
        states: mode of each or, if it has watched attributes, their names, the mode and their values.
        containers: registry and children of each container.
        norms: BatchNorms with running statistics, with registry, names and tensors of these.
        things: containers, children and buffers, in order.
        owned: registry, name and tensor of each parameter in turn.
        marks: ``requires_grad``, version and storage of each parameter in turn.
    """

    __slots__ = ("containers", "is_quiet", "marks", "modules", "norms", "owned", "states", "things")

    def __init__(self, root: nn.Module):
        self.modules = modules = [root]
        self.states = states = []
        self.containers, self.norms, self.things = [], [], []
        self.owned = owned = []
        self.marks = marks = []
        self.is_quiet = False
        for module in modules:  # which grows
            if module is None:
                return
            own = vars(module)
            size, names, is_norm = _kinds.get(type(module)) or _kind(module)
            training, children, parameters, buffers, hooks, pre_hooks = _PARTS(own)
            if size != len(own) or hooks or pre_hooks:
                return
            states.append((names, training, *map(own.get, names)) if names else training)
            if children:
                if self.containers and any(children is known for known, _ in self.containers):
                    return  # a container that is shared, or that contains itself
                content = [*children.values()]
                self.containers.append((children, content))
                self.things += (children, *content)
                modules += content
            for name, parameter in parameters.items():
                if parameter is not None:
                    if type(parameter) not in _ORDINARY:
                        return
                    owned += (parameters, name, parameter)
                    try:
                        marks += (parameter.requires_grad, parameter._version, parameter.untyped_storage()._cdata)
                    except RuntimeError:  # made under inference_mode: ``Replay`` refuses it
                        return
            if buffers:
                if not is_norm or len(buffers) != 3 or parameters["weight"] is None:
                    return
                mean, variance, count = buffers.values()
                if mean is not None or variance is not None or count is not None:
                    ordinary = type(mean) is Tensor and type(variance) is Tensor and type(count) is Tensor
                    if not (ordinary and training and own["track_running_stats"]):
                        return
                    self.things += (buffers, mean, variance, count)
                    self.norms.append((module, buffers, [*buffers.items()]))
        self.is_quiet = True

    def equals(self, other: "Survey") -> bool:
        """Return whether nothing differs between two surveys of one tree."""
        return (
            self.is_quiet
            and self.states == other.states
            and self.marks == other.marks
            and len(self.things) == len(other.things)
            and len(self.owned) == len(other.owned)
            and all(
                map(is_, chain(self.modules, self.things, self.owned), chain(other.modules, other.things, other.owned))
            )
        )


def quiet_container(kind: type[nn.Sequential]) -> type[nn.Sequential]:
    """Declare that a subclass of ``nn.Sequential`` computes what its base does, though it defines methods. A decorator.

    Such a class must draw no random numbers and set no attributes in its forward function.
    """
    _kinds[kind] = BASE_ATTRIBUTES, (), False
    return kind


def _kind(module: nn.Module) -> tuple[int, tuple[str, ...], bool]:
    """Return the entry of the module's class in ``_kinds``, made if need be."""
    kind = type(module)
    entry = (-1, (), False)
    if kind in QUIET:
        if (known := known_class(module)) is None:
            return entry  # this instance is not quiet, another one may be
        is_norm = kind in NORMS
        entry = known[0], known[1] + (("track_running_stats",) if is_norm else ()), is_norm
    elif issubclass(kind, nn.Sequential):
        between = kind.__mro__[: kind.__mro__.index(nn.Sequential)]
        if all(vars(base).keys() <= _PLAIN_DEFINITIONS for base in between):
            entry = BASE_ATTRIBUTES, (), False
    _kinds[kind] = entry
    return entry


class QuietReplay:
    """Replays the evaluation of a quiet module tree: ``Replay``, as far as a step needs it.

    Args:
        module: the root of the tree.
        inputs: the tensors that it is evaluated on.
        survey: the tree before the first evaluation.
    """

    hooks, generators = None, ()
    watch = None
    """There is nothing to watch in the first evaluation, and nothing to note after it."""
    sets_parameters = is_initialised_by_it = False

    def __init__(self, module: nn.Module, inputs: Sequence[Tensor], survey: Survey):
        self.module, self.survey = module, survey
        self.running_statistics: dict[int, nn.Module] = {}
        for norm, _, ((_, mean), (_, variance), _) in survey.norms:
            self.running_statistics[id(mean)] = self.running_statistics[id(variance)] = norm
        self.untracked: dict[nn.Module, None] = {}
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
        return type(self.module).__name__

    def again(self, *, compare: bool = True) -> Again:
        """Return the context of a further evaluation, as ``Replay`` does."""
        return Again(self, compare)

    def check_unchanged(self, when: str, fix: str) -> None:
        """Survey the tree again. If it has changed, raise a RuntimeError or prepare to restore it."""
        self.changed = None
        if is_observed() or not Survey(self.module).equals(self.survey):
            self.changed = self._full_replay()
            self.changed.check_unchanged(when, fix)

    def restore(self, undo: list[tuple]) -> None:
        """Set everything as the first evaluation found it. ``undo`` receives the calls that undo this."""
        if self.changed is not None:
            self.changed.restore(undo)
            return
        restore_autocast(self.autocast, undo)
        for norm, _, _ in self.survey.norms:
            own = vars(norm)
            undo.append((own.__setitem__, "track_running_stats", own["track_running_stats"]))
            own["track_running_stats"] = False

    def _full_replay(self) -> Replay:
        """Return the ``Replay`` that would have been made before the first evaluation."""
        then, replay = self.survey, Replay(nn.Identity(), (), preserve_rng_state=False)
        replay.module, replay.name, replay.hooks, replay.autocast = self.module, self.name, None, self.autocast
        replay.modes.clear()
        for module, state in zip(then.modules, then.states, strict=True):
            names, training, *values = state if isinstance(state, tuple) else ((), state)
            replay.modes.append((module, training))
            replay.attributes.append((vars(module), names, tuple(values)))
        replay.children = then.containers
        owned, marks = then.owned, then.marks
        identities = list(zip(marks[1::3], marks[2::3], strict=True))
        replay.parameters = list(zip(owned[::3], owned[1::3], owned[2::3], marks[::3], identities, strict=True))
        replay.unchanged = [("parameter", name, p, mark) for _, name, p, _, mark in replay.parameters]
        replay.buffers = [(registry, name, b) for _, registry, content in then.norms for name, b in content]
        replay.untracked = {norm: None for norm, _, _ in then.norms}
        return replay


def replay_of(module: nn.Module, inputs: Sequence[Tensor], preserve_rng_state: bool) -> Replay | QuietReplay:
    """Return what replays the evaluation of ``module`` on ``inputs``: the short replay if the module is quiet."""
    for x in inputs:
        if type(x) not in _ORDINARY or not (x.is_cpu or x.is_cuda):
            break
    else:
        if inputs and not is_observed() and (survey := Survey(module)).is_quiet:
            return QuietReplay(module, inputs, survey)
    return Replay(module, inputs, preserve_rng_state)
