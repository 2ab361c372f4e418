"""The condition number of a computation: how much it amplifies rounding.

Rounding is imitated entry by entry. While a computation runs, in float64, every operation's result is changed in every
entry by one rounding of the dtype in question, up or down at random. That covers the forward pass, whatever backward
rebuilds, and any engine: nothing needs to be known about the module.

The computation is compared with itself without the changes. A wrong result is therefore no excuse for itself: it is the
same with and without them.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from memcnn.testing.adapters import inverse_of
from memcnn.testing.laws.subject import NotRunnable, Subject, without_dropout
from memcnn.testing.laws.twin import NamedTensors, Outcome, is_finite, relative_errors, worst
from memcnn.testing.tolerances import distance

LEAST_STEP = 1e-14
"""The smallest relative change in float64 beside which the rounding of float64 itself is still small."""
IN_PROPORTION = 0.1
"""Up to this relative effect, a change of many roundings counts as well as one of a single rounding."""
HALF_OF_THE_DIGITS = 1e-8
"""An inverse that is further off than this in float64 has lost its values without the help of any engine."""
EXACT = frozenset(
    """
    amax amin aminmax cat clone constant_pad_nd copy cummax cummin detach embedding fill flip gather index index_put
    index_select kthvalue masked_fill max maximum median min minimum nanmedian neg pixel_shuffle pixel_unshuffle relu
    roll scatter select_backward slice_backward sort stack threshold_backward topk where zero _to_copy _unsafe_view
    empty_like full_like new_empty new_empty_strided new_full new_ones new_zeros ones_like zeros_like
""".split()
)
"""Operations that do not round: they move or choose values, or make a tensor with the shape of another.

The derivative of a largest value looks for the entries that equal it. It is NaN if the value was changed."""

Computation = Callable[[Subject], NamedTensors]
"""Runs a subject afresh and returns tensors by name, each of which is compared relative to its own largest entry."""


class Rounding(TorchDispatchMode):
    """Changes the result of every operation by the relative ``step``, and records the largest finite result.

    Args:
        step: the size of the change; 0 for a run without changes.
        seed: chooses in which entries the change is upwards.
    """

    def __init__(self, step: float = 0.0, seed: int = 0):
        super().__init__()
        self.step, self.largest = step, 0.0
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        results = function(*args, **(kwargs or {}))
        if _may_round(function) and any(x.is_floating_point() for x in _tensors(args)):
            for result in _tensors([results]):
                self.change(result)
        return results

    def change(self, x: Tensor) -> None:
        """Change ``x`` in place."""
        if not x.is_floating_point() or not x.numel():
            return
        if self.step:
            signs = torch.randint(2, x.shape, generator=self.generator, dtype=x.dtype, device="cpu").to(x.device)
            x.mul_(signs.mul_(2 * self.step).add_(1 - self.step))
        else:
            self.largest = max(self.largest, torch.nan_to_num(x, 0.0, 0.0, 0.0).abs().max().item())


def _tensors(values: Sequence) -> Iterator[Tensor]:
    """Yield the tensors in ``values`` and in the lists and tuples there."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)


@cache
def _may_round(function: torch._ops.OpOverload) -> bool:
    """Return whether the operation computes values that are no entries of its arguments, and draws none at random."""
    name = function.overloadpacket.__name__
    is_view = any(value.alias_info is not None and not value.alias_info.is_write for value in function._schema.returns)
    draws = torch.Tag.nondeterministic_seeded in function.tags
    return not is_view and not draws and name.removesuffix("_") not in EXACT


def condition_numbers(
    subject: Subject, compute: Computation, twin: Computation | None = None, *, proportional: bool = True
) -> Iterator[float]:
    """Yield by how much ``compute`` amplifies rounding, at least 1, as measured with one random change, two, three, ...

    It is measured with the very weights and masks of ``subject``, in float64 if the module runs in it. Few changes give
    a rough value, which may miss what is amplified most.

    Args:
        subject: whose dtype decides the size of a rounding.
        compute: runs the law's computation.
        twin: runs the same under ordinary autograd, if there is such a twin.
        proportional: whether the effect of many roundings is about as many times that of one. It is not where values
            are rounded to a grid: a single rounding may move a value by a whole step, and many move it no further.

    Yields:
        The largest relative effect of a change so far, divided by its size. Infinite where nothing can be said: a value
        does not fit into the dtype, or is lost by the twin and the inverses alone as well. 1 where ``compute`` alone
        gives values that are not finite, or refuses every change, which excuses nothing. The last two are yielded once.
    """
    eps = torch.finfo(subject.dtype).eps
    try:
        exact = subject if subject.dtype == torch.float64 else subject.in_double()
    except NotRunnable:
        exact = subject
    least = LEAST_STEP if exact.dtype == torch.float64 else 16 * eps
    try:
        with Rounding() as unchanged:
            base = compute(exact)
    except Exception:  # another claim reports it
        yield 1.0
        return
    if unchanged.largest > torch.finfo(subject.dtype).max:
        yield math.inf
    elif not is_finite(base.values()):
        yield 1.0 if twin is None or _is_right_without_engine(exact, twin) else math.inf
    else:
        found = 1.0
        for seed in count():
            found = max(found, _amplification(exact, compute, base, max(eps, least), seed, proportional))
            yield found


def _amplification(
    subject: Subject, compute: Computation, base: NamedTensors, step: float, seed: int, proportional: bool
) -> float:
    """Return the effect of one change, divided by its size; 1 where the computation refuses it.

    The smaller of two values counts: that of a single rounding, and that of so many that the effect stays in
    proportion. A cast to a lower precision turns a single change into one of its own roundings, which is not
    amplification.
    """

    def effect(size: float) -> float:
        with Rounding(size, seed):
            changed = compute(subject)
        return worst(relative_errors(changed, base))[1] if is_finite(changed.values()) else math.inf

    found = []
    for size in (step, math.sqrt(step), LEAST_STEP) if proportional else (step,):
        try:
            error = effect(size)
        except Exception:  # the engine compares what it rebuilds with what it saved
            continue
        if size != math.sqrt(step) or error <= IN_PROPORTION:
            found.append(error / size)
        if len(found) == 2 or (size == math.sqrt(step) and found):
            break
    return min(found, default=1.0)


def _is_right_without_engine(subject: Subject, twin: Computation) -> bool:
    """Return whether the plain computation is finite and the inverses of the module and of its parts are right.

    The inverses are evaluated without an engine, from the outputs of forward.
    """
    module = subject.plain() or subject.fresh()
    without_dropout(module)
    errors, calls = [], []

    def record(part: nn.Module, inputs: tuple, output: object) -> None:
        if callable(getattr(part, "inverse", None)) and isinstance(output, Tensor) and len(inputs) == 1:
            calls.append((part, inputs[0], output))

    try:
        with torch.no_grad():
            for part in module.modules():
                part.register_forward_hook(record)
            subject.evaluated(module, subject.inputs)
            for part, x, y in list(calls):  # noqa: PERF101 - an inverse may call parts, which adds to it
                errors.append(distance([inverse_of(part)(y)], [x]))
        return is_finite(twin(subject).values()) and all(error < HALF_OF_THE_DIGITS for error in errors)
    except Exception:
        return False


def named(outcome: Outcome) -> NamedTensors:
    """Return all tensors of an outcome by name."""
    results = {f"result {i}": x for i, x in enumerate(outcome.results)}
    return {**results, **_with_prefix("gradient", outcome.gradients), **_with_prefix("buffer", outcome.buffers)}


def _with_prefix(prefix: str, tensors: Mapping[str, Tensor | None]) -> NamedTensors:
    return {f"{prefix} {name}": x for name, x in tensors.items()}
