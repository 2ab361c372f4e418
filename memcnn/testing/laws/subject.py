"""The module under test: its copies, its runs from one and the same state, its plain twin."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from memcnn.models.coupling import Coupling
from memcnn.models.revop import InvertibleModuleWrapper

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
            nn.MultiheadAttention)


class NotRunnable(ValueError):
    """The module cannot be run on the inputs, so that nothing can be said about it."""


@dataclass(frozen=True)
class Subject:
    """A module with ``forward`` and ``inverse``, the inputs on which it is tested, and the seed of every evaluation.

    Inputs of a module with an exact coupling are rounded to its grid, as it does itself (``memcnn.engine.exact``).
    wrap: run it in an `InvertibleModuleWrapper`, as it would be trained. None: if nothing in it is wrapped yet.
    """

    module: nn.Module
    inputs: tuple[Tensor, ...]
    seed: int = 0
    wrap: bool | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.module, nn.Module) or not callable(getattr(self.module, "inverse", None)):
            raise TypeError(f"the module must be an nn.Module with forward and inverse: got "
                            f"{type(self.module).__name__}; give it an inverse method")
        if not self.inputs or not all(isinstance(x, Tensor) for x in self.inputs):
            raise TypeError("the inputs must be tensors, at least one: got "
                            f"({', '.join(type(x).__name__ for x in self.inputs)})")
        if not any(x.is_floating_point() for x in self.inputs):
            raise TypeError(f"an input must be of floating point: got {', '.join(str(x.dtype) for x in self.inputs)}")
        try:
            with torch.no_grad():
                self.evaluated(self.fresh(), self.inputs)
        except Exception as error:
            shapes = ", ".join(str(tuple(x.shape)) for x in self.inputs)
            raise NotRunnable(f"forward raised {type(error).__name__} for inputs of shape {shapes}, {self.dtype}: "
                              f"{error}") from error
        object.__setattr__(self, "inputs", tuple(map(self.representable, self.inputs)))

    def representable(self, x: Tensor) -> Tensor:
        """x, or the nearest value on the grid of the module's exact couplings."""
        grids = [part.grid for part in self.module.modules() if isinstance(part, Coupling) and part.grid is not None]
        return max(grids, key=lambda grid: grid.step).snap(x) if grids and x.is_floating_point() else x

    @property
    def dtype(self) -> torch.dtype:
        return next(x.dtype for x in self.inputs if x.is_floating_point())

    @property
    def depth(self) -> int:
        """How many blocks the module is a chain of: its smallest parts with an inverse."""
        def blocks(module: nn.Module) -> int:
            return sum(map(blocks, module.children())) or callable(getattr(module, "inverse", None))
        return max(1, blocks(self.module))

    def in_double(self) -> "Subject":
        """The same in float64; `NotRunnable` if it cannot be."""
        inputs = tuple(x.double() if x.is_floating_point() else x for x in self.inputs)
        return Subject(self.fresh().double(), inputs, self.seed, self.wrap)

    def fresh(self) -> nn.Module:
        """A copy of the module as it was given."""
        return copy.deepcopy(self.module)

    def initialised(self) -> "Subject":
        """The same after a plain forward pass, where one sets parameters, as ActNorm's first does."""
        once = self.fresh()
        with torch.no_grad():
            self.evaluated(once, self.inputs)
        changed = any(not torch.equal(a, b) for a, b in zip(once.parameters(), self.module.parameters(), strict=True))
        return replace(self, module=once) if changed else self

    def plain(self) -> nn.Module | None:
        """A copy under ordinary autograd; None where the module has an engine of its own."""
        if self.wrap is False and not is_wrapped(self.module):
            return None
        twin = self.fresh()
        for part in twin.modules():
            if isinstance(part, InvertibleModuleWrapper):
                part.disable = True
        return twin

    def trained(self) -> nn.Module:
        """A copy that runs as in training: wrapped, or as it is."""
        wrap = not is_wrapped(self.module) if self.wrap is None else self.wrap
        return InvertibleModuleWrapper(self.fresh()) if wrap else self.fresh()

    def leaves(self) -> list[Tensor]:
        """Copies of the inputs, those of floating point with requires_grad."""
        return [x.detach().clone(memory_format=torch.preserve_format).requires_grad_(x.is_floating_point())
                for x in self.inputs]

    @contextmanager
    def seeded(self, run: int = 0) -> Iterator[None]:
        """Random numbers as at every evaluation, or others for another ``run``; torch's generators are left alone."""
        cuda = {x.device for x in self.inputs if x.device.type == "cuda"}
        with torch.random.fork_rng(devices=list(cuda)):
            # torch.manual_seed also notes a stack trace for each kind of device that is not there
            torch.default_generator.manual_seed(self.seed + run)
            for device in cuda:
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(self.seed + run)
            yield

    def evaluated(self, function: Callable, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """``function(*inputs)`` as a tuple of tensors; it is given copies, since a faulty one writes to them."""
        with self.seeded():
            return as_tuple(function(*(x.clone() for x in inputs)))

    def loss(self, outputs: Sequence[Tensor]) -> Tensor:
        """A scalar whose gradient varies from entry to entry of every output."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        terms = [(y * torch.randn(y.shape, generator=generator, dtype=torch.float64, device="cpu").to(y)).sum()
                 for y in outputs if y.is_floating_point()]
        return torch.stack(terms).sum()

    @property
    def input_names(self) -> list[str]:
        return ["the input"] if len(self.inputs) == 1 else [f"input {i}" for i in range(len(self.inputs))]


def reordered(x: Tensor) -> Tensor:
    """Other values of the same range: the samples in reverse order; of a single sample, the entries."""
    return x.flip(0 if len(x) > 1 else tuple(range(x.dim()))) if x.dim() else x


def is_wrapped(module: nn.Module) -> bool:
    return any(isinstance(part, InvertibleModuleWrapper) for part in module.modules())


def without_dropout(module: nn.Module) -> bool:
    """Puts dropout layers in evaluation mode, and tells whether one drew masks before."""
    active = [part for part in module.modules()
              if isinstance(part, DROPOUTS) and part.training and getattr(part, "dropout", 1.0)]
    for part in active:
        part.eval()
    return bool(active)


def sample_by_sample(module: nn.Module) -> None:
    """Puts in evaluation mode what draws masks, or mixes the samples of a batch."""
    without_dropout(module)
    for part in module.modules():
        if isinstance(part, _BatchNorm):
            part.eval()


def as_tuple(values: object) -> tuple[Tensor, ...]:
    """The tensors that a module returned. TypeError for anything else."""
    values = tuple(values) if isinstance(values, (tuple, list)) else (values,)
    if not all(isinstance(value, Tensor) for value in values):
        raise TypeError("forward and inverse must return a tensor or a tuple of tensors: got "
                        f"({', '.join(type(value).__name__ for value in values)}); check an adapter that does")
    return values
