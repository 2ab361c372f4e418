"""What the laws share: how a network is run, the limit of an error, and the largest errors met."""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import torch
from hypothesis import assume, currently_in_test_context, reject, target
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._pytree import tree_leaves, tree_map_only

from memcnn.engine.couple import CoupledBranch
from memcnn.engine.opaque import OpaqueModule
from memcnn.models.revop import InvertibleModuleWrapper
from memcnn.testing.cases import Network
from memcnn.testing.tolerances import relative_error, tolerance
from properties.twin import Outcome, differences, plain_twin, run, weighted_sum

Program = Callable[[Network], Callable[[nn.Module, Tensor], object]]
"""Makes of a description what is to be run on the network and on the memory of its input."""


def forward_and_backward(network: Network) -> Callable[[nn.Module, Tensor], Tensor]:
    def program(module: nn.Module, leaf: Tensor) -> Tensor:
        with network.context(leaf.device):
            y = module(network.input.laid_out(leaf))
        return differentiated(y)
    return program


def inverse_and_backward(network: Network) -> Callable[[nn.Module, Tensor], Tensor]:
    def program(module: nn.Module, leaf: Tensor) -> Tensor:
        with network.context(leaf.device):
            x = module.inverse(network.output.laid_out(leaf))
        return differentiated(x)
    return program


def differentiated(y: Tensor) -> Tensor:
    if y.requires_grad:
        weighted_sum(y).backward()
    return y


def assert_network_like_twin(law: str, network: Network, program: Program, device: str, *, inverse: bool = False,
                             depth: int | None = None) -> None:
    """``program`` has the same results, gradients, buffers and random numbers on the network as on its plain twin."""
    module = network.build(device)
    twin = plain_twin(module)
    leaf = (network.output if inverse else network.input).leaf(device).requires_grad_()
    actual, expected = run(module, program(network), [leaf]), run(twin, program(network), [leaf])
    assume_finite(expected)
    errors = differences(actual, expected)
    error = worst(errors.values())
    hold(law, network, error, depth=depth or 2 * network.depth, of=next(n for n, e in errors.items() if e is error),
         condition=partial(condition_number, network, program, inverse=inverse))


def assume_finite(expected: Outcome) -> None:
    """The example is none where a scale has overflowed on its way to a result, a gradient or a running statistic."""
    assume(is_finite(expected))


def is_finite(outcome: Outcome) -> bool:
    gradients = (gradient for gradient in outcome.gradients.values() if gradient is not None)
    return all(value.isfinite().all() for value in (*outcome.results, *gradients, *outcome.buffers.values()))


def worst(errors: Iterable[float]) -> float:
    """The largest; NaN if any is."""
    return max(errors, key=lambda error: (error != error, error), default=0.0)


LARGEST: dict[tuple[str, str, str], tuple[float, float]] = {}
"""By law, kind of block and precision: the error that came closest to its limit, and that limit."""


def hold(law: str, network: Network, error: float, *, depth: int, condition: Callable[[int], float],
         of: str = "") -> None:
    """The error, ``of`` the tensor of that name, is what rounding explains: in well-conditioned blocks, or in these.

    The condition number, of a number of directions, is measured only where the error is beyond the first limit. Where
    rounding alone may be as large as the values themselves, the example is none.
    """
    precision = {"dtype": network.dtype, "autocast": torch.bfloat16 if network.autocast else None}
    limit = tolerance(**precision, depth=depth)
    for directions in DIRECTIONS:
        if error <= limit:
            break
        limit = tolerance(**precision, condition=worst([depth, condition(directions)]))  # of all blocks
        if limit >= 1:  # and not NaN
            reject()
    name = "bfloat16 autocast" if network.autocast else str(network.dtype).removeprefix("torch.")
    remember((law, network.kind, name), error, limit)
    if currently_in_test_context() and error / limit < float("inf"):
        target(error / limit, label=law)
    assert error <= limit, f"{law}: relative error {error:.1e}{of and f' of {of}'}, limit {limit:.1e}"


def remember(key: tuple[str, str, str], error: float, limit: float) -> None:
    before = LARGEST.get(key)
    if before is None or not error / limit <= before[0] / before[1]:
        LARGEST[key] = error, limit


LEAST_STEP = 1e-14
"""A relative change in float64 beside which rounding is still small."""
HALF_OF_THE_DIGITS = 1e-8
"""Of a float64: inverses that rebuild less well have lost their values, or drawn another mask of dropout."""
DIRECTIONS = 1, 6, 30
"""In which tensors are changed: one tells a rough condition number, which may miss what is amplified most."""


def largest_difference(actual: Outcome, expected: Outcome) -> float:
    return worst(differences(actual, expected).values())


def condition_number(network: Network, program: Program, directions: int = 1, *, inverse: bool = False,
                     difference: Callable[[Outcome, Outcome], float] = largest_difference) -> float:
    """By how much ``program`` amplifies what rounding does to blocks, in float64, with the very weights and masks.

    Rounding is imitated by relative changes as large as that of the network's dtype, or LEAST_STEP, in both of the
    places where a network may round other than its twin: in what each block, nested ones included, is given and
    computes, and in each activation that backward rebuilds and what that is rebuilt from, which may be larger. The
    former are measured on the twin, the latter on the network, which is compared with its own outcome without them, so
    that a fault of the engine is no excuse for an error.
    """
    module = network.build().double()  # no others are drawn, as they would be in another dtype
    leaf = (network.output if inverse else network.input).leaf().double().requires_grad_()
    exactly = program(replace(network, autocast=False, input=replace(network.input, dtype=torch.float64)))
    step = max(torch.finfo(network.dtype).eps, LEAST_STEP)
    largest, error = _without_engine(plain_twin(module), exactly, leaf)
    if not largest <= torch.finfo(network.dtype).max:
        return float("inf")
    amplifications, finite = [1.0], []
    for subject, changing in ((plain_twin(module), _results_changed), (module, _rebuilt_changed)):
        unchanged = run(copy.deepcopy(subject), exactly, [leaf])
        for seed in range(directions):
            with changing(partial(_changed, step, torch.Generator().manual_seed(seed))):
                changed = run(copy.deepcopy(subject), exactly, [leaf])
            amplification = difference(changed, unchanged) / step
            amplifications.append(amplification if amplification < float("inf") else float("inf"))
        finite.append(is_finite(unchanged))
    return float("nan") if finite == [True, False] and error < HALF_OF_THE_DIGITS else max(amplifications)


def _without_engine(twin: nn.Module, program: Callable, leaf: Tensor) -> tuple[float, float]:
    """The largest value on the way, and the largest relative error of inputs of blocks rebuilt from a chain's end.

    They are rebuilt by the blocks' own inverses: what those have lost, no engine can rebuild.
    """
    values, errors, steps, compute = [], [], [], InvertibleModuleWrapper._run

    def noted(block, run, undo, inputs, kwargs, *options, log_det=False):
        result = compute(block, run, undo, inputs, kwargs, *options, log_det=log_det)
        outputs = _as_tuple(result)[:-1] if log_det else _as_tuple(result)
        steps.append((partial(undo, **kwargs), inputs, [(output, output.detach().clone()) for output in outputs]))
        return result
    with register_module_forward_hook(lambda module, inputs, output: values.append(output)), torch.no_grad():
        with patch.object(InvertibleModuleWrapper, "_run", noted), torch.enable_grad():
            run(twin, program, [leaf])
        rebuilt = {}
        for undo, inputs, outputs in reversed(steps):
            again = _as_tuple(undo(*(rebuilt.get(id(output), value) for output, value in outputs)))
            rebuilt.update(zip(map(id, inputs), again, strict=True))
            values.append(again)
            errors += map(relative_error, again, inputs)
    return worst(value.abs().max().item() for value in tree_leaves(values)
                 if isinstance(value, Tensor) and value.numel()), worst(errors)


def _as_tuple(values: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return values if isinstance(values, tuple) else (values,)


@contextmanager
def _results_changed(change: Callable) -> Iterator[None]:
    """Within this context all that wrapped blocks are given and compute is changed."""
    compute = InvertibleModuleWrapper._run

    def changed(block, run, undo, inputs, *options, **more):
        return change(compute(block, run, undo, change(inputs), *options, **more))
    with patch.object(InvertibleModuleWrapper, "_run", changed):
        yield


@contextmanager
def _rebuilt_changed(change: Callable) -> Iterator[None]:
    """Within this context all activations that backward rebuilds, and what they are rebuilt from, are changed."""
    recompute_lift, recompute_call = CoupledBranch.recompute, OpaqueModule.recompute

    def of_lift(step: CoupledBranch, second):
        part = step.part
        with patch.object(step, "part", lambda out, h: change(part(change(out), h))):
            return recompute_lift(step, second)

    def of_call(step: OpaqueModule, second):
        undo = step.undo
        with patch.object(step, "undo", lambda *outputs, **kwargs: change(undo(*change(outputs), **kwargs))):
            return recompute_call(step, second)
    with (patch.object(CoupledBranch, "recompute", of_lift), patch.object(OpaqueModule, "recompute", of_call),
          patch.object(OpaqueModule, "_check_draws")):  # where much is amplified, it would take the change for a fault
        yield


def _changed(step: float, generator: torch.Generator, values: object) -> object:
    """Every entry of every tensor relatively by ``step``, one way or the other."""
    def changed(value: Tensor) -> Tensor:
        signs = torch.randint(0, 2, value.shape, generator=generator) * 2 - 1
        return value + step * signs * value
    return tree_map_only(Tensor, changed, values)


def table() -> list[str]:
    """Lines of ``LARGEST``: a row for each law and kind of block, a column for each precision."""
    columns = sorted({precision for _, _, precision in LARGEST})
    rows = sorted({(law, kind) for law, kind, _ in LARGEST})

    def cell(law: str, kind: str, precision: str) -> str:
        if (law, kind, precision) not in LARGEST:
            return ""
        error, limit = LARGEST[law, kind, precision]
        return f"{error:.1e} / {limit:.1e} {error / limit:6.2%}"

    lines = [["law", "block", *columns], *([law, kind, *(cell(law, kind, c) for c in columns)] for law, kind in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(f"{text:{width}}" for text, width in zip(line, widths, strict=True)).rstrip() for line in lines]
