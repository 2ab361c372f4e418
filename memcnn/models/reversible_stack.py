"""A stack of residual blocks of an existing model, made reversible without a new parameter.

A residual stack computes h[n+1] = h[n] + f[n](h[n]). Two streams that both start as the stack's input x take its place,
and the residual functions change them in turn (Gomez et al., arXiv:1707.04585, with F = f[2n] and G = f[2n+1]):

    y1 = x1 + f[2n](x2),    y2 = x2 + f[2n+1](y1)

The stack returns y1 + (y2 - x): x and the sum of all that the functions added. For one or two functions (one
transformer block, one residual block or two) that is the same function as before. In a longer stack each function sees
x and what the functions of the other stream added, instead of all that came before it. A trained stack therefore needs
further training.

``memcnn.convert``, the command for weights of MemCNN 1.5, is a module: a function of that name would be replaced as
soon as somebody imports it. So the function is called ``to_reversible``.
"""

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from memcnn.memory import measure_peak_split, predict_step_memory, training_step
from memcnn.models.additive import AdditiveCoupling
from memcnn.models.keywords import keywords_taken, refuse_unknown, taken
from memcnn.models.residual import HOOKS, NotResidual, Residual, residual_of
from memcnn.models.revop import ReversibleSequential

__all__ = ["ReversibleStack", "StackReport", "TwoStreams", "to_reversible"]

_DRIFT = 1e-3
"""Relative error of rebuilt streams above which a warning is due."""


@dataclass(frozen=True)
class StackReport:
    """What ``to_reversible`` has changed; ``str(report)`` says it in words.

    Attributes:
        converted: the blocks that are reversible now, as "name: type, number of residual functions".
        kept: the blocks that are as they were, as "name: type: reason".
        changes: in what the function computed differs.
        parameters: number of parameters before and after.
        output_difference: relative difference of the outputs before and after for the sample, in evaluation mode.
        rebuild_error: relative error of rebuilt streams for the sample, in evaluation mode.
        measured_bytes: activations at the peak of a training step on the sample before and after, by
            ``memcnn.memory.measure_peak_split``; None if it was not measured, as with ``measure=False``.
        predicted_bytes: the same by ``memcnn.memory.predict_step_memory``; None if the step cannot be predicted.
        not_predicted: why it cannot.
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
        lines += ["what changes in the function computed:", *(f"  {line}" for line in self.changes)]
        lines.append(f"parameters: {self.parameters[0]:,} before, {self.parameters[1]:,} after")
        lines.append(f"relative difference of the output for the sample: {self.output_difference:.1e}")
        lines.append(f"relative error of rebuilt streams for the sample: {self.rebuild_error:.1e}")
        for how, sizes in (("predicted", self.predicted_bytes), ("measured", self.measured_bytes)):
            if sizes is not None:
                lines.append(f"activations of a training step, {how}: {sizes[0]:,} bytes before, {sizes[1]:,} after")
        if self.not_predicted:
            lines.append(f"activations of a training step, not predicted: {self.not_predicted}")
        return "\n".join(lines)


class Nothing(nn.Module):
    """The function that adds nothing: G of the last coupling of an odd number of functions."""

    def forward(self, x: Tensor) -> Tensor:
        """Return a zero of the dtype and on the device of x."""
        return x.new_zeros(())


class _AfterReLU(nn.Module):
    """A residual function that takes the ReLU of the stream."""

    def __init__(self, function: nn.Module):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return self.function(x.relu(), **kwargs)

    def keywords_taken(self, names: Iterable[str]) -> set[str]:
        return keywords_taken(self.function, names)


class TwoStreams(nn.Module):
    """A chain of couplings on two streams that start as x; returns x and all that was added to either.

    Args:
        functions: the residual functions, in turn F and G of a coupling.
        relu_after: apply a ReLU to what is returned.
    """

    def __init__(self, functions: Sequence[nn.Module], *, relu_after: bool = False):
        super().__init__()
        functions = [*functions, Nothing()] if len(functions) % 2 else functions
        pairs = zip(functions[::2], functions[1::2], strict=True)
        self.chain = ReversibleSequential(*(AdditiveCoupling(f, g, split_dim=0) for f, g in pairs))
        self.relu_after = relu_after

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        """Return a tensor of the shape of x. Keyword arguments go to the functions that take them."""
        y1, y2 = self.chain(torch.cat((x, x)), **kwargs).chunk(2)
        y = y1 + (y2 - x)
        return y.relu() if self.relu_after else y

    def keywords_taken(self, names: Iterable[str]) -> set[str]:
        """Return those of the names that one of the functions takes."""
        return self.chain.keywords_taken(names)


class ReversibleStack(nn.Module):
    """Reversible parts, and blocks that are as they were, one after the other.

    Args:
        *parts: the modules, in order.
    """

    def __init__(self, *parts: nn.Module):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        """Return the output of the last part. Each keyword argument goes to the parts that take it."""
        if kwargs:
            refuse_unknown(self, kwargs)
        for part in self.parts:
            x = part(x, **taken(part, kwargs))
        return x

    def keywords_taken(self, names: Iterable[str]) -> set[str]:
        """Return those of the names that one of the parts takes."""
        return {name for part in self.parts for name in keywords_taken(part, names)}


class _Called(nn.Module):
    """A module with fixed keyword arguments. Tensors among them are buffers: a prediction replaces buffers by tensors
    without values."""

    def __init__(self, module: nn.Module, kwargs: Mapping[str, Any]):
        super().__init__()
        self.module, self.kwargs = module, dict(kwargs)
        for name, value in kwargs.items():
            if isinstance(value, Tensor):
                self.register_buffer(f"given_{name}", value)

    def forward(self, x: Tensor) -> Tensor:
        given = {name: getattr(self, f"given_{name}", value) for name, value in self.kwargs.items()}
        return self.module(x, **given)


class _Block(nn.Module):
    """A block of the stack as it was, and what was found in it."""

    def __init__(self, name: str, block: nn.Module, kwargs: Mapping[str, Any]):
        super().__init__()
        self.title = f"{name}: {type(block).__name__}"
        self.block = block
        encoder_names = {"mask": "src_mask"} if isinstance(block, nn.TransformerEncoderLayer) else {}
        self.kwargs = taken(block, {encoder_names.get(name, name): value for name, value in kwargs.items()})
        self.call = _Called(block, self.kwargs)
        self.found: Residual | None = None
        self.reason = ""

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x)

    def find(self, move_relu: bool, x: Tensor) -> None:
        """Set ``found``, or the ``reason`` why the block is not residual."""
        try:
            found = residual_of(self.block, list(self.kwargs))
            if found.relu_after and not move_relu:
                raise NotResidual(
                    "it applies a ReLU to its sum, so that negative values are lost; move_relu=True moves the ReLU to "
                    "the input of the next block's function, which changes what the stack computes"
                )
            for training in (True, False):
                _check(self, found, x, training)
            self.found = found
        except NotResidual as reason:
            self.reason = str(reason)


def to_reversible(
    module: nn.Module | Sequence[nn.Module],
    sample: Tensor,
    kwargs: Mapping[str, Any] | None = None,
    *,
    keep_others: bool = False,
    move_relu: bool = False,
    measure: bool = True,
) -> tuple[ReversibleStack, StackReport]:
    """Make a stack of residual blocks reversible. Parameters are neither added nor copied.

    ::

        model.layer1, report = memcnn.to_reversible(model.layer1, torch.randn(2, 64, 56, 56), move_relu=True)
        print(report)

    The result and the blocks share parameters and buffers. The names in its state dict are others: load trained weights
    before.

    Args:
        module: the blocks, as ``nn.Sequential``, ``nn.ModuleList``, list or tuple, such as ``resnet.layer1``,
            ``vit.blocks`` or ``vit.encoder.layers``; or an ``nn.TransformerEncoder`` or ``nn.TransformerDecoder``.
        sample: an input of the first block, for which blocks and residual functions are compared.
        kwargs: keyword arguments of the blocks, such as masks, or the ``memory`` of an ``nn.TransformerDecoder``. The
            result takes arguments of these names, and needs them where the block's ``forward`` used them. Masks of
            ``nn.TransformerEncoder`` remain optional.
        keep_others: leave blocks that are not residual as they are, instead of refusing the stack.
        move_relu: also convert blocks that apply a ReLU to their sum, as a torchvision ResNet's do. The ReLU moves to
            the input of the next block's function, and the shortcut passes it by. The last one follows the stack.
        measure: predict memory, and measure it by training steps on copies of the stack.

    Returns:
        The reversible stack, and a report of what changed.

    Raises:
        TypeError: ``module`` is no stack of modules.
        ValueError: a block is not residual, or none is; the message has the reason for each.
    """
    if not isinstance(sample, Tensor) or not sample.is_floating_point():
        got = sample.dtype if isinstance(sample, Tensor) else type(sample).__name__
        raise TypeError(f"sample must be a floating-point tensor, an input of the first block: got {got}")
    kwargs = dict(kwargs or {})
    blocks, after = _blocks_of(module, kwargs)
    _refuse_unknown_keywords(blocks, kwargs)
    x = sample.detach()
    for block in blocks:
        block.find(move_relu, x)
        x = _output_of(block, x)
        if block is not blocks[-1] and not isinstance(x, Tensor):
            raise ValueError(
                f"block {block.title} returns a {type(x).__name__}, but a stack hands one tensor from block to block: "
                "let its forward return that tensor alone, and compute what else it returns outside of the stack"
            )
    _refuse(blocks, keep_others)
    stack = ReversibleStack(*_parts(blocks), *after)
    before = ReversibleStack(*blocks, *after)
    return stack, _report(before, stack, sample, kwargs, measure)


def _output_of(block: _Block, x: Tensor) -> Any:
    """Return the output of a block for the sample, in evaluation mode."""
    try:
        return _outcome(block, block, x, training=False)[0]
    except Exception as error:  # whatever the block raises
        raise ValueError(f"block {block.title} fails on the sample: {type(error).__name__}: {error}") from error


def _blocks_of(module: nn.Module | Sequence[nn.Module], kwargs: Mapping[str, Any]) -> tuple[list[_Block], list]:
    """Return the blocks of a stack, those of nested ``nn.Sequential`` included, and what follows them."""
    after: list[nn.Module] = []
    if isinstance(module, nn.TransformerEncoder | nn.TransformerDecoder):
        after = [module.norm] if module.norm is not None else []
        module = module.layers
    if not _is_stack(module):
        raise TypeError(
            f"to_reversible got a {type(module).__name__}; wanted the blocks themselves: an nn.Sequential, "
            "nn.ModuleList, list or tuple of modules, such as resnet.layer1, vit.blocks or vit.encoder.layers, or an "
            "nn.TransformerEncoder or nn.TransformerDecoder"
        )
    blocks = [_Block(name, block, kwargs) for name, block in _flat("", module)]
    if not blocks:
        raise ValueError("to_reversible got a stack without a block; wanted one residual block or more")
    return blocks, after


def _is_stack(module: object) -> bool:
    if isinstance(module, nn.Module):
        runs_in_order = isinstance(module, nn.ModuleList) or type(module).forward is nn.Sequential.forward
        return runs_in_order and not any(getattr(module, name) for name in HOOKS)
    return isinstance(module, list | tuple) and all(isinstance(block, nn.Module) for block in module)


def _flat(prefix: str, stack: Any) -> Iterator[tuple[str, nn.Module]]:
    named = stack._modules.items() if isinstance(stack, nn.Module) else enumerate(stack)  # repeated blocks included
    for name, block in ((name, block) for name, block in named if block is not None):
        if _is_stack(block):
            yield from _flat(f"{prefix}{name}.", block)
        else:
            yield f"{prefix}{name}", block


def _refuse_unknown_keywords(blocks: Sequence[_Block], kwargs: Mapping[str, Any]) -> None:
    known = {name for block in blocks for name in block.kwargs} | {"mask"}
    if unknown := [name for name in kwargs if name not in known]:
        raise TypeError(f"no block of the stack takes the keyword argument {unknown[0]!r}: correct its name")


def _refuse(blocks: Sequence[_Block], keep_others: bool) -> None:
    """Raise a ValueError if no block is residual, or if one is not and it must not be kept."""
    reasons = [f"{block.title}: {block.reason}" for block in blocks if block.found is None]
    if len(reasons) == len(blocks) or (reasons and not keep_others):
        fix = "" if len(reasons) == len(blocks) else "; leave these out, or keep them as they are with keep_others=True"
        listed = "\n  ".join(reasons)
        raise ValueError(f"{len(reasons)} of {len(blocks)} blocks cannot be made reversible{fix}:\n  {listed}")


def _parts(blocks: Sequence[_Block]) -> Iterator[nn.Module]:
    """Yield ``TwoStreams`` for neighbouring residual blocks, and each of the others as it is."""
    functions: list[nn.Module] = []
    relu_waits = False
    for block in blocks:
        if block.found is not None:
            first, *others = block.found.functions
            functions += [_AfterReLU(first) if relu_waits else first, *others]
            relu_waits = block.found.relu_after
            continue
        if functions:
            yield TwoStreams(functions, relu_after=relu_waits)
        functions, relu_waits = [], False
        yield block.block
    if functions:
        yield TwoStreams(functions, relu_after=relu_waits)


def _check(block: _Block, found: Residual, x: Tensor, training: bool) -> None:
    """Compare a block with its residual functions; raise ``NotResidual`` where they differ."""
    mode = "training" if training else "evaluation"

    def sums(x: Tensor) -> Tensor:
        for function in found.functions:
            before = x._version
            added = function(x, **taken(function, block.kwargs))
            if x._version != before:
                raise NotResidual(
                    "its residual function modifies its input in place: make that an out-of-place operation"
                )
            x = x + added
        return x.relu() if found.relu_after else x

    both = nn.ModuleList([block, *found.functions])
    attributes = {name: value for name, value in vars(block.block).items() if not name.startswith("_")}
    try:
        expected, buffers = _outcome(both, block, x, training)
    except Exception as error:  # whatever the block raises
        raise NotResidual(f"it fails on the sample in {mode} mode: {type(error).__name__}: {error}") from error
    if changed := [name for name, value in attributes.items() if vars(block.block).get(name) is not value]:
        raise NotResidual(f"its forward sets its attribute {changed[0]!r}, which the residual functions would not do")
    if not isinstance(expected, Tensor) or expected.shape != x.shape or expected.dtype != x.dtype:
        got = f"{expected.dtype} {tuple(expected.shape)}" if isinstance(expected, Tensor) else type(expected).__name__
        raise NotResidual(f"it maps {x.dtype} {tuple(x.shape)} to {got}; a stream must keep both")
    actual, own_buffers = _outcome(both, sums, x, training)
    difference = relative_difference(actual, expected)
    if not difference <= torch.finfo(x.dtype).eps ** 0.5:
        raise NotResidual(
            f"in {mode} mode its output differs from that of its residual functions, relatively by {difference:.1e}"
        )
    if any(not _close(a, b) for a, b in zip(buffers, own_buffers, strict=True)):
        raise NotResidual(f"in {mode} mode its residual functions do not change its buffers as it does")


def _outcome(root: nn.Module, call: Callable[[Tensor], Any], x: Tensor, training: bool) -> tuple[Any, list[Tensor]]:
    """Return ``call(x)`` in training or evaluation mode, and the buffers of ``root`` then; leave no trace."""
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


def _close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a.double(), b.double(), rtol=1e-3, atol=1e-6, equal_nan=True)


def relative_difference(a: Tensor, b: Tensor) -> float:
    """Return the norm of a - b relative to that of b."""
    a, b = a.double(), b.double()
    return float((a - b).norm() / b.norm().clamp(min=torch.finfo(b.dtype).tiny))


def _report(
    before: ReversibleStack, stack: ReversibleStack, sample: Tensor, kwargs: Mapping[str, Any], measure: bool
) -> StackReport:
    """Compare the stack with what it was."""
    blocks = [part for part in before.parts if isinstance(part, _Block)]
    y, error = _outcome(stack, lambda x: _run(stack, x, kwargs), sample, training=False)[0]
    if not error <= _DRIFT:
        warnings.warn(
            f"the reversible stack rebuilds its streams with a relative error of {error:.1e}; gradients will be as "
            "wrong. Keep the streams in float32 (autocast serves for the functions), or use a shorter stack",
            stacklevel=3,
        )
    report = StackReport(
        converted=tuple(f"{block.title}, {_count(block.found)}" for block in blocks if block.found),
        kept=tuple(f"{block.title}: {block.reason}" for block in blocks if not block.found),
        changes=tuple(_changes(stack)),
        parameters=(_parameters(before), _parameters(stack)),
        output_difference=relative_difference(y, _outcome(before, before, sample, training=False)[0]),
        rebuild_error=error,
    )
    sides = [_Called(before, {}), _Called(stack, kwargs)]
    if not measure:
        return report
    measured: Any = tuple(_measured(side, sample) for side in sides)
    try:
        predicted: Any = tuple(_predicted(side, sample) for side in sides)
    except Exception as failure:  # whatever an operator without a shape function raises
        return replace(report, measured_bytes=measured, not_predicted=f"{type(failure).__name__}: {failure}")
    return replace(report, measured_bytes=measured, predicted_bytes=predicted)


def _run(stack: ReversibleStack, x: Tensor, kwargs: Mapping[str, Any]) -> tuple[Tensor, float]:
    """Return the stack's output, and the largest relative error of rebuilt streams."""
    error = 0.0
    for part in stack.parts:
        given = taken(part, kwargs)
        if isinstance(part, TwoStreams):
            streams = torch.cat((x, x))
            rebuilt = part.chain.inverse(part.chain(streams, **given), **given)
            error = max(error, relative_difference(rebuilt, streams))
        x = part(x, **given)
    return x, error


def _changes(stack: ReversibleStack) -> Iterator[str]:
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


def _functions(part: TwoStreams) -> int:
    couplings = [wrapper._fn for wrapper in part.chain]
    functions = [
        f for coupling in couplings if isinstance(coupling, AdditiveCoupling) for f in (coupling.Fm, coupling.Gm)
    ]
    return sum(not isinstance(f, Nothing) for f in functions)


def _moves_relu(part: TwoStreams) -> bool:
    return any(isinstance(f, _AfterReLU) for f in part.modules())


def _count(found: Residual) -> str:
    return f"{len(found.functions)} residual function{'s' * (len(found.functions) > 1)}"


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _measured(side: nn.Module, sample: Tensor) -> int:
    """Return the bytes of activations at the peak of a training step of a copy."""
    model, _, batch, step = training_step(
        lambda: copy.deepcopy(side),
        lambda: (sample.detach().clone().requires_grad_(), sample),
        loss=_loss,
        optimizer=None,
    )
    with torch.random.fork_rng(devices=[sample.device] if sample.is_cuda else []):
        return measure_peak_split(model, step, batch=batch).activation_bytes


def _predicted(side: nn.Module, sample: Tensor) -> int:
    def batch() -> tuple[Tensor, Tensor]:
        x = torch.empty_strided(sample.shape, sample.stride(), dtype=sample.dtype, device=sample.device)
        return x.requires_grad_(), x

    return predict_step_memory(lambda: side, batch, loss=_loss, optimizer=None).activation_bytes


def _loss(y: Tensor, _: Tensor) -> Tensor:
    return y.float().square().mean()
