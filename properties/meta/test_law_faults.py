"""Faults that only some checks find: other directions, several passes, strides, autocast, training, copies."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from memcnn import AffineAdapterExp, AffineCoupling, InvertibleModuleWrapper
from memcnn.testing import (
    Inverted,
    Report,
    WithLogDet,
    check_copies,
    check_gradients,
    check_inverse,
    check_log_det,
    check_memory,
    check_state,
    check_training,
)
from properties.zoo.corner_blocks import InputLayout, WithoutGradients
from properties.zoo.engine import Engine, Pair
from properties.zoo.specimen import Own, branch


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape or (3, 4, 3, 4), generator=torch.Generator().manual_seed(0))


class OneBackward(Engine):
    """Deletes its saved state in backward, so that a retained graph cannot be differentiated again."""

    def back(self, pair, before, y, dy, found):
        result = super().back(pair, before, y, dy, found)
        before.clear()
        return result


class WrongSecondBackward(Engine):
    """Multiplies the gradients of its n-th backward pass by n."""

    passes = 0

    def back(self, pair, before, y, dy, found):
        self.passes += 1
        return super().back(pair, before, y, self.passes * dy, found)


class RightOnce(InvertibleModuleWrapper):
    """Loses the gradients of every forward pass after the first."""

    passes = 0

    def forward(self, *inputs: Tensor) -> Tensor:
        self.passes += 1
        y = super().forward(*inputs)
        return y if self.passes == 1 or self.disable else y.detach() + 0 * next(self.parameters()).sum()


class LogDetDetached(AffineCoupling):
    def forward_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, log_det = super().forward_log_det(x)
        return y, log_det.detach()


class OtherValues(AffineCoupling):
    def forward_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, log_det = super().forward_log_det(x)
        return 1.01 * y, log_det


class Skewed(AffineCoupling):
    """The inverse's log-determinant is off by a constant, so the two directions do not cancel."""

    def inverse_log_det(self, y: Tensor) -> tuple[Tensor, Tensor]:
        x, log_det = super().inverse_log_det(y)
        return x, log_det + 0.5


def affine(kind: type[AffineCoupling]) -> AffineCoupling:
    return kind(branch(2, 4), branch(2, 4), AffineAdapterExp)


class CachedWeight(Own):
    """Computes its scale once, so that it is stale after an optimiser step when the engine runs it."""

    cached = None

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * self.scale)

    def inverse(self, y: Tensor) -> Tensor:
        if self.cached is None:
            self.cached = self.scale.detach().clone()
        return super().inverse(y) / self.cached


class CopiesShare(Own):
    def __deepcopy__(self, memo: dict) -> "CopiesShare":
        twin = CopiesShare.__new__(CopiesShare)
        memo[id(self)] = twin
        twin.__dict__ = {
            key: copy.deepcopy(value, memo) if key != "_modules" else dict(value)
            for key, value in self.__dict__.items()
        }
        return twin


class StateLost(Own):
    """A factor that is neither a parameter nor a buffer."""

    def __init__(self, factor: float = 1.0):
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * super().forward(x)

    def inverse(self, y: Tensor) -> Tensor:
        return super().inverse(y / self.factor)


def failing(check: Callable[..., Report], module: nn.Module, *inputs: Tensor, **options) -> set[str]:
    return {result.claim for result in check(module, *(inputs or [drawn()]), **options).failures}


def gated() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 2, 1))


RETAINED = "a retained graph is differentiated again"


@pytest.mark.parametrize("engine", [OneBackward, WrongSecondBackward])
def test_an_engine_that_cannot_differentiate_a_retained_graph_breaks_the_law_of_state(engine):
    assert RETAINED in failing(check_state, engine(Pair()), wrap=False)
    assert not failing(check_state, Engine(Pair()), wrap=False)


def test_a_second_step_is_compared_with_plain_backpropagation():
    assert failing(check_gradients, RightOnce(Own())) == {"gradients of a second step = plain backpropagation's"}
    assert not failing(check_state, RightOnce(Own())) & {"two steps under way do not mix"}


def test_second_derivatives_of_an_engine_of_its_own_are_right_or_refused():
    claim = "second derivatives = finite differences in float64, or an error"
    found = {
        name: next(result for result in check_gradients(module, drawn(), wrap=False) if result.claim == claim)
        for name, module in {"plain": Own(), "gates": Own(gated), "refusing": Engine(Pair())}.items()
    }
    assert found["plain"].verdict == found["gates"].verdict == "PASS"
    assert max(found["plain"].error, found["gates"].error) < 1e-8
    assert "refuses them" in found["refusing"].skipped and "once_differentiable" in found["refusing"].skipped


def test_training_through_an_inverse_without_gradients_is_seen():
    assert failing(check_gradients, WithoutGradients()) == {"gradients through inverse = finite differences in float64"}
    assert "gradients = finite differences in float64" in failing(
        check_gradients, Inverted(WithoutGradients()), wrap=False
    )
    assert not failing(check_gradients, Inverted(InvertibleModuleWrapper(Own())))


def test_a_log_determinant_without_a_gradient_is_seen():
    total = torch.zeros(3)
    assert failing(check_log_det, affine(LogDetDetached)) == {
        "gradients of forward_log_det = finite differences in float64"
    }
    assert failing(check_gradients, WithLogDet(affine(LogDetDetached)), drawn(), total, wrap=False)
    assert not failing(check_gradients, WithLogDet(affine(AffineCoupling)), drawn(), total, wrap=False)


@pytest.mark.parametrize("kind", [OtherValues, Skewed])
def test_wrong_values_and_log_determinants_that_do_not_cancel_are_found(kind):
    assert "forward_log_det agrees with forward and inverse" in failing(check_log_det, affine(kind))
    assert not failing(check_log_det, affine(AffineCoupling))


def test_a_module_that_ignores_strides_is_found():
    gaps = drawn(3, 4, 3, 8)[..., ::2]
    assert failing(check_inverse, InputLayout(), gaps.contiguous()) == {"the strides of a tensor do not matter"}
    assert failing(check_inverse, InputLayout(), gaps)
    assert failing(check_inverse, InputLayout(), gaps.contiguous().transpose(1, 2).contiguous().transpose(1, 2))


def test_a_value_that_an_optimiser_step_makes_stale_is_seen():
    assert not failing(check_gradients, CachedWeight())
    assert failing(check_training, CachedWeight())
    assert not failing(check_training, Own())


def test_a_state_that_copies_share_or_lose_is_seen():
    assert not failing(check_copies, Own(), make=Own)
    assert failing(check_copies, CopiesShare()) == {"a deep copy trains on as the module"}
    assert failing(check_copies, StateLost(2.0), make=StateLost) == {
        "a module that loads the state trains on as the module"
    }


def test_under_autocast_errors_of_the_branches_precision_are_allowed_and_larger_ones_not():
    assert not failing(check_gradients, Own(), autocast=torch.bfloat16)
    assert not failing(check_inverse, Own(), autocast=torch.bfloat16)

    class Wrong(Own):
        def inverse(self, y: Tensor) -> Tensor:
            return 1.2 * super().inverse(y)

    assert failing(check_inverse, Wrong(), autocast=torch.bfloat16)


def test_without_an_allowance_memory_has_no_slack():
    report = check_memory(Own(), drawn(4, 4, 24, 24), depths=(2, 4), allowance=0)
    assert report.passed and len(report.results) == 1, report
    assert failing(check_memory, Own(), drawn(4, 4, 24, 24), depths=(2, 4), wrap=False, allowance=0)
