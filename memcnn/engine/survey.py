"""Module trees that consist of PyTorch's own quiet layers, and whether such a tree is still as it was.

A module tree is *quiet* if all of this holds:

1. Every module is one of ``QUIET``, or a subclass of ``nn.Sequential`` that defines nothing but its constructor. Such
   layers draw no random numbers, and set no attribute, parameter or module in their forward function.
2. No instance has an attribute that its class does not give it, such as another ``forward`` or a compiled call.
3. No hook is registered, neither on a module nor, for forward, globally, and no mode of ``torch.overrides`` or
   ``torch.utils._python_dispatch`` is active, since these may do anything. ``nn.Module.__call__`` is PyTorch's own.
4. All parameters are ordinary ones. The only buffers are running statistics of BatchNorms in training mode: they are
   moved by the first evaluation and ignored by the second.

Whoever knows that a container of his own only calls its children says so with ``quiet_container``.

``Survey`` walks one tree and stops at the first module that is not quiet. A ``Snapshot`` holds the surveys of one tree,
or of several that are evaluated one after the other, as flat lists. The last snapshot is kept. Before each evaluation,
the second ones too, all that it found is compared with the trees as they are now, so that nothing can be stale.
"""

import weakref
from collections.abc import Callable, Sequence
from itertools import chain
from operator import is_, itemgetter
from typing import Any

from torch import Tensor, nn

from memcnn.engine.attributes import BASE_ATTRIBUTES, known_class
from memcnn.engine.identity import has_no_version

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

ORDINARY = frozenset({Tensor, nn.Parameter})
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
                    if type(parameter) not in ORDINARY:
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
        self.running_statistics: dict[int, Any] = {
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
