"""A check names a cause only where a test separates it from others."""

import torch
from torch import Tensor, nn

from memcnn.testing import check_all, check_inverse
from memcnn.testing.laws.result import NEEDS_NO_INVERSE
from memcnn.testing.laws.twin import relative_errors
from memcnn.testing.tolerances import distance


class Centred(nn.Module):
    """Remembers the mean of its last input. In a row of copies each remembers its own."""

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


def test_a_value_stored_by_forward_is_not_called_bad_conditioning():
    assert "badly conditioned" not in str(check_inverse(Centred(), torch.randn(3, 4)))


def test_gradients_that_a_wrong_inverse_spoils_are_explained_by_it():
    report = check_all(Stretched(), torch.randn(3, 4), laws=["inverse", "gradients"])
    wrong = report.of("gradients").failures
    assert wrong and all(NEEDS_NO_INVERSE in result.explanation for result in wrong)
    assert "gradient" not in report.summary()


def test_a_storage_that_was_emptied_is_an_infinite_error():
    emptied = torch.ones(3)
    emptied.untyped_storage().resize_(0)
    assert relative_errors({"x": emptied}, {"x": torch.ones(3)}) == {"x": float("inf")}
    assert relative_errors({"x": torch.ones(3)}, {"x": emptied}) == {"x": float("inf")}
    assert distance([emptied], [torch.ones(3)]) == distance([torch.ones(3)], [emptied]) == float("inf")
