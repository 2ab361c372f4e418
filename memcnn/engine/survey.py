"""Find out whether a module tree is quiet, that is, made of simple layers of PyTorch, and whether it has changed since.

An evaluation of a quiet tree changes nothing but running statistics, which its result does not depend on. A module tree
is *quiet* if all of this holds:

1. Every module is one of ``QUIET``, or a subclass of ``nn.Sequential`` that defines nothing but its constructor. Such
   layers draw no random numbers, and set no attribute, parameter or module in their forward function.
2. No instance has an attribute that its class lacks, such as a replaced ``forward`` or a compiled call.
3. No module has hooks. Callers also check ``torch_private.is_observed``: global forward hooks, modes of
   ``torch.overrides`` or ``torch.utils._python_dispatch``, and a patched ``nn.Module.__call__`` may do anything.
4. All parameters are ordinary ones. The only buffers are running statistics of BatchNorms in training mode. They are
   updated by the first evaluation; the second neither reads nor updates them.

If your container only calls its children, decorate its class with ``quiet_container``. If your layer has the attributes
of a layer of ``QUIET``, draws no random numbers and keeps no other state, name that layer in its class: ``stands_for =
nn.Conv2d``. The engine then treats its buffers and attributes as it does those of that layer. A norm must not read its
running statistics in training mode: in the second evaluation they may be uninitialised memory.

``Survey`` walks one tree and stops at the first module that is not quiet. A ``Snapshot`` holds the surveys of one tree,
or of several that are evaluated one after the other, as flat lists. The last snapshot is kept. Before each first and
second evaluation, ``is_unchanged`` compares the snapshot with the modules, so that it is never stale.
"""

import weakref
from collections.abc import Callable, Sequence
from itertools import chain
from operator import is_, itemgetter
from typing import Any, NamedTuple

from torch import Tensor, nn

from memcnn.engine.attributes import BASE_ATTRIBUTES, known_class, layer_of
from memcnn.engine.identity import has_no_version
from memcnn.engine.torch_private import SET_BY_COMPILER

BATCH_NORMS = frozenset({nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d})

QUIET = BATCH_NORMS | {
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
REGISTRIES = (
    *("_modules", "_parameters", "_buffers"),
    *("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"),
)
ALWAYS_READ = ("training", *REGISTRIES)
"""The attributes that are read from every module, before those that are watched in its class alone."""
_PLAIN_DEFINITIONS = frozenset(vars(type("Plain", (nn.Sequential,), {}))) | {
    *("__init__", "__annotations__", "__annotate_func__", "__annotations_cache__", "__firstlineno__"),
    "__static_attributes__",
}
"""Names that a subclass of ``nn.Sequential`` may define without changing its results."""

Names = tuple[str, ...]

ParameterStates = list[tuple[bool, int, int]]
"""For each parameter: ``requires_grad``, the version, and the address of the storage object."""


class ClassEntry(NamedTuple):
    """The facts about a class of modules that a survey needs.

    Attributes:
        size: number of attributes of an instance; -1 if the class is not quiet.
        watched: names of the attributes that are compared, beside ``ALWAYS_READ``.
        read: an itemgetter that reads ``ALWAYS_READ`` and the watched attributes from ``vars(module)``.
        is_batch_norm: True for one of ``BATCH_NORMS``.
    """

    size: int
    watched: Names
    read: Callable[[dict], tuple]
    is_batch_norm: bool


_CONTAINER = ClassEntry(BASE_ATTRIBUTES, (), itemgetter(*ALWAYS_READ), is_batch_norm=False)
_NOT_QUIET = ClassEntry(-1, (), itemgetter(*ALWAYS_READ), is_batch_norm=False)

_entries: dict[type, ClassEntry] = {}
"""The entry of each class seen."""

_snapshots: "weakref.WeakKeyDictionary[nn.Module, dict[bool, Snapshot | int]]" = weakref.WeakKeyDictionary()
"""For each root module: under False the last snapshot of its tree alone, under True the last snapshot of several trees
that begin with it. An int instead of a snapshot is the index of the tree that was not quiet."""


class Survey:
    """A quiet module tree as it is now.

    A survey has no reference to the root module. The root is the weak key under which a snapshot is kept, and would
    otherwise live forever.

    Attributes:
        is_quiet: False if a module is not quiet. The lists then end at that module.
        attributes: ``vars(module)`` of each module, the root first. A shared layer appears once for each use. A shared
            container is not quiet.
        modules: the modules below the root, in the same order.
        containers: registry and children of each container.
        batch_norms: for each BatchNorm with running statistics, ``vars(module)``, the registry of its buffers, and
            their names and tensors.
        parameters: registry, name and tensor of each parameter.
        values: for each module, the names of its watched attributes, and the values of ``ALWAYS_READ`` and of these.
    """

    __slots__ = ("attributes", "batch_norms", "containers", "is_quiet", "modules", "parameters", "values")

    def __init__(self, root: nn.Module):
        self.modules: list[nn.Module] = []
        self.attributes: list[dict] = []
        self.containers: list[tuple[dict, list[nn.Module]]] = []
        self.batch_norms: list[tuple[dict, dict, list[tuple[str, Tensor]]]] = []
        self.parameters: list[tuple[dict, str, Tensor]] = []
        self.values: list[tuple[Names, tuple]] = []
        self.is_quiet = self._note(root)

    def _note(self, root: nn.Module) -> bool:
        """Note all modules of the tree. Return whether they are quiet; if not, stop at the first that is not."""
        modules, containers_seen = self.modules, set()
        for module in chain((root,), modules):  # ``modules`` grows during this loop
            if module is None:
                return False
            own = vars(module)
            size, watched, read, is_batch_norm = _entries.get(type(module)) or _entry_of(module)
            if size != len(own):
                return False
            values = read(own)
            training, children, parameters, buffers, *hooks = values[: len(ALWAYS_READ)]
            if any(hooks):
                return False
            self.attributes.append(own)
            self.values.append((watched, values))
            if children:
                if id(children) in containers_seen:
                    return False  # a container that is shared, or that contains itself
                containers_seen.add(id(children))
                content = [*children.values()]
                self.containers.append((children, content))
                modules += content
            for name, parameter in parameters.items():
                if parameter is not None:
                    if type(parameter) not in ORDINARY:
                        return False
                    self.parameters.append((parameters, name, parameter))
            if buffers:
                # Without a weight, a BatchNorm under autocast saves other dtypes if its running statistics are ignored.
                if not is_batch_norm or len(buffers) != 3 or parameters["weight"] is None:
                    return False
                mean, variance, count = buffers.values()
                if mean is not None or variance is not None or count is not None:
                    ordinary = type(mean) is Tensor and type(variance) is Tensor and type(count) is Tensor
                    if not (ordinary and training and own["track_running_stats"]):
                        return False
                    self.batch_norms.append((own, buffers, [*buffers.items()]))
        return True


class Snapshot:
    """Quiet module trees as they are now.

    Attributes:
        surveys: the survey of each tree.
        parameters: the parameters of all trees. A shared parameter appears once for each use.
        running_statistics: the ids of the running statistics of all BatchNorms, as keys. The values have no meaning.
        plan: the ``direct.Plan`` that was made from the snapshot, kept with it; None if there is none.
    """

    plan: Any = None

    def __init__(self, roots: Sequence[nn.Module], surveys: Sequence[Survey]):
        self.surveys = surveys
        self.parameters: list[Tensor] = [p for survey in surveys for _, _, p in survey.parameters]
        self.running_statistics: dict[int, Any] = {
            id(b): 0 for survey in surveys for _, _, content in survey.batch_norms for _, b in content[:2]
        }
        # all that follows is compared in ``is_unchanged``; the roots by their attributes, since they are weak keys
        self.roots = [*map(vars, roots)]
        self.modules = [module for survey in surveys for module in survey.modules]
        self.types = [*map(type, chain(roots, self.modules))]
        self.attributes = [own for survey in surveys for own in survey.attributes]
        self.values = [own.copy() for own in self.attributes]
        registries = [(own, name) for own in self.attributes for name in REGISTRIES]
        self.filled_places = [(own, name) for own, name in registries if own[name]]
        """Where each registry that is not empty is found: the attributes of its module, and its name among them."""
        self.filled_registries = [own[name] for own, name in self.filled_places]
        self.empty_registries = [own[name] for own, name in registries if not own[name]]
        self.registered = [*chain.from_iterable(map(dict.values, self.filled_registries))]
        """The children, parameters and buffers of all modules."""

    def is_unchanged(self, roots: Sequence[nn.Module], states: ParameterStates | None = None) -> bool:
        """Return whether a new snapshot of ``roots`` would be the same. If given, ``states`` must be the same as well.

        Attributes are compared by ``==`` of their dictionaries. That takes identical objects for equal, so tensors are
        not compared by value. A registry that holds anything must also be the same object; an empty one need not be.
        """
        try:
            return (
                len(roots) == len(self.roots)
                and all(map(is_, map(vars, roots), self.roots))
                and [*map(type, chain(roots, self.modules))] == self.types
                and all(map(is_, [own[name] for own, name in self.filled_places], self.filled_registries))
                and self.attributes == self.values
                and not any(self.empty_registries)
                and len(now := [*chain.from_iterable(map(dict.values, self.filled_registries))]) == len(self.registered)
                and all(map(is_, now, self.registered))
                and (
                    states is None
                    or [(p.requires_grad, p._version, p.untyped_storage()._cdata) for p in self.parameters] == states
                )
            )
        except (KeyError, RuntimeError):  # a registry was deleted, or an attribute is a tensor of several numbers
            return False


def take_snapshot(roots: Sequence[nn.Module]) -> Snapshot | None:
    """Return the snapshot of module trees as they are now, or None if one of them is not quiet."""
    if (kept := _snapshots.get(roots[0])) is None:
        kept = _snapshots[roots[0]] = {}
    several = len(roots) > 1
    last = kept.get(several)
    if isinstance(last, Snapshot):
        if last.is_unchanged(roots):
            return last
    # look first at the tree that was not quiet the last time: as a rule it still is not
    elif last is not None and last < len(roots) and not Survey(roots[last]).is_quiet:
        return None
    surveys: list[Survey] = []
    for root in roots:
        survey = Survey(root)
        # ``Replay`` raises for parameters without a version
        if not survey.is_quiet or any(has_no_version(p) for _, _, p in survey.parameters):
            kept[several] = len(surveys)
            return None
        surveys.append(survey)
    new = Snapshot(roots, surveys)
    # A single layer may be the root of one tree and a part of another: the snapshot would hold its own weak key.
    if all(root._modules for root in roots):
        kept[several] = new
    return new


def bare_layers(root: nn.Module, *, tracking: bool) -> list[nn.Module]:
    """Return copies of the layers of a quiet tree, in the order in which they run.

    All containers of a quiet tree are ``nn.Sequential``. A copy has the tensors of its layer as plain attributes, where
    Python finds them ten times as fast as in the registries of a module. Call its ``forward``, since it can have no
    hooks. It may be used as long as the snapshot of the tree is unchanged.

    Args:
        root: the tree.
        tracking: whether BatchNorms update their running statistics.
    """
    if isinstance(root, nn.Sequential):
        return [layer for child in root for layer in bare_layers(child, tracking=tracking)]
    bare = object.__new__(type(root))
    vars(bare).update(vars(root) | root._parameters | root._buffers)
    if not tracking and type(root) in BATCH_NORMS:
        vars(bare)["track_running_stats"] = False
    return [bare]


def quiet_container(kind: type[nn.Sequential]) -> type[nn.Sequential]:
    """Decorator: declare that a subclass of ``nn.Sequential`` computes what its base does, though it defines methods.

    Such a class must draw no random numbers and set no attributes in its forward function.
    """
    _entries[kind] = _CONTAINER
    return kind


def draws_nothing(module: nn.Module) -> bool:
    """Return whether the module itself, ignoring its children, is known to draw no random numbers.

    That holds for layers and containers of quiet trees, whether or not they are compiled.
    """
    if type(module).__module__.startswith("torch._dynamo."):  # the module that torch.compile returns
        return True
    entry, own = _entries.get(type(module)) or _entry_of(module), vars(module)
    return entry.size == len(own.keys() - SET_BY_COMPILER)


def _entry_of(module: nn.Module) -> ClassEntry:
    """Return the entry of the module's class. Make it if there is none yet."""
    kind, entry = type(module), _NOT_QUIET
    layer = layer_of(kind)
    if layer in QUIET:
        if (known := known_class(module, layer)) is None:
            return _NOT_QUIET  # this instance is not quiet, another one of its class may be
        size, watched = known
        is_batch_norm = kind in BATCH_NORMS
        if is_batch_norm:
            watched += ("track_running_stats",)
        entry = ClassEntry(size, watched, itemgetter(*ALWAYS_READ, *watched), is_batch_norm)
    elif issubclass(kind, nn.Sequential):
        between = kind.__mro__[: kind.__mro__.index(nn.Sequential)]
        if all(vars(base).keys() <= _PLAIN_DEFINITIONS for base in between):
            entry = _CONTAINER
    _entries[kind] = entry
    return entry
