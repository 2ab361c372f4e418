"""The comparison of a block with its residual functions: gradients too, without refusing blocks that are right."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

import memcnn
from memcnn.testing.tolerances import relative_error, tolerance
from properties.support.residual import Residual, convert, residual_block


def in_place_without_gradients(self, x):
    y = self.function(x)
    with torch.no_grad():
        doubled = y.mul_(2)
    return x + y + 0 * doubled


def test_other_gradients_are_refused_by_name():
    block = residual_block(forward=in_place_without_gradients)
    message = "in training mode its gradients of its input, gain, linear.weight, norm.weight, norm.bias differ"
    with pytest.raises(ValueError, match=f"{message} .* to the forward of a child module"):
        convert(block)


class Recurrent(nn.Module):
    """An LSTM that returns its outputs alone, and spectral norm."""

    def __init__(self):
        super().__init__()
        self.lstm, self.last = nn.LSTM(6, 6, batch_first=True), spectral_norm(nn.Linear(6, 6))

    def forward(self, x):
        return x + self.last(self.lstm(x[None])[0][0])


class Looked(nn.Module):
    """A residual block with an embedding of integers, whose gradient is sparse, and a complex parameter."""

    def __init__(self):
        super().__init__()
        self.embedding, self.turn = nn.Embedding(3, 6, sparse=True), nn.Parameter(torch.ones(6, dtype=torch.complex64))

    def forward(self, x, index):
        return x + (self.turn * (x + self.embedding(index))).real


def frozen() -> nn.Module:
    return Residual().requires_grad_(False)


def with_nan_gradients() -> nn.Module:
    return residual_block(forward=lambda self, x: x + (self.function(x).abs() * 0).sqrt())


def without_derivative() -> nn.Module:
    return residual_block(
        forward=lambda self, x: x + self.function(torch.bitwise_not(x.int()).float() + 0 * x).detach()
    )


class NotDifferentiable(nn.Module):
    """A function of NumPy."""

    def forward(self, x):
        return torch.from_numpy(x.numpy())


def of_numpy() -> nn.Module:
    block = residual_block(forward=lambda self, x: x + self.function(self.child(x)))
    block.child = NotDifferentiable()
    return block


class Deep(nn.Module):
    """Biases before norms, whose gradients are rounding, and a sum of three terms, whose order changes."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Sequential(nn.Linear(6, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 6))
                          for _ in range(2))  # fmt: skip
        self.c = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))

    def forward(self, x):
        return self.a(x) + x + self.b(x) + self.c(x)


RIGHT = {
    "recurrent": Recurrent,
    "frozen": frozen,
    "NaN gradients": with_nan_gradients,
    "detached": without_derivative,
    "NumPy": of_numpy,
    "three terms": Deep,
    "float16": lambda: Residual().half(),
    "bfloat16": lambda: Deep().bfloat16(),
    "dropout": lambda: residual_block(forward=lambda self, x: x + F.dropout(self.function(x), 0.3)),
}


@pytest.mark.filterwarnings("ignore:.* rebuild:UserWarning", "ignore:rebuilding a:UserWarning")
@pytest.mark.parametrize("make", RIGHT.values(), ids=RIGHT)
def test_blocks_that_are_right_are_converted(make):
    block = make().eval()
    x = torch.randn(64, 6, dtype=next(block.parameters()).dtype)
    stack, report = memcnn.to_reversible([block], x, measure=False)
    assert report.output_difference <= tolerance(x.dtype, depth=8)
    torch.manual_seed(1)
    wanted = block(x)
    torch.manual_seed(1)
    assert relative_error(stack.eval()(x), wanted) <= tolerance(x.dtype, depth=8)


def test_integers_and_gradients_that_are_sparse_or_complex_are_compared():
    block, x, index = Looked(), torch.randn(4, 6), torch.tensor([0, 1, 2, 1])
    stack, _ = memcnn.to_reversible([block], x, {"index": index}, measure=False)
    assert relative_error(stack(x, index=index), block(x, index)) <= tolerance(x.dtype, depth=2)


class LookedInPlace(Looked):
    """The same with other gradients than its record."""

    def forward(self, x, index):
        y = super().forward(x, index) - x
        with torch.no_grad():
            doubled = y.mul_(2)
        return x + y + 0 * doubled


def test_other_gradients_that_are_sparse_or_complex_are_refused():
    with pytest.raises(ValueError, match="gradients of its input, turn, embedding.weight differ"):
        memcnn.to_reversible([LookedInPlace()], torch.randn(4, 6), {"index": torch.tensor([0, 1, 2, 1])})


def test_keyword_arguments_with_a_graph_keep_it_and_their_gradients():
    block = residual_block(forward=lambda self, x, memory: x + self.function(x) * memory)
    leaf, x = torch.ones(6, requires_grad=True), torch.randn(4, 6)
    memory = leaf.exp()
    memcnn.to_reversible([block], x, {"memory": memory})
    memory.sum().backward()
    assert torch.equal(leaf.grad, memory)


def test_the_comparison_leaves_gradients_as_they_are():
    block = Residual()
    for i, parameter in enumerate(block.parameters()):
        parameter.grad = torch.full_like(parameter, i)
    x = torch.randn(4, 6, requires_grad=True)
    memcnn.to_reversible([block], x)
    assert x.grad is None
    assert all(torch.equal(p.grad, torch.full_like(p, i)) for i, p in enumerate(block.parameters()))
