"""A user's own blocks under autocast: the engine does not mistake its rounding for another order of random numbers."""

import pytest
import torch
from torch import Tensor, nn

from memcnn import InvertibleModuleWrapper
from properties.support.twin import weighted_sum


class Dropping(nn.Module):
    """(x1, x2) -> (x1, x2 exp(s(x1))^n + t(x1)), with dropout in s and t. Both directions draw in the same order."""

    def __init__(self, power: int = 1):
        super().__init__()
        self.power = power
        self.s, self.t = (nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.Linear(16, 4)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, 1)
        s, t = 0.5 * self.s(x1).tanh(), self.t(x1)
        return torch.cat((x1, x2 * s.exp() ** self.power + t), 1)

    def inverse(self, y: Tensor) -> Tensor:
        y1, y2 = y.chunk(2, 1)
        s, t = 0.5 * self.s(y1).tanh(), self.t(y1)
        return torch.cat((y1, (y2 - t) * (-s).exp() ** self.power), 1)


class OtherOrder(Dropping):
    def inverse(self, y: Tensor) -> Tensor:
        y1, y2 = y.chunk(2, 1)
        t, s = self.t(y1), 0.5 * self.s(y1).tanh()
        return torch.cat((y1, (y2 - t) * (-s).exp() ** self.power), 1)


class Turned(nn.Module):
    """The inverse, unlike forward, ends with a matrix product, so that autocast makes its result bfloat16."""

    def __init__(self):
        super().__init__()
        self.weight, self.gain = nn.Parameter(torch.eye(8).roll(1, 0)), nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight * self.gain.exp()

    def inverse(self, y: Tensor) -> Tensor:
        return (y * (-self.gain).exp()) @ self.weight.T


class ReturningFloat32(Turned):
    def inverse(self, y: Tensor) -> Tensor:
        return super().inverse(y).to(y.dtype)


def step(block: nn.Module, *, wrap: bool = True) -> list[Tensor]:
    """Return the gradients of a training step under autocast."""
    x = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    module = InvertibleModuleWrapper(block) if wrap else block
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    weighted_sum(y.float()).backward()
    return [x.grad, *(p.grad for p in block.parameters())]


def made(kind: type[nn.Module], *arguments: int) -> nn.Module:
    torch.manual_seed(2)
    return kind(*arguments)


def test_a_block_that_draws_trains_under_autocast():
    got, wanted = step(made(Dropping)), step(made(Dropping), wrap=False)
    for gradient, plain in zip(got, wanted, strict=True):
        torch.testing.assert_close(gradient, plain, rtol=0.05, atol=0.05 * plain.abs().max().item())


def test_another_order_of_random_numbers_is_refused_under_autocast():
    with pytest.raises(RuntimeError, match="OtherOrder draws random numbers.*let both draw them in the same order"):
        step(made(OtherOrder))


def test_large_rounding_of_autocast_is_named_as_the_cause():
    with pytest.raises(
        RuntimeError, match="under autocast the inverse of Dropping.*compute scales and shifts in float32"
    ):
        step(made(Dropping, 64))


def test_an_inverse_that_autocast_makes_bfloat16_is_refused_with_the_remedy_that_works():
    with pytest.raises(
        RuntimeError, match=r"under autocast the inverse of Turned returned torch.bfloat16.*x\.to\(y\.dtype\)"
    ):
        step(made(Turned))
    step(made(ReturningFloat32))
