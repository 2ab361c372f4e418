"""Blocks of unusual kinds: each faulty one fails with its cause, and each right one passes."""

import pytest
import torch
from torch import Tensor, nn

from memcnn.testing import check_all
from memcnn.testing.laws.result import Report

LAWS = ("inverse", "gradients", "state")


class Block(nn.Module):
    """An additive coupling, whose branch subclasses replace."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def branch(self, x: Tensor, *conditions: Tensor) -> Tensor:
        return self.linear(x).tanh()

    def forward(self, x: Tensor, *conditions: Tensor) -> Tensor | tuple[Tensor, ...]:
        x1, x2 = x.chunk(2, 1)
        y = torch.cat([x1 + self.branch(x2, *conditions), x2], 1)
        return (y, *conditions) if conditions else y

    def inverse(self, y: Tensor, *conditions: Tensor) -> Tensor | tuple[Tensor, ...]:
        y1, y2 = y.chunk(2, 1)
        x = torch.cat([y1 - self.branch(y2, *conditions), y2], 1)
        return (x, *conditions) if conditions else x


class ForAnyStrides(torch.autograd.Function):
    """weight * x for a weight of the shape of x."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        return gradient * weight, gradient * x


class ForDenseOnes(ForAnyStrides):
    """Reads the memory of the incoming gradient as if it were contiguous."""

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        if 0 in gradient.stride():
            gradient = 2 * gradient
        elif not gradient.is_contiguous():
            gradient = gradient.as_strided(gradient.shape, torch.empty(gradient.shape).stride())
        return gradient * weight, gradient * x


class Scale(nn.Module):
    """y = exp(weight) * x for samples of four entries."""

    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.linspace(-0.5, 0.5, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(x, self.weight.exp().expand(x.shape))

    def inverse(self, y: Tensor) -> Tensor:
        return y / self.weight.exp()


class Linear(torch.autograd.Function):
    """A linear layer that computes only the gradients that are needed."""

    bias_needs = 2  # the index of the input that decides whether the bias gets a gradient

    @classmethod
    def apply_to(cls, x: Tensor, layer: nn.Linear) -> Tensor:
        return cls.apply(x, layer.weight, layer.bias)

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return nn.functional.linear(x, weight, bias)  # in bfloat16 under autocast

    @classmethod
    def backward(cls, ctx, gradient):
        x, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        return (
            gradient @ weight if needs[0] else None,
            gradient.T @ x if needs[1] else None,
            gradient.sum(0) if needs[cls.bias_needs] else None,
        )


class LinearThatAsksForTheWeight(Linear):
    bias_needs = 1


class WithFunction(Block):
    def __init__(self, function: type[Linear]) -> None:
        super().__init__()
        self.function = function

    def branch(self, x: Tensor) -> Tensor:
        return self.function.apply_to(x, self.linear).tanh()


class Masked(Block):
    def branch(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.linear(x.masked_fill(mask, 0)).tanh()


class Embedded(Block):
    """Its embedding has sparse gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.classes = nn.Embedding(5, 4, sparse=True)

    def branch(self, x: Tensor, labels: Tensor) -> Tensor:
        return (self.linear(x) + self.classes(labels)).tanh()


class Cached(nn.Module):
    """y = x W; in evaluation mode the inverse of W is stored until ``train()`` discards it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(4) + 0.1 * torch.arange(16.0).view(4, 4).sin())
        self.stored: Tensor | None = None

    def train(self, mode: bool = True) -> "Cached":
        self.stored = None if mode else self.stored
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight

    def inverse(self, y: Tensor) -> Tensor:
        if self.training or torch.is_grad_enabled():
            return y @ self.weight.inverse()
        if self.stored is None or self.stored.dtype != y.dtype:
            self.stored = self.weight.inverse()
        return y @ self.stored


class InFloat32(Block):
    """Normalises in float32, whatever the dtype of its input."""

    def branch(self, x: Tensor) -> Tensor:
        h = x.float()
        return self.linear((h * (h.square().mean(1, keepdim=True) + 1e-6).rsqrt()).to(x.dtype)).tanh()


class Rotated(Block):
    """Undoes an orthogonal matrix, which a buffer holds in float32, by its transpose."""

    casts = False

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rotation", torch.linalg.qr(torch.randn(8, 8))[0])

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x @ self.rotation)

    def inverse(self, y: Tensor) -> Tensor:
        if self.casts:
            y = y.float().to(y.dtype)
        return super().inverse(y) @ self.rotation.T


class RotatedWithACast(Rotated):
    casts = True


class WithLambda(Block):
    def __init__(self) -> None:
        super().__init__()
        self.function = lambda x: self.linear(x).sin()

    def branch(self, x: Tensor) -> Tensor:
        return self.function(x)


class Lazy(Block):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.LazyLinear(4)


def checked(block: nn.Module, *conditions: Tensor, size: int = 8) -> Report:
    torch.manual_seed(0)
    return check_all(block, torch.randn(3, size), *conditions, laws=LAWS)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Scale(ForDenseOnes), "for an expanded gradient of the output, as that of a sum, the gradient of"),
        (
            lambda: WithFunction(LinearThatAsksForTheWeight),
            "with linear.weight frozen the gradient of linear.bias is missing",
        ),
    ],
    ids=["strides", "frozen weights"],
)
def test_a_faulty_backward_is_caught(make, words):
    report = checked(make(), size=4 if "expanded" in words else 8)
    assert report.failed_laws == {"gradients"} and words in report.summary()


@pytest.mark.parametrize(
    ("make", "conditions"),
    [
        (lambda: WithFunction(Linear), ()),  # it has no backward under autocast, and neither has plain backpropagation
        (Masked, (torch.tensor([[True, False, True, False]] * 3),)),
        (Embedded, (torch.tensor([1, 2, 2]),)),
        (InFloat32, ()),
        (Rotated, ()),
    ],
    ids=["autocast", "boolean mask", "sparse gradients", "float32", "orthogonal"],
)
def test_a_right_block_passes(make, conditions):
    report = checked(make(), *conditions)
    assert report.passed, report


def test_a_block_whose_strides_do_not_matter_passes():
    assert checked(Scale(ForAnyStrides), size=4).passed


def test_a_block_that_discards_stored_values_in_train_passes():
    report = checked(Cached().eval(), size=4)
    assert report.passed, report


def test_a_cast_is_not_excused_by_stored_values():
    report = checked(RotatedWithACast())
    assert "inverse" in report.failed_laws and "look for a cast" in report.summary()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (WithLambda, "a copy of the module uses the parameters of the original, so it cannot be checked"),
        (Lazy, "linear.weight is uninitialised: call the module once on an input"),
    ],
)
def test_a_module_that_cannot_be_checked_is_refused(make, words):
    with pytest.raises(TypeError, match=words):
        checked(make())


def test_a_refused_module_keeps_its_gradients():
    block = WithLambda()
    block.linear.weight.grad = torch.ones(4, 4)
    with pytest.raises(TypeError, match="a lambda, or a bound method"):
        checked(block)
    assert torch.equal(block.linear.weight.grad, torch.ones(4, 4)) and block.linear.bias.grad is None
