"""A check names a cause only if it can tell this cause from others."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from memcnn import AdditiveCoupling, InvertibleModuleWrapper
from memcnn.engine.chain import thread_state
from memcnn.testing import check_all, check_gradients, check_inverse
from memcnn.testing.laws.differences import DIFFERENCES
from memcnn.testing.laws.gradients import IN_FLOAT64
from memcnn.testing.laws.result import NEEDS_NO_INVERSE, NOT_DETERMINISTIC, TOO_LITTLE
from memcnn.testing.laws.twin import relative_errors
from memcnn.testing.tolerances import distance


class Centred(nn.Module):
    """Subtracts a mean that forward stores and inverse reads, so that a new input makes it stale."""

    mean = 0.0

    def forward(self, x: Tensor) -> Tensor:
        self.mean = x.detach().mean() + 1
        return x - self.mean

    def inverse(self, y: Tensor) -> Tensor:
        return y + self.mean


class Stretched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        return torch.cat((a + self.f(b).tanh(), b), 1)

    def inverse(self, y: Tensor) -> Tensor:
        a, b = y.chunk(2, 1)
        return torch.cat((a - self.f(b).tanh(), 1.1 * b), 1)


class Turned(nn.Module):
    """A rotation that is undone by its transpose, in float32: right to float32 until the weight is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linalg.qr(torch.randn(4, 4))[0])

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T

    def inverse(self, y: Tensor) -> Tensor:
        return (y.float() @ self.weight.float()).to(y.dtype)


class Offset(nn.Module):
    """Adds a number so large that the loss is rounded to 1e-10. A finite difference magnifies that to 1e-5."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x + 1e6

    def inverse(self, y: Tensor) -> Tensor:
        return (y - 1e6) / 2


class Kinked(nn.Module):
    """One of its 128 ReLUs is so close to its kink that every finite difference crosses it."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.register_buffer("kink", x.detach()[0, -1].clone() - 1e-9)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        return torch.cat((a + 0.02 * (b - self.kink).relu(), b), 1)

    def inverse(self, y: Tensor) -> Tensor:
        a, b = y.chunk(2, 1)
        return torch.cat((a - 0.02 * (b - self.kink).relu(), b), 1)


SHARED = np.random.default_rng(0)


class Noisy(nn.Module):
    """Adds noise that no seed of torch repeats, and casts its input to float32 in an operation without effect.

    Args:
        size: of the noise.
        own: draw it from a generator that is copied with the module.
    """

    def __init__(self, size: float, *, own: bool = False) -> None:
        super().__init__()
        self.size, self.own = size, np.random.default_rng(0) if own else None

    def forward(self, x: Tensor) -> Tensor:
        noise = (self.own or SHARED).standard_normal(x.shape)
        x = x + self.size * torch.from_numpy(noise).to(x)
        a, b = x.chunk(2, 1)
        return torch.cat((a + b.tanh() + 0 * b.float().amax(), b), 1)

    def inverse(self, y: Tensor) -> Tensor:
        a, b = y.chunk(2, 1)
        return torch.cat((a - b.tanh(), b), 1)


class Swap(torch.autograd.Function):
    """The identity, with a backward that swaps the two entries of the gradient."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient.flip(0)


class Swapping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.tensor([0.3, -0.4]))

    def forward(self, x: Tensor) -> Tensor:
        return x + Swap.apply(self.b)

    def inverse(self, y: Tensor) -> Tensor:
        return y - self.b


def test_a_value_stored_by_forward_is_not_called_bad_conditioning():
    assert "badly conditioned" not in str(check_inverse(Centred(), torch.randn(3, 4)))


def test_gradients_that_a_wrong_inverse_spoils_are_explained_by_it():
    report = check_all(Stretched(), torch.randn(3, 4), laws=["inverse", "gradients"])
    wrong = report.of("gradients").failures
    assert wrong and all(NEEDS_NO_INVERSE in result.explanation for result in wrong)
    assert "gradient" not in report.summary()


def test_the_summary_names_a_large_error_before_one_that_float64_alone_shows():
    report = check_inverse(Turned(), torch.randn(3, 4))
    assert any(TOO_LITTLE in result.explanation for result in report.failures), report
    assert "after an optimiser step" in report.summary() and TOO_LITTLE not in report.summary()


def test_a_storage_that_was_emptied_is_an_infinite_error():
    emptied = torch.ones(3)
    emptied.untyped_storage().resize_(0)
    assert relative_errors({"x": emptied}, {"x": torch.ones(3)}) == {"x": float("inf")}
    assert relative_errors({"x": torch.ones(3)}, {"x": emptied}) == {"x": float("inf")}
    assert distance([emptied], [torch.ones(3)]) == distance([torch.ones(3)], [emptied]) == float("inf")


def test_a_gradient_is_not_called_wrong_where_the_loss_is_rounded():
    """Two finite differences may agree by chance, although rounding made both wrong."""
    for seed in range(16):
        x = torch.randn(1, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        report = check_gradients(Offset(), x, seed=seed)
        assert report.passed, report


def test_a_gradient_is_not_called_wrong_beside_one_kink_of_many():
    x = torch.randn(8, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    report = check_gradients(Kinked(x), x)
    (result,) = [result for result in report if result.claim == DIFFERENCES]
    assert report.passed and "kinks" in result.skipped, report


@pytest.mark.parametrize("own", [True, False], ids=["own generator", "shared generator"])
def test_noise_is_not_called_a_lower_precision(own):
    report = check_gradients(Noisy(1e-13, own=own), torch.randn(3, 4), seed=0)
    (result,) = [result for result in report if result.claim == IN_FLOAT64]
    assert result.verdict == "PASS", result


def test_noise_is_named_where_the_inverse_is_off_in_float64_alone():
    report = check_inverse(Noisy(1e-9), torch.randn(3, 4))
    assert any(NOT_DETERMINISTIC in result.explanation for result in report.failures), report
    assert TOO_LITTLE not in str(report)


@pytest.mark.parametrize("seed", range(8))
def test_finite_differences_see_two_swapped_entries(seed):
    """If all entries had steps of equal length, the errors of the two entries would cancel for some seeds."""
    report = check_gradients(Swapping(), torch.randn(3, 2, generator=torch.Generator().manual_seed(seed)), seed=seed)
    assert report.of("gradients").failures


def test_wrong_outputs_are_reported_as_wrong_outputs():
    class Wrong(AdditiveCoupling):
        def couple(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
            y1, y2 = super().couple(x1, x2)
            return (1.5 * y1 if thread_state.recording is not None else y1), y2

    report = check_gradients(
        InvertibleModuleWrapper(Wrong(nn.Linear(2, 2))), torch.randn(3, 4), finite_differences=False
    )
    (result,) = [result for result in report if result.claim == "outputs = plain backpropagation's"]
    assert result.failed and result.explanation.startswith("output 0"), report
