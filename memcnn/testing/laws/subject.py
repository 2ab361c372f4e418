"""The module under test with its inputs: its copies, its plain twin, and its runs from one and the same state."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode

from memcnn.models.coupling import Coupling
from memcnn.models.revop import InvertibleModuleWrapper
from memcnn.testing.laws.twin import Outcome, duplicate, is_wrapped, leaf_like, plain_twin, run, seeded, weighted_sum

DROPOUTS = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
    nn.MultiheadAttention,
)

LOWER = torch.float32, torch.bfloat16, torch.float16
"""Precisions below that of float64."""


class NotRunnable(ValueError):
    """The module does not run on the inputs, so that no law can be checked."""


class Refused(TypeError):
    """A check refuses the module or its inputs: the caller has made a mistake."""


class Precisions(TorchDispatchMode):
    """Counts the results of lower precision than float64, by dtype. Results of a single value do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[torch.dtype, int] = {}

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        results = function(*args, **(kwargs or {}))
        for x in results if isinstance(results, (tuple, list)) else (results,):
            if isinstance(x, Tensor) and x.dtype in LOWER and x.numel() > 1:
                self.found[x.dtype] = self.found.get(x.dtype, 0) + 1
        return results


@dataclass(frozen=True)
class Subject:
    """A module with ``forward`` and ``inverse``, and how it is tested.

    Inputs of a module with an exact coupling are rounded to its grid, as the coupling does (``memcnn.engine.exact``).

    Attributes:
        module: the module. Only copies of it run.
        inputs: the inputs; copies keep their strides.
        seed: seed of torch's generators at every evaluation.
        wrap: run the module in an `InvertibleModuleWrapper`, as it would be trained. None: if nothing in it is wrapped
            yet. False: it has an engine of its own.
        autocast: run forward and inverse under autocast to this dtype.
        runs: the module is known to run on the inputs, which are on its grid.
        keep_input: train with wrappers that store their inputs, so that no inverse is needed.
    """

    module: nn.Module
    inputs: tuple[Tensor, ...]
    seed: int = 0
    wrap: bool | None = None
    autocast: torch.dtype | None = None
    runs: bool = False
    keep_input: bool = False

    def __post_init__(self) -> None:
        if self.runs:
            return
        if not isinstance(self.module, nn.Module) or not callable(getattr(self.module, "inverse", None)):
            raise Refused(
                f"the module must be an nn.Module with forward and inverse: got "
                f"{type(self.module).__name__}; give it an inverse method"
            )
        if not self.inputs or not all(isinstance(x, Tensor) for x in self.inputs):
            raise Refused(
                f"the inputs must be tensors, at least one: got ({', '.join(type(x).__name__ for x in self.inputs)})"
            )
        if not any(x.is_floating_point() for x in self.inputs):
            raise Refused(
                "an input must be of floating point, since the laws compare gradients and rounding: got "
                f"{', '.join(str(x.dtype) for x in self.inputs)}; give integers beside such an input, and check a "
                "block of integers or complex numbers through an adapter that takes and returns real tensors"
            )
        self._refuse_values()
        for name, parameter in (*self.module.named_parameters(), *self.module.named_buffers()):
            if is_lazy(parameter):
                raise Refused(f"{name} is uninitialised: call the module once on an input before it is checked")
        try:
            with torch.no_grad():
                self.evaluated(self.fresh(), self.inputs)
        except Exception as error:
            shapes = ", ".join(str(tuple(x.shape)) for x in self.inputs)
            raise NotRunnable(
                f"forward raised {type(error).__name__} for inputs of shape {shapes}, {self.dtype}: {error}"
            ) from error
        object.__setattr__(self, "inputs", tuple(map(self.on_grid, self.inputs)))
        object.__setattr__(self, "runs", True)

    def _refuse_values(self) -> None:
        """Raise Refused for inputs with which no comparison can fail."""
        shapes = ", ".join(str(tuple(x.shape)) for x in self.inputs)
        floating = [x for x in self.inputs if x.is_floating_point()]
        if not any(x.numel() for x in floating):
            raise Refused(f"the inputs must have entries, or nothing can be compared: got {shapes}; give some samples")
        if any(x.layout == torch.strided and x.isnan().any() for x in floating):
            raise Refused(f"the inputs must not contain NaN, which hides errors: got {shapes}; replace these values")

    def on_grid(self, x: Tensor) -> Tensor:
        """Return the nearest value on the grid of the module's exact couplings; x itself if it has none."""
        grids = [part.grid for part in self.module.modules() if isinstance(part, Coupling) and part.grid is not None]
        return max(grids, key=lambda grid: grid.step).snap(x) if grids and x.is_floating_point() else x

    @property
    def is_exact(self) -> bool:
        """True if a coupling in the module rounds its values to a grid."""
        return any(isinstance(part, Coupling) and part.grid is not None for part in self.module.modules())

    @property
    def dtype(self) -> torch.dtype:
        return next(x.dtype for x in self.inputs if x.is_floating_point())

    @property
    def depth(self) -> int:
        """The number of blocks: modules with an inverse that contain no other such module; at least 1."""

        def blocks(module: nn.Module) -> int:
            return sum(map(blocks, module.children())) or callable(getattr(module, "inverse", None))

        return max(1, blocks(self.module))

    def in_double(self) -> "Subject":
        """Return the same in float64 and without autocast. Raises `NotRunnable` if the module does not run in it."""
        inputs = tuple(x.double() if x.is_floating_point() else x for x in self.inputs)
        return Subject(self.fresh().double(), inputs, self.seed, self.wrap, keep_input=self.keep_input)

    def fresh(self, *, dropout: bool = True) -> nn.Module:
        """Return a copy of the module as it was given; without ``dropout``, its dropout layers are in eval mode."""
        module = duplicate(self.module)
        if not dropout:
            without_dropout(module)
        return module

    def initialised(self) -> "Subject":
        """Return the same after a plain forward pass, if one sets parameters, as ActNorm's first does."""
        once = self.fresh()
        with torch.no_grad():
            self.evaluated(once, self.inputs)
        changed = any(not torch.equal(a, b) for a, b in zip(once.parameters(), self.module.parameters(), strict=True))
        return replace(self, module=once) if changed else self

    def plain(self) -> nn.Module | None:
        """Return the plain twin; None where the module has an engine of its own."""
        return None if self.wrap is False and not is_wrapped(self.module) else plain_twin(self.module)

    def twin(self) -> nn.Module:
        """Return the plain twin of a module that has one.

        Raises:
            ValueError: the module has an engine of its own.
        """
        if (twin := self.plain()) is None:
            raise ValueError(f"{type(self.module).__name__} has an engine of its own, and so no plain twin")
        return twin

    def trained(self) -> nn.Module:
        """Return a copy that runs as in training: wrapped, or as it is."""
        wrap = not is_wrapped(self.module) if self.wrap is None else self.wrap
        module = InvertibleModuleWrapper(self.fresh()) if wrap else self.fresh()
        if self.keep_input:
            for part in module.modules():
                if isinstance(part, InvertibleModuleWrapper):
                    part.keep_input = part.keep_input_inverse = True
        return module

    def seeded(self, run: int = 0) -> AbstractContextManager:
        """Return a context in which random numbers are as at every evaluation, or others for another ``run``."""
        return seeded(self.inputs, self.seed + run)

    def context(self) -> AbstractContextManager:
        """Return the autocast context in which forward and inverse run."""
        return torch.autocast(self.inputs[0].device.type, self.autocast) if self.autocast else nullcontext()

    def call(self, function: Callable, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return ``function(*inputs)``, forward or inverse, as a tuple of tensors.

        An exception is marked as the block's (`memcnn.testing.laws.guard`). An exit becomes an exception.
        """
        with self.context():
            try:
                return as_tuple(function(*inputs))
            except SystemExit as error:
                raise exited(error) from error
            except Exception as error:
                vars(error)["raised_by_block"] = True
                raise

    def evaluated(self, function: Callable, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return ``function(*copies of inputs)``, with the random numbers of every evaluation."""
        with self.seeded():
            return self.call(function, *(leaf_like(x.detach())[1] for x in inputs))

    def run(self, module: nn.Module, program: Callable[..., Tensor | Sequence[Tensor] | None] | None = None) -> Outcome:
        """Run ``program``, by default one training step, on ``module``, a copy of this one, and copies of the inputs.

        Gradients and buffers of the outcome have the names that they have in ``self.module``.
        """
        inputs = [x.detach().requires_grad_(x.is_floating_point()) for x in self.inputs]
        return run(module, program or self.step, inputs, self.seed, named_like=self.module)

    @property
    def ordinary(self) -> Outcome:
        """One training step of the module as it is trained, which several claims compare with others."""
        return self._ordinary[0]

    @property
    def lower_precisions(self) -> Mapping[torch.dtype, int]:
        """Number of results of the ordinary training step in each lower precision than float64."""
        return self._ordinary[1]

    @cached_property
    def _ordinary(self) -> tuple[Outcome, Mapping[torch.dtype, int]]:
        with Precisions() if self.dtype == torch.float64 else nullcontext() as precisions:
            outcome = self.run(self.trained())
        return outcome, precisions.found if precisions else {}

    def refuse_shared_parameters(self) -> None:
        """Raise Refused if a training step of a copy gives gradients to the parameters of the module itself."""
        own = [(p, p.grad) for p in self.module.parameters()]
        for parameter, _ in own:
            parameter.grad = None
        try:
            with suppress(Exception):  # a claim reports it
                _ = self.ordinary
            if any(parameter.grad is not None for parameter, _ in own):
                raise Refused(
                    "a copy of the module uses the parameters of the original, so it cannot be checked: an attribute "
                    "is a lambda, or a bound method, that refers to the module; make it a method"
                )
        finally:
            for parameter, gradient in own:
                parameter.grad = gradient

    def step(self, module: nn.Module, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run a forward and a backward pass."""
        outputs = self.call(module, *inputs)
        self.differentiate(outputs)
        return outputs

    def differentiate(self, outputs: Sequence[Tensor], **options: Any) -> None:
        """Run the backward pass of the loss; nothing where nothing requires a gradient."""
        loss = self.loss(outputs)
        try:
            if loss.requires_grad:
                loss.backward(**options)
        except SystemExit as error:  # of an inverse, which the engine calls
            raise exited(error) from error

    def loss(self, outputs: Sequence[Tensor]) -> Tensor:
        """Return a scalar whose gradient differs from entry to entry of every output."""
        return weighted_sum(*outputs, seed=self.seed)

    @property
    def input_names(self) -> list[str]:
        """The names of the inputs in messages."""
        return ["the input"] if len(self.inputs) == 1 else [f"input {i}" for i in range(len(self.inputs))]


def reordered(x: Tensor) -> Tensor:
    """Return other values of the same range: the samples in reverse order, or the entries of a single sample."""
    return x.flip(0 if len(x) > 1 else tuple(range(x.dim()))) if x.dim() else x


def exited(error: SystemExit) -> RuntimeError:
    """Return an exit of the block as an exception that is marked as the block's."""
    found = RuntimeError(f"the block called sys.exit({error.code!r})")
    vars(found)["raised_by_block"] = True
    return found


def without_dropout(module: nn.Module) -> bool:
    """Put dropout layers in evaluation mode, and return whether one drew masks before."""
    active = [
        part
        for part in module.modules()
        if isinstance(part, DROPOUTS) and part.training and getattr(part, "dropout", 1.0) > 0
    ]
    for part in active:
        part.eval()
    return bool(active)


def sample_by_sample(module: nn.Module) -> None:
    """Put dropout and batch normalisation in evaluation mode: the one draws masks, the other mixes samples."""
    without_dropout(module)
    for part in module.modules():
        if isinstance(part, _BatchNorm):
            part.eval()


def as_tuple(values: object) -> tuple[Tensor, ...]:
    """Return the tensors that a module returned as a tuple. Raises TypeError for anything else."""
    values = tuple(values) if isinstance(values, (tuple, list)) else (values,)
    if not all(isinstance(value, Tensor) for value in values):
        raise TypeError(
            "forward and inverse must return a tensor or a tuple of tensors: got "
            f"({', '.join(type(value).__name__ for value in values)}); check an adapter that does"
        )
    return values
