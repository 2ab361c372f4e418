"""Choose the blocks of a chain that store their activations, so that a training step stays within a number of bytes.

The budget is for the tensors that the chain's forward and backward pass make, at the worst instant. The chain's input,
the gradient of its output, its parameters and their gradients are not counted, nor is the scratch memory of kernels.
For a step that ends with the chain and differentiates all of its outputs, this is ``activation_bytes`` of
``memcnn.memory.measure_step_memory``.

To make a plan, the step runs on fake tensors, which have sizes but no data: its peak is known to the byte without
computing anything. It is the peak of a step that the drift watch samples, which is the largest. Blocks are chosen in
the order of the time that storing saves for each byte, the last block first among equals, until the budget is full.
The time is estimated from the operations, see ``ELEMENT``. The plan for inputs of one size is made once, and kept.
"""

import copy
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from memcnn.engine.chain import storing, thread_state
from memcnn.engine.drift import SAMPLED, Evaluations, evaluations
from memcnn.memory import TensorMeter
from memcnn.memory.fake import FakeMode
from memcnn.models.keywords import taken
from memcnn.models.wrapper import is_recorded, uncompiled

__all__ = ["ELEMENT", "Budget", "Plan", "Price", "price_of"]

ELEMENT = 32
"""Cost of writing one element of a result and reading it again, relative to a multiplication or an addition. With this
value, ``python -m bench.budget --prices`` ranks ten kinds of branches almost as their times on a CPU do.
"""


class Plan(NamedTuple):
    """A choice of blocks for inputs of one size.

    Attributes:
        stored: positions of the blocks that store their activations, counted in the order in which blocks run.
        peak_bytes: the predicted peak of a step.
    """

    stored: frozenset[int]
    peak_bytes: int


class Budget:
    """Chooses the blocks that store their activations, for each size of the inputs.

    Args:
        limit_bytes: the bytes that a step may need at its worst instant, as the module's docstring counts them.

    Attributes:
        plans: the plans made so far.
    """

    def __init__(self, limit_bytes: int):
        if not isinstance(limit_bytes, int) or isinstance(limit_bytes, bool) or limit_bytes < 1:
            raise ValueError(f"budget_bytes must be None or a whole number of bytes, at least 1: got {limit_bytes!r}")
        self.limit_bytes = limit_bytes
        self.plans: dict[tuple, Plan] = {}

    @uncompiled
    def stored(self, chain: nn.Sequential, direction: str, x: Tensor, kwargs: Mapping[str, Any]) -> frozenset[int]:
        """Return the positions of the blocks that store their activations.

        There are none if autograd records nothing, or if every block is disabled.

        Args:
            chain: a ``ReversibleSequential``.
            direction: the name of its method that runs.
            x: the input.
            kwargs: its keyword arguments.

        Raises:
            ValueError: the step needs more than the budget even if no block stores its activations.
            RuntimeError: the step cannot be predicted, or the chain runs within a branch of another block.
        """
        if not is_recorded(chain, (x,)) or all(getattr(block, "disable", False) for block in chain):
            return frozenset()
        if thread_state.noted_sources is not None:
            raise RuntimeError(
                "a chain with budget_bytes runs within a branch of another reversible block, whose second evaluation "
                "decides what is alive: give the budget to the outer chain, and keep_every to this one"
            )
        key = _key(chain, direction, x, kwargs)
        if key not in self.plans:
            device = x.device.type
            autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
            with ThreadPoolExecutor(1) as thread:  # none of the caller's modes and hooks sees the prediction
                self.plans[key] = thread.submit(self._plan, chain, direction, x, kwargs, autocast).result()
        return self.plans[key].stored

    def _plan(self, chain: nn.Sequential, direction: str, x: Tensor, kwargs: Mapping, autocast: tuple) -> Plan:
        """Return the plan for an input, which is predicted on tensors without values."""
        try:
            with (
                torch.random.fork_rng(devices=[]),
                FakeMode(),
                torch.autocast(x.device.type, enabled=autocast[0], dtype=autocast[1]),
            ):
                step = _FakeStep(chain, direction, x, kwargs)
                return self._filled(step)
        except (_BelowMinimum, _Unknown) as error:
            raise (ValueError if isinstance(error, _BelowMinimum) else RuntimeError)(str(error)) from None
        except Exception as error:  # whatever a module raises that reads values
            raise RuntimeError(
                "budget_bytes needs a prediction of the step on tensors without values, which failed with "
                f"{type(error).__name__}: {error}; use keep_every for this chain"
            ) from error

    def _filled(self, step: "_FakeStep") -> Plan:
        """Return the plan that stores as many blocks as fit, those first that save the most time for each byte."""
        least = step.peak_bytes(())
        if least > self.limit_bytes:
            raise _BelowMinimum(
                f"budget_bytes={self.limit_bytes:,} is too small for an input of shape {tuple(step.x.shape)}: with no "
                f"block's activations stored, a step needs {least:,} bytes; raise the budget to that, or use a "
                "smaller batch"
            )
        chosen: list[int] = []
        bound, too_large = least, set()
        for i in sorted(range(len(step.prices)), key=lambda i: (-step.prices[i].cost_per_byte, -i)):
            price = step.prices[i]
            if price in too_large:  # an equal block that runs later, and frees its bytes earlier, did not fit
                continue
            # the block's activations, and the outputs of the chains before and after it
            most = bound + price.stored_bytes + 2 * step.x.nbytes
            if most > self.limit_bytes:
                most = step.peak_bytes([*chosen, i])
            if most > self.limit_bytes:
                too_large.add(price)
            else:
                chosen, bound = [*chosen, i], most
        while (peak_bytes := step.peak_bytes(chosen)) > self.limit_bytes:
            chosen = chosen[:-1]
        return Plan(frozenset(chosen), peak_bytes)


class _BelowMinimum(Exception):
    pass


class _Unknown(Exception):
    pass


class _Fixed(NamedTuple):
    """Replaces a ``Budget`` while a plan is tried."""

    positions: frozenset[int]

    def stored(self, *_: Any) -> frozenset[int]:
        return self.positions


class Price(NamedTuple):
    """The cost of a block's second evaluation, and the bytes of the activations that make it unnecessary.

    Attributes:
        cost: number of multiplications and additions, plus ``ELEMENT`` for each element of a result.
        stored_bytes: bytes that plain autograd saves in the block, without its input and parameters.
    """

    cost: int
    stored_bytes: int

    @property
    def cost_per_byte(self) -> float:
        return self.cost / max(1, self.stored_bytes)


class _Elements(TorchDispatchMode):
    """Counts the elements of all results but views."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: object, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.elements += sum(t.numel() for t in tree_leaves(result) if isinstance(t, Tensor))
        return result


class _Watched(Evaluations):
    """Stays at the number of an evaluation that the drift watch samples. Such a step needs the most bytes."""

    number = property(lambda self: min(SAMPLED), lambda self, number: None)


class _FakeStep:
    """A copy of the chain and its inputs without values, to predict steps on. It needs a ``FakeMode``."""

    def __init__(self, chain: nn.Sequential, direction: str, x: Tensor, kwargs: Mapping[str, Any]):
        self.chain: Any = _without_values(chain)
        evaluations.update((module, _Watched()) for module in self.chain.modules())
        self.peaks: dict[frozenset[int], int] = {}
        self.direction = direction
        results: tuple[Tensor, ...]
        self.x = _like(x).requires_grad_(x.requires_grad)
        self.kwargs = tree_map_only(Tensor, lambda t: _like(t).requires_grad_(t.requires_grad), dict(kwargs))
        for parameter in self.chain.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        self.prices: list[Price] = []
        value, results = self.x, ()
        for block in reversed(self.chain) if direction.startswith("inverse") else self.chain:
            price, results = price_of(block, value, taken(block, self.kwargs), direction)
            self.prices.append(price)
            value = results[0].detach().requires_grad_(results[0].requires_grad)
        self.gradients = [torch.zeros_like(result) for result in results]

    def peak_bytes(self, stored: Collection[int]) -> int:
        """Return the peak of a step in which these blocks store their activations. Predict each such step once."""
        positions = frozenset(stored)
        if positions not in self.peaks:
            self.chain.budget = _Fixed(positions)
            self.x.grad = None
            with TensorMeter() as meter:
                self._run()
            self.x.grad = None
            self.peaks[positions] = meter.peak_bytes
        return self.peaks[positions]

    def _run(self) -> None:
        """Run the forward and the backward pass of the chain."""
        results = _as_tuple(getattr(self.chain, self.direction)(self.x, **self.kwargs))
        trained = [(y, g) for y, g in zip(results, self.gradients, strict=True) if y.requires_grad]
        del results
        torch.autograd.backward([y for y, _ in trained], [g for _, g in trained])


def price_of(
    block: nn.Module, x: Tensor, kwargs: Mapping[str, Any], direction: str = "forward"
) -> tuple[Price, tuple[Tensor, ...]]:
    """Return the price of the block's method ``direction`` for the input x, and the results of that method."""
    saved: dict[int, torch.UntypedStorage] = {}
    not_activations = [tensor.untyped_storage() for tensor in (x, *block.parameters())]  # views of weights included

    def pack(tensor: Tensor) -> Tensor:
        saved[id(tensor.untyped_storage())] = tensor.untyped_storage()
        return tensor

    with (
        storing(),
        saved_tensors_hooks(pack, lambda tensor: tensor),
        FlopCounterMode(display=False) as flops,
        _Elements() as written,
    ):
        results = _as_tuple(getattr(block, direction)(x, **kwargs))
    for storage in not_activations:
        saved.pop(id(storage), None)
    cost = flops.get_total_flops() + ELEMENT * written.elements
    return Price(cost, sum(storage.nbytes() for storage in saved.values())), results


def _as_tuple(results: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def _like(tensor: Tensor) -> Tensor:
    """Return a tensor without values, of the same layout."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


def _without_values(chain: nn.Sequential) -> nn.Sequential:
    """Return a copy of the chain whose tensors have no values."""
    memo: dict[int, Any] = {}
    for name, tensor in [*chain.named_parameters(), *chain.named_buffers()]:
        if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided or hasattr(tensor, "device_mesh"):
            raise _Unknown(f"budget_bytes cannot plan for {name}, a {type(tensor).__name__}; use keep_every")
        like = _like(tensor)
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(like, requires_grad=tensor.requires_grad) if is_parameter else like
    return copy.deepcopy(chain, memo)


def _key(chain: nn.Sequential, direction: str, x: Tensor, kwargs: Mapping[str, Any]) -> tuple:
    """Return a key of everything that decides the bytes of a step."""
    device = x.device.type
    inputs = [
        (t.shape, t.stride(), t.dtype, t.device, t.requires_grad) if isinstance(t, Tensor) else repr(t)
        for t in tree_leaves((x, dict(kwargs)))
    ]
    modules = [(m.training, getattr(m, "disable", None)) for m in chain.modules()]
    parameters = [(p.shape, p.dtype, p.requires_grad) for p in chain.parameters()]
    autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return direction, autocast, tuple(sorted(kwargs)), tuple(inputs), tuple(modules), tuple(parameters)
