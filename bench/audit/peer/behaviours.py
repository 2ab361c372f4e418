"""Small training programs. A contender gets a program right if its results equal those of plain autograd.

A program receives a chain and a leaf input, both in float64 unless it asks for another dtype. It returns the tensors to
compare.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .chains import chain, conv_branch
from .shared import relative_errors, tolerance, weighted_sum, worst

BLOCKS, CHANNELS = 2, 6
LIMIT = tolerance(torch.float64, depth=2 * BLOCKS)
"""Largest relative error that counts as right: the tolerance of the laws for a chain of this depth."""

Found = dict[str, Tensor]


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


class Masked(nn.Module):
    """A branch behind dropout. It records every mask that it draws in this process.

    The contender runs first. Then plain autograd runs with the recorded masks, so that it does not depend on the seeds
    that the contender has set.
    """

    drawn: list[Tensor] = []
    given: list[Tensor] = []

    def __init__(self, channels: int):
        super().__init__()
        self.branch = conv_branch(channels)

    def forward(self, x: Tensor) -> Tensor:
        mask = self.given.pop(0) if self.given else torch.bernoulli(torch.full_like(x, 0.5))
        self.drawn.append(mask.detach())
        return self.branch(x * mask)


class Probed(nn.Module):
    """A branch that counts the evaluations whose convolution did not run in bfloat16."""

    def __init__(self, channels: int):
        super().__init__()
        self.branch, self.others = (
            conv_branch(channels),
            [],
        )  # a list, because an engine may restore a number before it recomputes

    def forward(self, x: Tensor) -> Tensor:
        y = self.branch[0](x)
        self.others.append(y.dtype != torch.bfloat16)
        return self.branch[1:](y)


def differentiate(y: Tensor) -> None:
    """Run the backward pass of a weighted sum of y."""
    weighted_sum(y).backward()


def parameters(model: nn.Module) -> Found:
    """Return the gradients of the branches' parameters."""
    return {f"gradient of {name}": p.grad for name, p in model.branches.named_parameters() if p.grad is not None}


def gradients(model: nn.Module, x: Tensor) -> Found:
    """Return the gradients of the input and of the parameters, as far as there are any."""
    return {"gradient of the input": x.grad, **parameters(model)} if x.grad is not None else parameters(model)


def around(before: Callable = torch.clone, after: Callable = lambda y: y) -> Callable:
    """Return a program that differentiates ``after(model(before(x)))``."""

    def program(model: nn.Module, x: Tensor) -> Found:
        y = after(model(before(x)))
        differentiate(y)
        return {"output": y, **gradients(model, x)}

    return program


def output(model, x):
    with torch.no_grad():
        h = x.clone()
    return {"output": model(h)}


def input_gradient(model, x):
    differentiate(model(x.clone()))
    return {"gradient of the input": x.grad}


def parameter_gradients(model, x):
    differentiate(model(x.clone()))
    return parameters(model)


def leaf_input(model, x):
    differentiate(model(x))
    return {"gradient of the input": x.grad}


def accumulated(model, x):
    for factor in (1, 2):
        differentiate(factor * model(x))
    return gradients(model, x)


def intact(name: str, tensor: Tensor) -> Found:
    """Return the size of the tensor's storage, and its values unless the storage is empty."""
    bytes_there = tensor.untyped_storage().nbytes()
    return {"bytes": torch.tensor(bytes_there), **({name: tensor} if bytes_there else {})}


def input_after_forward(model, x):
    h = x.clone()
    y = model(h)
    return {**intact("input", h), "output": y}


def input_after_backward(model, x):
    h = x.clone()
    differentiate(model(h))
    return intact("input", h)


def output_after_backward(model, x):
    y = model(x.clone())
    differentiate(y)
    return intact("output", y)


def inference(model, x):
    with torch.no_grad():
        batch = x.clone()
        y = model(batch)
    return {**intact("batch", batch), "output": y}


def moves(model, x):
    """Return how often the first BatchNorm updated its statistics in a step."""
    differentiate(model(x.clone()))
    return {"moves": next(b for name, b in model.branches.named_buffers() if name.endswith("num_batches_tracked"))}


def statistics(model, x):
    differentiate(model(x.clone()))
    return {name: b for name, b in model.branches.named_buffers() if "running" in name}


def two_forwards_one_backward(model, x):
    y, other = model(x.clone()), model(x.flip(0))
    differentiate(y * other)
    return gradients(model, x)


def two_forwards_two_backwards(model, x):
    first, second = weighted_sum(model(x.clone())), weighted_sum(model(x.flip(0)))
    first.backward()
    second.backward()
    return gradients(model, x)


def skip(model, x):
    h = x * 2
    differentiate(h + model(h))
    return gradients(model, x)


def input_used_elsewhere(model, x):
    h = x.sin()
    differentiate(model(h) * h.exp())
    return gradients(model, x)


def autograd_grad(model, x):
    wanted = [x, *model.branches.parameters()]
    return {str(i): g for i, g in enumerate(torch.autograd.grad(weighted_sum(model(x.clone())), wanted))}


def backward_inputs(model, x):
    first = next(model.branches.parameters())
    weighted_sum(model(x.clone())).backward(inputs=[first])
    return gradients(model, x)


def retained(model, x):
    value = weighted_sum(model(x.clone()))
    value.backward(retain_graph=True)
    value.backward()
    return gradients(model, x)


def double_backward(model, x):
    (gradient,) = torch.autograd.grad(weighted_sum(model(x.clone()).sin()), x, create_graph=True)
    gradient.square().sum().backward()
    return gradients(model, x)


def autocast_evaluations(model, x):
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x.clone())
    differentiate(y)
    return {"float32 evaluations": torch.tensor(sum(sum(branch.others) for branch in model.branches))}


def frozen(model, x):
    for F_ in model.branches[::2]:
        F_.requires_grad_(False)
    differentiate(model(x.clone()))
    return gradients(model, x)


def no_input_gradient(model, x):
    differentiate(model(x.detach().clone()))
    return parameters(model)


def copied(model, x):
    differentiate(model(x.clone()))
    twin = copy.deepcopy(model)
    twin.zero_grad()
    x.grad = None
    differentiate(twin(x.clone()))
    return gradients(twin, x)


def hook_calls(model, x):
    calls = []
    for branch in model.branches:
        branch.register_forward_hook(lambda *_: calls.append(1))
    differentiate(model(x.clone()))
    return {"calls": torch.tensor(len(calls))}


def module_backward_hook_calls(model, x):
    calls = []
    for branch in model.branches:
        branch.register_full_backward_hook(lambda *_: calls.append(1))
    differentiate(model(x.clone()))
    return {"calls": torch.tensor(len(calls))}


def parameters_changed(model, x):
    value = weighted_sum(model(x.clone()))
    with torch.no_grad():
        for p in model.branches.parameters():
            p.mul_(1.5)
    value.backward()
    return gradients(model, x)


BEHAVIOURS = {
    behaviour.title: behaviour
    for behaviour in (
        Behaviour("output", output),
        Behaviour("gradient of the input", input_gradient),
        Behaviour("gradients of the parameters", parameter_gradients),
        Behaviour("input is a leaf: its gradient", leaf_input),
        Behaviour("input is a leaf: two steps accumulate", accumulated),
        Behaviour("caller's input intact after forward", input_after_forward),
        Behaviour("caller's input intact after backward", input_after_backward),
        Behaviour("caller's output intact after backward", output_after_backward),
        Behaviour("no_grad leaves the batch alone", inference),
        Behaviour("BatchNorm moves once a step", moves),
        Behaviour("BatchNorm's running statistics", statistics),
        Behaviour("dropout in F and G", around(), Masked),
        Behaviour("dropout, two forwards before two backwards", two_forwards_two_backwards, Masked),
        Behaviour("two forwards before two backwards", two_forwards_two_backwards),
        Behaviour("two forwards before one backward", two_forwards_one_backward),
        Behaviour("skip connection around the chain", skip),
        Behaviour("input used by something else", input_used_elsewhere),
        Behaviour("output used twice", around(after=lambda y: y * y.cos())),
        Behaviour("ReLU before the chain", around(before=F.relu)),
        Behaviour("sigmoid before the chain", around(before=torch.sigmoid)),
        Behaviour("torch.autograd.grad", autograd_grad),
        Behaviour("backward(inputs=...)", backward_inputs),
        Behaviour("retain_graph: two backward passes", retained, passes=2),
        Behaviour("double backward", double_backward),
        Behaviour("bfloat16 autocast: recomputed in it", autocast_evaluations, Probed, dtype=torch.float32),
        Behaviour("F frozen", frozen),
        Behaviour("input needs no gradient", no_input_gradient),
        Behaviour("deepcopy after a step", copied),
        Behaviour("channels_last input", around(lambda x: x.contiguous(memory_format=torch.channels_last))),
        Behaviour("strided input", around(lambda x: torch.cat([x, x], 3)[..., 1::2])),
        Behaviour("forward hooks on F and G called once", hook_calls),
        Behaviour("backward hooks on F and G called once", module_backward_hook_calls),
        Behaviour("parameters changed before backward: refused", parameters_changed, must_raise=True),
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


def gradients_by_plain(model: nn.Module, x: Tensor) -> Found:
    """Return the gradients of an ordinary step, for programs that plain autograd refuses."""
    differentiate(model(x.clone()))
    return gradients(model, x)


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
    model, x = _build_chain(build, Behaviour("", output, Counted))
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
