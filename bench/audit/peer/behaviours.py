"""Programs that every contender runs. Their results must equal those under plain autograd."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import programs
from .chains import chain, conv_branch
from .programs import Found, Masked, differentiate, gradients_by_plain
from .shared import relative_errors, tolerance, worst

BLOCKS, CHANNELS = 2, 6
LIMIT = tolerance(torch.float64, depth=2 * BLOCKS)
"""Largest relative error that counts as right: the tolerance of the laws for a chain of this depth."""


@dataclass(frozen=True)
class Behaviour:
    """A program and the conditions under which it runs.

    Attributes:
        title: the name in the table.
        program: runs the chain on the input and returns the tensors to compare.
        branch: returns F or G for a number of channels.
        passes: number of backward passes after one forward pass.
        dtype: dtype of weights and input.
        must_raise: True if plain autograd raises a RuntimeError, so that a contender must raise one, too.
    """

    title: str
    program: Callable[[nn.Module, Tensor], Found]
    branch: Callable[[int], nn.Module] = conv_branch
    passes: int = 1
    dtype: torch.dtype = torch.float64
    must_raise: bool = False


BEHAVIOURS = {
    behaviour.title: behaviour
    for behaviour in (
        Behaviour("output", programs.output),
        Behaviour("gradient of the input", programs.input_gradient),
        Behaviour("gradients of the parameters", programs.parameter_gradients),
        Behaviour("input is a leaf: its gradient", programs.leaf_input),
        Behaviour("input is a leaf: two steps accumulate", programs.accumulated),
        Behaviour("caller's input intact after forward", programs.input_after_forward),
        Behaviour("caller's input intact after backward", programs.input_after_backward),
        Behaviour("caller's output intact after backward", programs.output_after_backward),
        Behaviour("no_grad leaves the batch alone", programs.inference),
        Behaviour("BatchNorm moves once a step", programs.moves),
        Behaviour("BatchNorm's running statistics", programs.statistics),
        Behaviour("dropout in F and G", programs.around(), Masked),
        Behaviour("dropout, two forwards before two backwards", programs.two_forwards_two_backwards, Masked),
        Behaviour("two forwards before two backwards", programs.two_forwards_two_backwards),
        Behaviour("two forwards before one backward", programs.two_forwards_one_backward),
        Behaviour("skip connection around the chain", programs.skip),
        Behaviour("input used by something else", programs.input_used_elsewhere),
        Behaviour("output used twice", programs.around(after=lambda y: y * y.cos())),
        Behaviour("ReLU before the chain", programs.around(before=F.relu)),
        Behaviour("sigmoid before the chain", programs.around(before=torch.sigmoid)),
        Behaviour("torch.autograd.grad", programs.autograd_grad),
        Behaviour("backward(inputs=...)", programs.backward_inputs),
        Behaviour("retain_graph: two backward passes", programs.retained, passes=2),
        Behaviour("double backward", programs.double_backward),
        Behaviour(
            "bfloat16 autocast: recomputed in it", programs.autocast_evaluations, programs.Probed, dtype=torch.float32
        ),
        Behaviour("F frozen", programs.frozen),
        Behaviour("input needs no gradient", programs.no_input_gradient),
        Behaviour("deepcopy after a step", programs.copied),
        Behaviour("channels_last input", programs.around(lambda x: x.contiguous(memory_format=torch.channels_last))),
        Behaviour("strided input", programs.around(lambda x: torch.cat([x, x], 3)[..., 1::2])),
        Behaviour("forward hooks on F and G called once", programs.hook_calls),
        Behaviour("backward hooks on F and G called once", programs.module_backward_hook_calls),
        Behaviour("parameters changed before backward: refused", programs.parameters_changed, must_raise=True),
    )
}


def examine(build: Callable[..., nn.Module], behaviour: Behaviour) -> dict:
    """Run a behaviour with a contender, and compare it with plain autograd.

    Returns:
        "outcome" ("right", "wrong" or "error"), "detail", and "error" (the relative error, or None).
    """
    try:
        found = _run_program(build, behaviour, behaviour.program)
    except Exception as error:
        message = (str(error).strip() or type(error).__name__).splitlines()[0]
        outcome = "right" if behaviour.must_raise and isinstance(error, RuntimeError) else "error"
        return {"outcome": outcome, "detail": f"{type(error).__name__}: {message}", "error": None}
    Masked.given = list(Masked.drawn)
    reference = gradients_by_plain if behaviour.must_raise else behaviour.program
    outcome = compare(found, _run_program(partial(chain, "plain"), behaviour, reference))
    return {**outcome, "outcome": "wrong"} if behaviour.must_raise else outcome


def compare(found: Found, wanted: Found) -> dict:
    """Compare integers exactly, and floating-point tensors up to ``LIMIT`` by the measure of ``memcnn.testing``."""
    for name, right in wanted.items():
        if not right.is_floating_point() and name in found and found[name] != right:
            return _wrong(f"{found[name].item()} {name}, not {right.item()}")
        if name not in found:
            return _wrong(f"{name} is missing")
        if found[name].shape != right.shape:
            return _wrong(f"{name} has shape {tuple(found[name].shape)}")
    if extra := sorted(found.keys() - wanted.keys()):
        return _wrong(f"{extra[0]}, expected none")
    name, error = worst(relative_errors(found, wanted))
    return {"outcome": "right" if error <= LIMIT else "wrong", "error": error, "detail": name}


def _wrong(why: str) -> dict:
    return {"outcome": "wrong", "error": None, "detail": why}


def evaluations(build: Callable[..., nn.Module]) -> dict[str, float]:
    """Return the average number of evaluations of a branch in the forward and the backward pass of a step."""

    class Counted(nn.Module):
        def __init__(self, channels: int):
            super().__init__()
            self.branch = conv_branch(channels)

        def forward(self, x: Tensor) -> Tensor:
            calls.append(1)
            return self.branch(x)

    calls: list[int] = []
    model, x = _build_chain(build, Behaviour("", programs.output, Counted))
    y = model(x.clone())
    forward = len(calls)
    differentiate(y)
    return {"forward": forward / len(model.branches), "backward": (len(calls) - forward) / len(model.branches)}


def _run_program(build: Callable[..., nn.Module], behaviour: Behaviour, program: Callable) -> Found:
    model, x = _build_chain(build, behaviour)
    torch.manual_seed(2)
    return {name: t.detach().clone() for name, t in program(model, x).items()}


def _build_chain(build: Callable[..., nn.Module], behaviour: Behaviour) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    branches = [behaviour.branch(CHANNELS // 2).to(behaviour.dtype) for _ in range(2 * BLOCKS)]
    x = torch.randn(4, CHANNELS, 8, 8, dtype=behaviour.dtype).requires_grad_()
    return build(branches, random=behaviour.branch is Masked, passes=behaviour.passes), x
