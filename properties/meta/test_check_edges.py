"""Checks of unusual modules and values: they are skipped, count as infinitely wrong, or are refused."""

import json

import pytest
import torch
from torch import Tensor, nn

from memcnn import AdditiveCoupling
from memcnn.testing import check_all, check_gradients, check_inverse, check_log_det, check_memory, check_training
from memcnn.testing.laws.constant import without_constants
from memcnn.testing.laws.differences import DIFFERENCES
from memcnn.testing.laws.gradients import SUBSETS
from memcnn.testing.laws.growth import growth
from memcnn.testing.laws.guard import described, is_ours
from memcnn.testing.laws.inverse import BACK, FORTH, STRIDES
from memcnn.testing.laws.inverse import IN_FLOAT64 as IN_64
from memcnn.testing.laws.moved import is_special
from memcnn.testing.laws.passes import (
    FIRST,
    SECOND,
    gradients_of_two_steps,
    graphs_can_be_retained,
    two_steps_do_not_mix,
)
from memcnn.testing.laws.precision import stay_in_float64
from memcnn.testing.laws.result import Report, Result
from memcnn.testing.laws.subject import NotRunnable, Subject
from memcnn.testing.laws.twin import relative_errors, worst
from properties.support.blocks import refused


class Forgetful(nn.Module):
    """Its inverse loses ``share`` of x at every block."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        return 1 * x

    def inverse(self, y: Tensor) -> Tensor:
        return (1 - self.share) * y


@pytest.mark.parametrize(
    ("share", "words"),
    [
        (0.1, "the inverse of one block alone is off by 0.1 times"),
        (0.003, "fails (1 % of the input) at a depth of about"),
    ],
)
def test_the_report_says_how_the_error_of_a_chain_grows(share, words):
    assert words in growth(Subject(Forgetful(share), (torch.ones(3, 4),)))


def test_an_odd_dimension_has_no_halves_that_could_be_swapped():
    class Rotated(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

        def inverse(self, y: Tensor) -> Tensor:
            return (y / 2).roll(-1, 1)

    x = torch.randn(4, 3)
    assert "halves along dimension 1 swapped" in str(check_inverse(Rotated(), torch.randn(4, 2)))
    assert "swapped" not in str(check_inverse(Rotated(), x))


@pytest.mark.parametrize(("inputs", "words"), [((), "at least one: got ()"), ((3,), "at least one: got (int)")])
def test_inputs_that_are_no_tensors_are_refused(inputs, words):
    with refused(TypeError, "the inputs must be tensors, ", words):
        check_inverse(AdditiveCoupling(nn.Linear(2, 2)), *inputs)


def test_a_module_that_returns_no_tensor_is_refused_with_the_fix():
    class Named(nn.Module):
        def forward(self, x: Tensor) -> dict:
            return {"y": x}

        def inverse(self, y: dict) -> Tensor:
            return y["y"]

    with refused(NotRunnable, "must return a tensor or a tuple of tensors: got (dict); check an adapter that does"):
        check_inverse(Named(), torch.randn(2, 2))


def test_a_healthy_coupling_meets_every_claim_and_none_is_left_out():
    branch = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    report = check_all(AdditiveCoupling(branch), torch.randn(3, 4), laws=["inverse", "gradients", "state"])
    assert {result.verdict for result in report} == {"PASS"}, report
    claims = {result.claim for result in report}
    assert {FORTH, BACK, FORTH + IN_64, DIFFERENCES} <= claims
    for suffix in (" after an optimiser step", " with parameters of the other sign"):
        assert {FORTH + suffix, DIFFERENCES + suffix} <= claims
    assert SUBSETS.keys() <= claims


def test_a_wrong_gradient_is_seen_beside_an_input_as_large_as_a_million():
    class Identity(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx, gradient: Tensor) -> Tensor:
            return 1.01 * gradient

    class Wrong(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Identity.apply(x)

        def inverse(self, y: Tensor) -> Tensor:
            return y.clone()

    report = check_gradients(Wrong(), 1e7 * torch.randn(3, 4))
    assert DIFFERENCES in {result.claim for result in report.failures}, report


def test_constant_channels_are_filled_for_a_second_look():
    x = torch.randn(5, 3)
    x[:, 1] = 2.0
    subject = without_constants(Subject(Forgetful(0.0), (x,)))
    assert len(subject.inputs[0][:, 1].unique()) == 5 and torch.equal(subject.inputs[0][:, ::2], x[:, ::2])
    assert without_constants(Subject(Forgetful(0.0), (torch.randn(5, 3),))) is None


@pytest.mark.parametrize("names", ["abc", "bca", "cab"])
def test_a_nan_is_the_largest_error(names):
    errors = {"a": 0.5, "b": float("nan"), "c": float("inf")}
    assert worst({name: errors[name] for name in names})[0] == "b"


def test_a_gradient_of_another_shape_or_dtype_is_an_infinite_error():
    x = torch.ones(1, 3)
    for other in (x[0], x.double(), x.expand(2, 3)):
        assert relative_errors({"x": other}, {"x": x}) == {"x": float("inf")}


def test_an_exception_is_described_with_the_line_of_the_users_code():
    def fails(text: str) -> None:
        json.loads(text)

    with pytest.raises(json.JSONDecodeError) as caught:
        fails("{")
    line = fails.__code__.co_firstlineno + 1
    assert described(caught.value).endswith(f" (test_check_edges.py, line {line})")
    assert not is_ours(TypeError("was never raised"))


def test_a_table_shows_errors_and_limits_only_of_decided_results():
    report = Report((Result("state", "decided", 0.5, 0.25), Result("state", "open", skipped="nobody knows")))
    decided, undecided = str(report).splitlines()[1:3]
    assert decided.split() == ["FAIL", "state", "decided", "0.5", "0.25"] and undecided.split() == [
        "SKIP",
        "state",
        "open",
    ]


def test_a_module_that_runs_in_float32_alone_is_not_checked_in_float64():
    class Single(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.dtype != torch.float32:
                raise ValueError("only float32")
            return 2 * x

        def inverse(self, y: Tensor) -> Tensor:
            return y / 2

    (result,) = [result for result in check_inverse(Single(), torch.randn(3, 4)) if result.claim == FORTH + IN_64]
    assert "only float32" in result.skipped


class Stretching(nn.Module):
    """Its log-determinant is right only for scales of at least 1/2."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([1.0, 2.0]))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale

    def inverse(self, y: Tensor) -> Tensor:
        return y / self.scale

    def forward_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self(x), self.scale.clamp(min=0.5).log().sum().expand(len(x))


@pytest.mark.parametrize("samples", [1, 3])
def test_a_log_determinant_that_is_wrong_for_negative_scales_alone_is_called_so(samples):
    report = check_log_det(Stretching(), torch.randn(samples, 2))
    assert report.failures and all(
        result.claim.endswith("with parameters of the other sign")
        and result.explanation.startswith("with parameters of the other sign")
        for result in report.failures
    ), report


def test_steps_without_finite_gradients_or_values_are_not_compared():
    class WithoutGradient(Forgetful):
        def forward(self, x: Tensor) -> Tensor:
            return x + (x - x).sqrt()

    class TooLarge(Forgetful):
        def forward(self, x: Tensor) -> Tensor:
            return x * 1e30 * 1e30

    x = torch.randn(3, 4)
    assert two_steps_do_not_mix(Subject(WithoutGradient(0.0), (x,)), "steps").verdict == "SKIP"
    (result,) = check_training(TooLarge(0.0), x)
    assert result.verdict == "SKIP" and "not finite" in result.skipped


def test_results_that_depend_on_strides_are_wrong_beside_constant_channels_too():
    class Strided(Forgetful):
        def forward(self, x: Tensor) -> Tensor:
            return (2.0 if x.is_contiguous() else 3.0) * x

        def inverse(self, y: Tensor) -> Tensor:
            return y / 2

    x = torch.randn(5, 3)
    x[:, 1] = 2.0
    (result,) = [result for result in check_inverse(Strided(0.0), x) if result.claim == STRIDES]
    assert result.verdict == "FAIL", result


def test_a_step_that_uses_the_mask_of_another_is_seen():
    class Masked(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor, module: nn.Module) -> Tensor:
            ctx.module = module
            return x * module.mask

        @staticmethod
        def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
            return gradient * ctx.module.mask, None

    class Keeping(Forgetful):
        def forward(self, x: Tensor) -> Tensor:
            self.mask = 1 + torch.rand_like(x)
            return Masked.apply(x, self)

    result = two_steps_do_not_mix(Subject(Keeping(0.0), (torch.randn(3, 4),)), "steps")
    assert result.verdict == "FAIL" and "the two passes share" in result.explanation


def test_a_block_whose_plain_graph_runs_backward_only_once_is_skipped():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            ctx.used = False
            return x.clone()

        @staticmethod
        def backward(ctx, gradient: Tensor) -> Tensor:
            if ctx.used:
                raise ValueError("only once")
            ctx.used = True
            return gradient

    class Single(Forgetful):
        def forward(self, x: Tensor) -> Tensor:
            return Once.apply(x)

    result = graphs_can_be_retained(Subject(Single(0.0), (torch.randn(3, 4),)), "retained")
    assert result.verdict == "SKIP" and "only once" in result.skipped


def test_an_error_of_the_verifier_is_not_blamed_on_the_block():
    class Broken:
        @property
        def lower_precisions(self) -> dict:
            raise NameError("a mistake")

    with refused(NameError, "a mistake"):
        stay_in_float64(Broken(), "a claim")


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (torch.zeros(4), True),
        (torch.ones(4), True),
        (torch.arange(4.0), True),
        (torch.arange(1.0, 5.0), False),
        (torch.ones(1), False),
        (torch.zeros(4, dtype=torch.int64), False),
    ],
)
def test_zeros_and_repeated_values_are_special_because_functions_have_kinks_there(x, expected):
    assert is_special(x) is expected


def test_memory_that_every_pass_adds_grows_with_the_number_of_measured_passes():
    class Hoard(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor, kept: list[Tensor]) -> Tensor:
            ctx.kept = kept
            return x.clone()

        @staticmethod
        def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
            ctx.kept.append(gradient.clone())
            return gradient, None

    class Hoarding(Forgetful):
        def __init__(self) -> None:
            super().__init__(0.0)
            self.kept: list[Tensor] = []

        def forward(self, x: Tensor) -> Tensor:
            return Hoard.apply(x, self.kept)

    once, often = (check_memory(Hoarding(), torch.randn(64, 64), passes=passes).results[0] for passes in (1, 3))
    assert once.failed and often.error > 2 * once.error, (once, often)


def test_the_gradients_of_two_steps_are_not_added_up():
    subject = Subject(AdditiveCoupling(nn.Linear(2, 2)), (torch.randn(3, 4),))
    gradients = gradients_of_two_steps(subject, subject.trained(), (0, 1))
    for name, _ in subject.module.named_parameters():
        if name.endswith("weight"):
            assert not torch.equal(gradients[f"{FIRST}{name}"], gradients[f"{SECOND}{name}"])
