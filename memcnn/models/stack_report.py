"""The report of ``memcnn.to_reversible``: a reversible stack compared with the blocks that it was made from."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from memcnn.attribution import warn_user
from memcnn.engine.replay import Replay
from memcnn.memory import measure_peak_split, predict_step_memory, training_step
from memcnn.models.additive import AdditiveCoupling
from memcnn.models.keywords import taken
from memcnn.models.two_streams import AfterReLU, Nothing, ReversibleStack, TwoStreams

__all__ = ["Called", "StackReport", "compare", "outcome", "relative_difference"]

_DRIFT = 1e-3
"""Largest relative error of rebuilt streams that causes no warning."""


@dataclass(frozen=True)
class StackReport:
    """The changes that ``to_reversible`` made; ``str(report)`` lists them in sentences.

    Attributes:
        converted: the blocks that are reversible now, as "name: type, number of residual functions".
        kept: the blocks that were not converted, as "name: type: reason".
        changes: sentences on how the stack's function differs from the blocks' function.
        parameters: number of parameters before and after.
        output_difference: relative difference of the outputs before and after for the sample, in evaluation mode.
        rebuild_error: relative error of rebuilt streams for the sample, in evaluation mode.
        measured_bytes: bytes of activations at the peak of a training step on the sample, before and after, from
            ``memcnn.memory.measure_peak_split``; None with ``measure=False``.
        predicted_bytes: the same from ``memcnn.memory.predict_step_memory``; None with ``measure=False``, and if the
            step cannot be predicted.
        not_predicted: the error that prevented the prediction; empty if there was none.
    """

    converted: tuple[str, ...]
    kept: tuple[str, ...]
    changes: tuple[str, ...]
    parameters: tuple[int, int]
    output_difference: float
    rebuild_error: float
    measured_bytes: tuple[int, int] | None = None
    predicted_bytes: tuple[int, int] | None = None
    not_predicted: str = ""

    def __str__(self) -> str:
        lines = [f"reversible now, {len(self.converted)}:", *(f"  {line}" for line in self.converted)]
        if self.kept:
            lines += [f"as before, {len(self.kept)}:", *(f"  {line}" for line in self.kept)]
        lines += ["changes of the function computed:", *(f"  {line}" for line in self.changes)]
        lines.append(f"parameters: {self.parameters[0]:,} before, {self.parameters[1]:,} after")
        lines.append(f"relative difference of the output for the sample: {self.output_difference:.1e}")
        lines.append(f"relative error of rebuilt streams for the sample: {self.rebuild_error:.1e}")
        for how, sizes in (("predicted", self.predicted_bytes), ("measured", self.measured_bytes)):
            if sizes is not None:
                lines.append(f"activations of a training step, {how}: {sizes[0]:,} bytes before, {sizes[1]:,} after")
        if self.not_predicted:
            lines.append(f"activations of a training step, not predicted: {self.not_predicted}")
        return "\n".join(lines)


class Called(nn.Module):
    """A module with fixed keyword arguments.

    Tensors among them are buffers, because ``predict_step_memory`` replaces buffers by tensors without values.

    Args:
        module: the module.
        kwargs: its keyword arguments.
    """

    def __init__(self, module: nn.Module, kwargs: Mapping[str, Any]):
        super().__init__()
        self.module, self.kwargs = module, dict(kwargs)
        for name, value in kwargs.items():
            if isinstance(value, Tensor):
                self.register_buffer(f"given_{name}", value)

    def forward(self, x: Tensor) -> Tensor:
        """Return the module's output for x and the fixed keyword arguments."""
        given = {name: getattr(self, f"given_{name}", value) for name, value in self.kwargs.items()}
        return self.module(x, **given)


def outcome(root: nn.Module, call: Callable[[Tensor], Any], x: Tensor, training: bool) -> tuple[Any, list[Tensor]]:
    """Return ``call(x)`` and the values of the buffers of ``root`` afterwards; restore buffers, modes and generators.

    Args:
        root: the module whose mode is set and whose buffers are returned.
        call: a function of a tensor that calls ``root`` or modules in it.
        x: the input, which is copied.
        training: call in training mode, otherwise in evaluation mode.
    """
    modes, buffers = [(module, module.training) for module in root.modules()], list(root.buffers())
    saved = [buffer.clone() for buffer in buffers]
    root.train(training)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
            y = call(x.clone())
            return y, [buffer.clone() for buffer in buffers]
    finally:
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for buffer, value in zip(buffers, saved, strict=True):
                buffer.copy_(value)


def relative_difference(a: Tensor, b: Tensor) -> float:
    """Return the norm of a - b, divided by the norm of b."""
    a, b = a.double(), b.double()
    return float((a - b).norm() / b.norm().clamp(min=torch.finfo(b.dtype).tiny))


def compare(
    before: nn.Module,
    stack: ReversibleStack,
    sample: Tensor,
    kwargs: Mapping[str, Any],
    *,
    converted: Sequence[str],
    kept: Sequence[str],
    measure: bool,
) -> StackReport:
    """Return the report on a stack, and warn if its rebuilt streams drift.

    Args:
        before: the blocks that the stack was made from, with their keyword arguments.
        stack: the reversible stack.
        sample: an input of both.
        kwargs: keyword arguments of the stack.
        converted: the report's lines on converted blocks.
        kept: the report's lines on the other blocks.
        measure: predict and measure the memory of a training step.
    """
    y = outcome(stack, lambda x: stack(x, **kwargs), sample, training=False)[0]
    error = outcome(stack, lambda x: _rebuild_error(stack, x, kwargs), sample, training=False)[0]
    if not error <= _DRIFT:
        warn_user(
            f"the reversible stack rebuilds its streams with a relative error of {error:.1e}, so gradients will "
            "have errors of that size. Keep the streams in float32 (the residual functions may run under autocast), or "
            "use a shorter stack"
        )
    report = StackReport(
        converted=tuple(converted),
        kept=tuple(kept),
        changes=tuple(_changes(stack)),
        parameters=(_parameters(before), _parameters(stack)),
        output_difference=relative_difference(y, outcome(before, before, sample, training=False)[0]),
        rebuild_error=error,
    )
    if not measure:
        return report
    sides = [Called(before, {}), Called(stack, kwargs)]
    try:
        measured: Any = tuple(_measured(side, sample) for side in sides)
    except Exception as failure:  # such as that of a block which changes its input in place
        raise ValueError(
            "memory could not be measured, because a training step of the blocks or of the stack fails on the sample: "
            f"{type(failure).__name__}: {failure}. Correct the blocks, or convert them with measure=False"
        ) from failure
    try:
        predicted: Any = tuple(_predicted(side, sample) for side in sides)
    except Exception as failure:  # such as an operator without a shape function
        return replace(report, measured_bytes=measured, not_predicted=f"{type(failure).__name__}: {failure}")
    return replace(report, measured_bytes=measured, predicted_bytes=predicted)


def _rebuild_error(stack: ReversibleStack, x: Tensor, kwargs: Mapping[str, Any]) -> float:
    """Return the largest relative error of rebuilt streams."""
    error = 0.0
    for part in stack.parts:
        given = taken(part, kwargs)
        if isinstance(part, TwoStreams):
            error = max(error, _rebuild_error_of(part, x, given))
        x = part(x, **given)
    return error


def _rebuild_error_of(part: TwoStreams, x: Tensor, kwargs: Mapping[str, Any]) -> float:
    """Return the relative error of two streams that are rebuilt with the random numbers of the forward pass."""
    couplings: Any = [wrapper._fn for wrapper in part.chain]
    replayed, streams = [], [x, x]
    for i, function in enumerate(f for coupling in couplings for f in (coupling.Fm, coupling.Gm)):
        given, other = taken(function, kwargs), streams[(i + 1) % 2]
        replay = Replay(function, [other], preserve_rng_state=True)
        streams[i % 2] = streams[i % 2] + function(other, **given)
        replay.evaluated()
        replayed.append((i, function, given, replay))
    for i, function, given, replay in reversed(replayed):
        with replay.again():
            streams[i % 2] = streams[i % 2] - function(streams[(i + 1) % 2], **given)
    return relative_difference(torch.cat(streams), torch.cat((x, x)))


def _changes(stack: ReversibleStack) -> Iterator[str]:
    """Yield a sentence for each change of the function that the blocks computed."""
    parts = [part for part in stack.parts if isinstance(part, TwoStreams)]
    if longer := [n for part in parts if (n := _functions(part)) > 2]:
        yield (
            f"{' + '.join(map(str, longer))} residual functions work on two streams in turn: each sees the input and "
            "what the functions of the other stream have added, not all that came before it"
        )
    if any(_functions(part) <= 2 and not _moves_relu(part) for part in parts):
        yield "where no more than two residual functions follow each other, the same sums as before, up to rounding"
    if any(map(_moves_relu, parts)):
        yield (
            "the ReLU after a sum is now at the input of the next block's function: the shortcut from block to block "
            "keeps negative values; the last ReLU follows the stack"
        )
    calls = {id(call): call for part in parts for call in part.calls}.values()
    if fixed := dict.fromkeys(f"{call.origin}.{name}" for call in calls for name in call.attributes):
        yield (
            f"attributes that are constants now, so that later changes of them have no effect: {', '.join(fixed)}. "
            "Make a buffer or a parameter of one that you change"
        )


def _functions(part: TwoStreams) -> int:
    """Return the number of residual functions."""
    couplings = [wrapper._fn for wrapper in part.chain]
    functions = [
        f for coupling in couplings if isinstance(coupling, AdditiveCoupling) for f in (coupling.Fm, coupling.Gm)
    ]
    return sum(not isinstance(f, Nothing) for f in functions)


def _moves_relu(part: TwoStreams) -> bool:
    return any(isinstance(f, AfterReLU) for f in part.modules())


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _measured(side: nn.Module, sample: Tensor) -> int:
    """Return the bytes of activations at the peak of a training step, measured on a copy."""
    model, _, batch, step = training_step(
        lambda: copy.deepcopy(side),
        lambda: (sample.detach().clone().requires_grad_(), sample),
        loss=_loss,
        optimizer=None,
    )
    with torch.random.fork_rng(devices=[sample.device] if sample.is_cuda else []):
        return measure_peak_split(model, step, batch=batch).activation_bytes


def _predicted(side: nn.Module, sample: Tensor) -> int:
    """Return the bytes of activations at the peak of a training step, predicted."""

    def batch() -> tuple[Tensor, Tensor]:
        x = torch.empty_strided(sample.shape, sample.stride(), dtype=sample.dtype, device=sample.device)
        return x.requires_grad_(), x

    return predict_step_memory(lambda: side, batch, loss=_loss, optimizer=None).activation_bytes


def _loss(y: Tensor, _: Tensor) -> Tensor:
    return y.float().square().mean()
