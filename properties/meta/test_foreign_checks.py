"""Run the checks on small look-alikes of layers in public packages: layers defined on an interval, parameters that the
first batch sets, matrix inverses, engines of their own. ``bench.findings`` checks the packages themselves."""

import math

import pytest
import torch
from torch import Tensor, nn

from memcnn import ReversibleSequential
from memcnn.testing import Report, check_gradients, check_inverse, check_state

AUTOCAST = "products keep autocast's dtype in backward"
TWO_STEPS = "two steps under way do not mix"


class Logit(nn.Module):
    """Maps (0, 1) to the real line; forward raises an error for other values."""

    def forward(self, x: Tensor) -> Tensor:
        if not (x > 0).all() or not (x < 1).all():
            raise ValueError("outside (0, 1)")
        return x.logit()

    def inverse(self, y: Tensor) -> Tensor:
        return y.sigmoid()


class Sigmoid(Logit):
    def forward(self, x: Tensor) -> Tensor:
        return Logit.inverse(self, x)

    def inverse(self, y: Tensor) -> Tensor:
        return Logit.forward(self, y)


class Turned(nn.Module):
    """An angle in [-pi, pi) turned by 1."""

    def forward(self, x: Tensor, by: float = 1.0) -> Tensor:
        return torch.remainder(x + by + math.pi, 2 * math.pi) - math.pi

    def inverse(self, y: Tensor) -> Tensor:
        return self(y, -1.0)


class FirstBatch(nn.Module):
    """Sets its scale from its first batch, and records in a buffer that it has done so."""

    gradient_scale = 1.0

    def __init__(self):
        super().__init__()
        self.s = nn.Parameter(torch.zeros(5))
        self.register_buffer("done", torch.tensor(False))

    def forward(self, x: Tensor) -> Tensor:
        if not self.done:
            self.s.data = -x.detach().std(0).log()
            self.done.fill_(True)
        s = self.gradient_scale * self.s + (1 - self.gradient_scale) * self.s.detach()
        return x * s.exp()

    def inverse(self, y: Tensor) -> Tensor:
        return y * torch.exp(-self.s)


class WrongAfterFirstBatch(FirstBatch):
    gradient_scale = 1.1


class Linear(nn.Module):
    """x W^-1, whose derivative is a product in the dtype of W."""

    def __init__(self):
        super().__init__()
        self.W = nn.Parameter(torch.eye(5) + 0.1 * torch.randn(5, 5, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor) -> Tensor:
        return x + (x @ torch.inverse(self.W) - x).to(x)

    def inverse(self, y: Tensor) -> Tensor:
        return y + (y @ self.W - y).to(y)


class Stream(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.inverse(self.W)

    def inverse(self, y: Tensor) -> Tensor:
        return y @ self.W


class Backwards(Linear):
    """Autocast makes the result of the inverse bfloat16, but not that of forward."""

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.W).float()

    def inverse(self, y: Tensor) -> Tensor:
        return y @ torch.inverse(self.W)


class Refusing(Backwards):
    def inverse(self, y: Tensor) -> Tensor:
        x = super().inverse(y)
        if x.dtype == torch.bfloat16:
            raise RuntimeError("bfloat16 is not supported")
        return x


class Constant(nn.Module):
    """Its output requires no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return x.detach() + 1

    def inverse(self, y: Tensor) -> Tensor:
        return y - 1


class Again(torch.autograd.Function):
    """x + f(x), recomputed in backward without the autocast state of forward."""

    @staticmethod
    def forward(ctx, x: Tensor, f: nn.Module) -> Tensor:
        ctx.save_for_backward(x)
        ctx.f = f
        return x + f(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            ctx.f(x).backward(gradient)
        return gradient + x.grad, None


class OwnEngine(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Linear(5, 5)
        nn.init.constant_(self.f.weight, 0.05)

    def forward(self, x: Tensor) -> Tensor:
        return Again.apply(x, self.f)

    def inverse(self, y: Tensor) -> Tensor:
        x = y
        for _ in range(60):
            x = y - self.f(x)
        return x


class InPlace(nn.Module):
    """Doubles its input in place."""

    def forward(self, x: Tensor) -> Tensor:
        x *= 2
        return x

    def inverse(self, y: Tensor) -> Tensor:
        return y / 2


class Single(Linear):
    """Returns float32 for an input of any dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).float()


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def of(report: Report, claim: str):
    (result,) = (result for result in report if result.claim == claim)
    return result


def test_a_layer_of_the_unit_interval_is_checked_within_it():
    for layer, x in ((Logit(), drawn(4, 5).sigmoid()), (Sigmoid(), 4 * drawn(4, 5))):
        report = check_inverse(layer, x) + check_state(layer, x)
        assert report.passed, report
        assert not of(report, "forward(inverse(y)) = y").skipped
        assert not of(report, TWO_STEPS).skipped


def test_a_layer_on_the_circle_is_checked_within_one_turn():
    report = check_inverse(Turned(), 3 * torch.tanh(drawn(8, 5)))
    assert report.passed, report


def test_a_single_sample_is_compared_with_its_own_entries_in_another_order():
    report = check_inverse(Sigmoid(), drawn(1, 5)) + check_state(Sigmoid(), drawn(1, 5))
    assert report.passed, report


def test_parameters_that_the_first_batch_sets_are_set_before_finite_differences():
    assert check_gradients(FirstBatch(), drawn(4, 5), wrap=False).passed


def test_a_wrong_gradient_of_a_parameter_that_the_first_batch_sets_is_found():
    report = check_gradients(WrongAfterFirstBatch(), drawn(4, 5), wrap=False)
    assert "1.1 times" in report.summary(), report


def test_the_derivative_of_a_matrix_inverse_under_autocast_is_no_fault():
    own, wrapped = check_state(Linear(), drawn(4, 5), wrap=False), check_state(Linear(), drawn(4, 5))
    assert own.passed, own
    assert of(own, AUTOCAST).skipped == "computes nothing again in backward"
    assert wrapped.passed, wrapped
    assert not of(wrapped, AUTOCAST).skipped


def test_a_stream_that_autocast_makes_bfloat16_is_not_judged():
    for block, words in {
        Stream(): "forward of Stream returns bfloat16 for inputs of float32",
        Backwards(): "inverse of Backwards returns bfloat16 for outputs of float32",
        ReversibleSequential(Backwards(), Backwards()): "inverse of Backwards returns bfloat16",
    }.items():
        result = of(check_state(block, drawn(4, 5)), AUTOCAST)
        assert words in result.skipped and "keep the stream in float32" in result.skipped, result


def test_an_inverse_that_refuses_autocast_is_not_judged_under_it():
    result = of(check_state(Refusing(), drawn(4, 5)), AUTOCAST)
    assert "under autocast inverse of Refusing raised RuntimeError: bfloat16 is not supported" in result.skipped, result


def test_an_inverse_that_is_wrong_without_autocast_too_is_judged_under_it(monkeypatch):
    def broken(self, y: Tensor) -> Tensor:
        raise RuntimeError("not written yet")

    monkeypatch.setattr(Backwards, "inverse", broken)
    assert of(check_state(Backwards(), drawn(4, 5)), AUTOCAST).failed


def test_an_output_without_a_gradient_is_not_judged_under_autocast():
    assert "requires" in (result := of(check_state(Constant(), drawn(4, 5)), AUTOCAST)).skipped, result


def test_an_engine_that_computes_again_without_autocast_is_seen():
    result = of(check_state(OwnEngine(), drawn(4, 5), wrap=False), AUTOCAST)
    assert result.failed and "float32, forward only in bfloat16" in result.explanation, result


def test_a_layer_that_cannot_be_differentiated_is_reported_not_raised():
    report = check_gradients(InPlace(), drawn(4, 5), wrap=True)
    assert "plain backpropagation raised RuntimeError" in report.summary(), report


def test_finite_differences_do_not_judge_an_output_that_stays_float32():
    result = of(check_gradients(Single(), drawn(4, 5), wrap=False), "gradients = finite differences in float64")
    assert "stays float32" in result.skipped, result


@pytest.mark.filterwarnings("ignore:Using a non-full backward hook")
def test_a_module_outlives_the_backward_pass_that_its_hooks_belong_to():
    """Old-style backward hooks hold their module by a weak reference."""
    module = Linear()
    module.register_backward_hook(lambda module, grad_in, grad_out: None)
    assert check_state(module, drawn(4, 5), wrap=False).passed
