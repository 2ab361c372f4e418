"""Compare a block with its residual functions on a sample: output, buffers and gradients, in both modes."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from memcnn.models.keywords import taken
from memcnn.models.recording import NotResidual, changes_restored
from memcnn.models.residual import Residual
from memcnn.models.stack_report import Called, outcome, relative_difference

__all__ = ["refuse_differences"]


class _Results(NamedTuple):
    output: Any
    buffers: list[Tensor]
    gradients: dict[str, Tensor] | None


def refuse_differences(block: Called, found: Residual, x: Tensor, training: bool) -> None:
    """Raise ``NotResidual`` where a block differs from its residual functions.

    Args:
        block: the block with its keyword arguments.
        found: its residual functions.
        x: the sample.
        training: compare in training mode, otherwise in evaluation mode.
    """
    both = nn.ModuleList([block, *found.functions])
    expected = _of_block(block, both, x, training)
    wanted, mode = expected.output, "training" if training else "evaluation"
    if not isinstance(wanted, Tensor) or wanted.shape != x.shape or wanted.dtype != x.dtype:
        got = f"{wanted.dtype} {tuple(wanted.shape)}" if isinstance(wanted, Tensor) else type(wanted).__name__
        raise NotResidual(f"it maps {x.dtype} {tuple(x.shape)} to {got}; a stream keeps dtype and shape")
    actual = _of_functions(block, found, both, x, training)
    difference = relative_difference(actual.output, wanted)
    if not difference <= torch.finfo(x.dtype).eps ** 0.5:
        raise NotResidual(
            f"in {mode} mode its output differs from that of its residual functions, relatively by {difference:.1e}"
        )
    names = {id(buffer): name for name, buffer in block.module.named_buffers()}
    buffers = zip(both.buffers(), actual.buffers, expected.buffers, strict=True)
    if changed := ", ".join(names.get(id(buffer), "a mask") for buffer, a, b in buffers if not _close(a, b)):
        raise NotResidual(
            f"in {mode} mode its residual functions do not change its buffers as it does ({changed}): change them in "
            "the forward of a child module"
        )
    if expected.gradients is None:
        return
    if actual.gradients is None:
        raise NotResidual(f"in {mode} mode its residual functions cannot be differentiated, but it can")
    eps = max(torch.finfo(tensor.dtype).eps for tensor in (x, *_inputs(block).values()))
    if differing := _differing(actual.gradients, expected.gradients, eps):
        raise NotResidual(
            f"in {mode} mode its gradients of {', '.join(differing)} differ from those of its residual functions, "
            f"relatively by up to {max(differing.values()):.1e}: torch.fx does not record what affects gradients "
            "alone, such as in-place operations under torch.no_grad(). Move that to the forward of a child module"
        )


def _of_block(block: Called, both: nn.Module, x: Tensor, training: bool) -> _Results:
    """Return the results of the block. One that cannot be differentiated has no gradients."""
    with changes_restored(block.module) as changes:
        try:
            output, buffers = outcome(both, block, x, training)
        except Exception as error:  # whatever the block raises
            mode = "training" if training else "evaluation"
            raise NotResidual(f"it fails on the sample in {mode} mode: {type(error).__name__}: {error}") from error
        if changed := changes():
            raise NotResidual(changed)
        gradients = None
        with changes_restored(block.module) as changes_again:
            with suppress(Exception):  # such as that of an operation without a derivative
                gradients, _ = outcome(both, lambda x: _gradients(block, x, _inputs(block)), x, training)
            if changed := changes_again():
                raise NotResidual(changed)
        return _Results(output, buffers, gradients)


def _of_functions(block: Called, found: Residual, both: nn.Module, x: Tensor, training: bool) -> _Results:
    """Return the results of the residual functions."""

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

    output, buffers = outcome(both, sums, x, training)
    try:
        gradients, _ = outcome(both, lambda x: _gradients(sums, x, _inputs(block)), x, training)
    except RuntimeError:
        gradients = None
    return _Results(output, buffers, gradients)


def _close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a.double(), b.double(), rtol=1e-3, atol=1e-6, equal_nan=True)


def _inputs(block: Called) -> dict[str, Tensor]:
    """Return the parameters and keyword arguments of the block that have gradients."""
    tensors = {**dict(block.module.named_parameters()), **block.kwargs}
    return {name: value for name, value in tensors.items() if isinstance(value, Tensor) and value.requires_grad}


def _gradients(call: Callable[[Tensor], Any], x: Tensor, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the gradients of the input and of ``inputs`` for a random gradient of the output."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        y = call(x.clone())  # which is no leaf, so that it may be changed in place
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(y.shape, generator=generator, device="cpu").to(y)
        wanted = {"its input": x, **inputs}
        found = torch.autograd.grad(y, list(wanted.values()), weight, allow_unused=True)
        return {name: torch.zeros(()) if g is None else _real(g) for name, g in zip(wanted, found, strict=True)}


def _real(gradient: Tensor) -> Tensor:
    """Return a gradient as a dense tensor of float64."""
    gradient = gradient.detach().to_dense()
    return (torch.view_as_real(gradient) if gradient.is_complex() else gradient).double()


def _differing(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], eps: float) -> dict[str, float]:
    """Return the names of gradients that differ, with their relative differences.

    Block and functions do the same operations; only sums may be in another order. The limit, 10 sqrt(eps),
    leaves room for a ReLU that this rounding turns on or off. A gradient that is small beside the others, as that of a
    bias before a norm, may consist of rounding alone: its difference is relative to sqrt(eps) of the largest norm.
    """
    norms = {name: float(g.nan_to_num(0, 0, 0).norm()) for name, g in expected.items()}
    floor = max(eps**0.5 * max(norms.values()), torch.finfo(torch.float64).tiny)
    differing = {}
    for name, wanted in expected.items():
        equal = (actual[name] == wanted) | (actual[name].isnan() & wanted.isnan())
        difference = float((actual[name] - wanted).masked_fill(equal, 0).norm()) / max(norms[name], floor)
        if not difference <= 10 * eps**0.5:
            differing[name] = difference
    return differing
