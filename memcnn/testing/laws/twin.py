"""The plain twin of a module, the loss of a training step, and the results and side effects of such a step.

Every law that compares a module with ordinary backpropagation does so with these functions.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from memcnn.models.revop import InvertibleModuleWrapper
from memcnn.testing.tolerances import is_emptied, relative_error

FLOOR = 1e-3
"""A gradient that cancels to zero is compared at this fraction of the largest gradient."""
STEP = 40503
"""Distance of the weights of neighbouring entries in the loss, in 65536ths: the golden ratio, so that they vary."""

UNCHANGED = type(None), bool, int, float, complex, str, bytes, type, torch.dtype, torch.device
"""Types whose values a copy of a module shares with it."""

NamedTensors = Mapping[str, Tensor | None]


def plain_twin(module: nn.Module) -> nn.Module:
    """Return a deep copy whose wrapped blocks run under ordinary autograd and store every activation."""
    twin = duplicate(module)
    for part in twin.modules():
        if isinstance(part, InvertibleModuleWrapper):
            part.disable = True
    return twin


def duplicate(module: nn.Module) -> nn.Module:
    """Return ``copy.deepcopy(module)`` in a fraction of the time.

    Ordinary modules and their dictionaries are copied here, everything else by ``copy.deepcopy``. Tensors that a pass
    has computed and left on the module, which torch does not copy, are copied without their graph.
    """
    memo: dict[int, Any] = {}
    for part in module.modules():
        for value in vars(part).values():
            if type(value) in (Tensor, list, tuple, dict):
                for x in value.values() if isinstance(value, dict) else [value] if type(value) is Tensor else value:
                    if isinstance(x, Tensor) and not x.is_leaf:
                        memo[id(x)] = x.detach().clone()
    return _duplicate(module, memo)


def _duplicate(x: Any, memo: dict[int, Any]) -> Any:
    """Return a copy of an object, as ``copy.deepcopy(x, memo)`` does."""
    kind: Any = type(x)
    if kind in UNCHANGED:
        return x
    if id(x) in memo:
        return memo[id(x)]
    if isinstance(x, nn.Module) and _is_ordinary(kind):
        memo[id(x)] = module = kind.__new__(kind)
        vars(module).update({name: _duplicate(value, memo) for name, value in vars(x).items()})
        return module
    if kind in (dict, OrderedDict) and all(type(key) in UNCHANGED for key in x):
        memo[id(x)] = values = kind()
        for key, value in x.items():
            values[key] = _duplicate(value, memo)
        return values
    if kind in (tuple, list, set) and all(type(value) in UNCHANGED for value in x):
        memo[id(x)] = kind(x)
        return memo[id(x)]
    return copy.deepcopy(x, memo)


@cache
def _is_ordinary(kind: Any) -> bool:
    """Return whether modules of this class are copied attribute by attribute, as ``nn.Module`` is.

    A ``__setstate__`` of this package or of torch's layers only reads what earlier versions wrote, except in RNNs.
    """
    names = ["__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__", "__slots__"]
    if issubclass(kind, nn.RNNBase) or not kind.__setstate__.__module__.startswith(("memcnn.", "torch.nn.modules.")):
        names.append("__setstate__")
    return all(getattr(kind, name, None) is getattr(nn.Module, name, None) for name in names)


def is_wrapped(module: nn.Module) -> bool:
    """Return whether the module contains an ``InvertibleModuleWrapper``."""
    return any(isinstance(part, InvertibleModuleWrapper) for part in module.modules())


def weighted_sum(*outputs: Tensor, seed: int = 0) -> Tensor:
    """Return a scalar loss whose gradient differs from entry to entry of every floating-point output.

    Args:
        outputs: tensors of any shape.
        seed: chooses other weights.
    """
    terms, count = [], 0
    for y in outputs:
        if y.is_floating_point():
            counted = torch.arange(count + seed, count + seed + y.numel(), device=y.device)
            weights = (counted * STEP % 65536).to(torch.float64) / 32768 - 0.5  # from -0.5 to 1.5
            terms.append((y * weights.to(y.dtype).view(y.shape)).sum())
            count += y.numel()
    return sum(terms[1:], terms[0])


@dataclass
class Outcome:
    """The results of a program, and the gradients, buffers and generator states after it."""

    results: list[Tensor]
    input_gradients: dict[str, Tensor | None]  # "input 0", "input 1", ...
    parameter_gradients: dict[str, Tensor | None]
    buffers: dict[str, Tensor]
    generators: Tensor  # the state of torch's generators, on the CPU and on every GPU that holds an input

    @property
    def gradients(self) -> dict[str, Tensor | None]:
        return self.input_gradients | self.parameter_gradients

    @property
    def is_finite(self) -> bool:
        return is_finite((*self.results, *self.gradients.values(), *self.buffers.values()))

    def errors(self, expected: "Outcome") -> dict[str, float]:
        """Return the relative error of every result, gradient and buffer, and of the generators' state, by name.

        The error is infinite where one outcome has a value and the other has none, or another shape or dtype.
        """
        if len(self.results) != len(expected.results):
            return {"number of results": float("inf")}
        same_numbers = torch.equal(self.generators, expected.generators)
        buffers = {
            name: relative_errors({name: self.buffers.get(name)}, {name: wanted})[name]
            for name, wanted in expected.buffers.items()
        }
        return {
            **_prefixed("result ", relative_errors(_numbered(self.results), _numbered(expected.results))),
            **_prefixed("gradient of ", relative_errors(self.gradients, expected.gradients)),
            **_prefixed("buffer ", buffers),
            "state of the random generators": 0.0 if same_numbers else float("inf"),
        }


def run(
    module: nn.Module,
    program: Callable[..., Tensor | Sequence[Tensor] | None],
    inputs: Sequence[Tensor],
    seed: int = 0,
    *,
    named_like: nn.Module | None = None,
) -> Outcome:
    """Run ``program(module, *copies of inputs)``, which differentiates and returns tensors or None.

    Args:
        module: its parameters collect the gradients.
        program: is given inputs with the values and strides of ``inputs``, made from leaves.
        inputs: an input that requires a gradient gets one.
        seed: seed of torch's generators, whose state is as before when the function returns.
        named_like: a module with the same parameters and buffers, whose names the outcome uses.
    """
    leaves, copies = zip(*map(leaf_like, inputs), strict=True)
    with seeded(inputs, seed):
        results = program(module, *copies)
        generators = _generator_states(inputs)
    results = [results] if isinstance(results, Tensor) else list(results or [])
    named = named_like or module
    parameters = zip((name for name, _ in named.named_parameters()), module.parameters(), strict=True)
    buffers = zip((name for name, _ in named.named_buffers()), module.buffers(), strict=True)
    return Outcome(
        [result.detach() for result in results],
        {f"input {i}": x.grad for i, x in enumerate(leaves)},
        {name: p.grad if p.grad is None else p.grad.to_dense() for name, p in parameters},
        dict(buffers),
        generators,
    )


def leaf_like(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return a new leaf, and a tensor made from it with the values and strides of ``x``.

    They are the same tensor where ``x`` is dense. Where ``x`` has gaps or shares entries (a slice, an expanded tensor)
    the leaf is the memory, one-dimensional, and the second tensor a view of it.
    """
    dense = is_dense(x)
    with torch.no_grad():
        if dense:
            leaf = x.detach().clone(memory_format=torch.preserve_format)
        else:
            span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
            leaf = x.detach().as_strided((span,), (1,)).clone()
    leaf.requires_grad_(x.requires_grad)
    return leaf, leaf if dense else leaf.as_strided(x.shape, x.stride())


def is_dense(x: Tensor) -> bool:
    """Return whether the memory of ``x`` has no gaps and no entries that several indices share."""
    return torch.ops.aten.is_non_overlapping_and_dense(x)


@contextmanager
def seeded(inputs: Sequence[Tensor], seed: int) -> Iterator[None]:
    """Seed torch's generators within this context; their state is as before afterwards."""
    devices = {x.device for x in inputs if x.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        # torch.manual_seed also records a stack trace for each kind of device that is not there
        torch.default_generator.manual_seed(seed)
        for device in devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def relative_errors(actual: NamedTensors, expected: NamedTensors) -> dict[str, float]:
    """Return the error of every tensor, relative to its largest expected entry, by name.

    A tensor that is expected to be small is compared at ``FLOOR`` times the largest entry of all. The error is infinite
    where only one of the two is None, where shape or dtype differ, where integers differ, and where a storage is empty.
    """
    floating = [
        wanted for wanted in expected.values() if wanted is not None and _is_inexact(wanted) and not is_emptied(wanted)
    ]
    largest = max((wanted.detach().abs().max().item() for wanted in floating if wanted.numel()), default=0.0)
    return {name: _error(actual.get(name), wanted, FLOOR * largest) for name, wanted in expected.items()}


def is_finite(tensors: Iterable[Tensor | None]) -> bool:
    """Return whether every entry of every tensor is finite. A tensor whose storage was emptied is not."""
    return all(not is_emptied(x) and bool(x.isfinite().all()) for x in tensors if x is not None)


def worst(errors: Mapping[str, float]) -> tuple[str, float]:
    """Return the name and the size of the largest error; NaN counts as the largest."""
    return max(errors.items(), key=lambda item: (item[1] != item[1], item[1]), default=("", 0.0))


def _error(got: Tensor | None, wanted: Tensor | None, least_scale: float) -> float:
    """Return the relative error; infinite if only one is None, or shape or dtype differ."""
    if got is None or wanted is None:
        return 0.0 if got is wanted else float("inf")
    if (got.shape, got.dtype) != (wanted.shape, wanted.dtype) or is_emptied(got) or is_emptied(wanted):
        return float("inf")
    if not _is_inexact(wanted):
        return 0.0 if torch.equal(got, wanted) else float("inf")
    return relative_error(got, wanted, least_scale=least_scale)


def _is_inexact(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def _generator_states(inputs: Sequence[Tensor]) -> Tensor:
    devices = sorted({x.device.index for x in inputs if x.is_cuda})
    return torch.cat([torch.get_rng_state(), *map(torch.cuda.get_rng_state, devices)])


def _numbered(tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    return {str(i): tensor for i, tensor in enumerate(tensors)}


def _prefixed(prefix: str, errors: Mapping[str, float]) -> dict[str, float]:
    return {prefix + name: error for name, error in errors.items()}
