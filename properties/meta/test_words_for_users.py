"""The report on blocks that users write names one cause, once, with advice."""

import math
import re

import pytest
import torch
from torch import Tensor, nn

from memcnn.testing import Report, Result, check_gradients, check_log_det, check_state
from memcnn.testing.laws.limits import Limit
from memcnn.testing.laws.rounding import condition_numbers
from memcnn.testing.laws.subject import Subject
from memcnn.testing.laws.twin import leaf_like
from memcnn.verify import main
from properties.zoo.corner_blocks import Scale
from properties.zoo.users import FixedPoint

THROUGH_INVERSE = "gradients through inverse = finite differences in float64"


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


class Bisected(nn.Module):
    """y = x + x^3 exp(a), which a bisection inverts; it has no gradient."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(-1.0))

    def forward(self, x: Tensor) -> Tensor:
        return x + x**3 * self.a.exp()

    @torch.no_grad()
    def inverse(self, y: Tensor) -> Tensor:
        low, high = -y.abs() - 1, y.abs() + 1
        for _ in range(80):
            middle = (low + high) / 2
            above = self(middle) > y
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        return (low + high) / 2

    def log_det(self, x: Tensor) -> Tensor:
        return (1 + 3 * x**2 * self.a.exp()).log().flatten(1).sum(1)

    def forward_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self(x), self.log_det(x)

    def inverse_log_det(self, y: Tensor) -> tuple[Tensor, Tensor]:
        x = self.inverse(y).clone()
        return x + 0 * y, -self.log_det(x)


class WrongLogDet(Bisected):
    def inverse_log_det(self, y: Tensor) -> tuple[Tensor, Tensor]:
        x, log_det = super().inverse_log_det(y)
        return x, 2 * log_det


class OneForEachPosition(Scale):
    def log_det(self, x: Tensor) -> Tensor:
        return self.s.abs().log().sum().expand(len(x), x.shape[2])


class Differentiating(nn.Module):
    """Its force is the gradient of a potential."""

    def __init__(self):
        super().__init__()
        self.potential = nn.Linear(2, 2)

    def force(self, x: Tensor) -> Tensor:
        outer = torch.is_grad_enabled()
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            return torch.autograd.grad(self.potential(x).cos().sum(), x, create_graph=outer)[0]

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, 1)
        return torch.cat((x1, x2 + self.force(x1)), 1)

    def inverse(self, y: Tensor) -> Tensor:
        y1, y2 = y.chunk(2, 1)
        return torch.cat((y1, y2 - self.force(y1)), 1)


def of(report: Report, claim: str) -> list[Result]:
    return [result for result in report if result.claim == claim]


def test_an_inverse_that_is_not_meant_to_be_differentiated_has_an_option():
    assert of(check_gradients(Bisected(), drawn(3, 4)), THROUGH_INVERSE)[0].failed
    report = check_gradients(Bisected(), drawn(3, 4), through_inverse=False)
    assert report.passed and not of(report, THROUGH_INVERSE), report
    report = check_log_det(Bisected(), drawn(3, 4), through_inverse=False)
    assert report.passed, report


def test_the_log_determinant_of_an_inverse_without_gradients_is_compared_with_that_of_forward():
    report = check_log_det(WrongLogDet(), drawn(3, 4), through_inverse=False)
    (result,) = of(report, "inverse_log_det is log|det| of the Jacobian")
    assert result.failed and "2 times as much" in result.explanation, report


def test_the_option_reaches_the_checks_from_the_command_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "bisected.py").write_text("from properties.meta.test_words_for_users import Bisected\n")
    arguments = [f"{tmp_path / 'bisected.py'}:Bisected", "--shape", "3,4", "--laws", "gradients,log_det"]
    monkeypatch.setattr("sys.stdin", None)
    assert main([*arguments, "--examples", "1", "--mode", "train", "--no-gradients-through-inverse"]) == 0
    assert "through inverse" not in capsys.readouterr().out


def test_log_determinants_of_another_shape_name_the_method():
    words = check_log_det(OneForEachPosition(), drawn(2, 4, 3, 3)).summary()
    assert "forward_log_det returns log-determinants of shape (2, 3), wanted one value a sample: (2,)" in words


def test_an_exception_that_fails_many_rows_is_explained_once():
    report = check_gradients(Differentiating(), drawn(3, 4)) + check_state(Differentiating(), drawn(3, 4))
    text = str(report)
    assert text.count("differentiates within its own forward pass") == 1, text
    rows = sum(math.isinf(result.error) for result in report)
    assert rows > 5 and f", and {rows - 1} more rows:" in text, text


def test_the_summary_names_several_faults_of_state():
    faults = [Result("state", f"claim {i}", 1.0, 0.0, explanation=f"fault {i}") for i in range(2)]
    assert Report(tuple(faults)).summary() == "fault 0; fault 1"


def test_a_condition_number_that_cannot_be_estimated_is_not_called_infinite():
    result = Limit(torch.float64, conditions=[math.inf]).judge("inverse", "claim", 1.0)
    assert "could not be estimated" in result.skipped and "inf" not in re.split(r"\W+", result.skipped)


def test_a_largest_singular_value_does_not_make_the_condition_number_infinite():
    subject = Subject(FixedPoint(), (drawn(3, 4),)).in_double()

    def gradient(subject: Subject) -> dict[str, Tensor]:
        return dict(subject.run(subject.fresh()).gradients)

    assert next(iter(condition_numbers(subject, gradient))) < 100


@pytest.mark.parametrize("operation", [torch.amax, torch.amin])
def test_a_maximum_or_minimum_is_not_rounded(operation):
    class Chosen(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + operation(x.detach() * 0 + x).sum() * 0

        def inverse(self, y: Tensor) -> Tensor:
            return y

    def gradient(subject: Subject) -> dict[str, Tensor]:
        leaf, x = leaf_like(subject.inputs[0].requires_grad_())
        subject.fresh()(x).sum().backward()
        return {"x": leaf.grad}

    subject = Subject(Chosen(), (drawn(3, 4),)).in_double()
    assert math.isfinite(next(iter(condition_numbers(subject, gradient))))


def test_inputs_of_integers_alone_are_refused_with_what_to_do(tmp_path, capsys):
    (tmp_path / "scaled.py").write_text("from properties.zoo.corner_blocks import Scale\n")
    with pytest.raises(SystemExit) as exit_:
        raise SystemExit(main([f"{tmp_path / 'scaled.py'}:Scale", "--shape", "3,4,2,2:int64<50"]))
    captured = capsys.readouterr()
    assert exit_.value.code == 2
    assert "inputs 3x4x2x2 of int64 on cpu" in captured.out and "float32" not in captured.out
    assert "give integers beside such an input" in captured.err
