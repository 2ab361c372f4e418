"""The rows of a Jacobian are computed many at a time, or one by one if an operator does not support batches."""

import torch
from torch import Tensor, nn

from memcnn.testing.laws.jacobians import ROWS_AT_ONCE, gradients_of_each


class ReadsItsGradient(torch.autograd.Function):
    """The identity. Its backward function reads a value, which fails for a batch of gradients (vmap)."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient if float(gradient.sum()) else torch.zeros_like(gradient)


def jacobian(last, batched: bool) -> tuple[Tensor, int]:
    """Return a Jacobian of shape (150, 150), and in how many backward passes it was computed."""
    torch.manual_seed(0)
    x, passes = torch.randn(150, dtype=torch.float64, requires_grad=True), []
    y = last(nn.Linear(150, 150, dtype=torch.float64)(x).tanh())
    y.grad_fn.register_hook(lambda *_: passes.append(1))
    return gradients_of_each(y, x, batched=batched), len(passes)


def test_the_rows_are_the_same_at_once_and_one_by_one():
    wanted, one_by_one = jacobian(torch.sin, batched=False)
    got, at_once = jacobian(torch.sin, batched=True)
    assert (one_by_one, at_once) == (150, -(-150 // ROWS_AT_ONCE))
    torch.testing.assert_close(got, wanted)


def test_an_operator_that_allows_one_gradient_at_a_time_has_its_rows_one_by_one():
    wanted, _ = jacobian(torch.sin, batched=False)
    got, passes = jacobian(lambda y: ReadsItsGradient.apply(torch.sin(y)), batched=True)
    assert passes >= 150
    torch.testing.assert_close(got, wanted)
