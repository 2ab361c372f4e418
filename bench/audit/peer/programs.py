"""Small training programs, and branches that record how an engine evaluates them.

A program receives a chain and a leaf input. It returns the tensors to compare with those of plain autograd.
"""

import copy
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from .chains import conv_branch
from .shared import weighted_sum

Found = dict[str, Tensor]
"""The result of a program: the tensors to compare, by a name that a message can show."""


class Masked(nn.Module):
    """A branch behind dropout. It records every mask that it draws in this process.

    The contender runs first. Then plain autograd runs with the recorded masks, so that it does not depend on the seeds
    that the contender has set.
    """

    drawn: ClassVar[list[Tensor]] = []
    given: ClassVar[list[Tensor]] = []

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
        self.branch = conv_branch(channels)
        self.others: list[bool] = []  # a list, because an engine may restore a number before it recomputes

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


def gradients_by_plain(model: nn.Module, x: Tensor) -> Found:
    """Return the gradients of an ordinary step, for programs that plain autograd refuses."""
    differentiate(model(x.clone()))
    return gradients(model, x)
