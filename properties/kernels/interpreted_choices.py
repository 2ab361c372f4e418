"""The choice between the library and our kernels, where Triton's interpreter runs the kernels.

The variable must be set before Triton is imported, so ``test_narrow_conv.py`` runs this file in a process of its own.
By hand: ``TRITON_INTERPRET=1 pytest properties/kernels/interpreted_choices.py``.
"""

import threading
import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import narrow_conv
from memcnn import kernels
from memcnn.kernels import choice, convolution_kernel, weight_gradient
from memcnn.kernels.operations import OPERATIONS, WEIGHT_GRADIENT
from properties.support.narrow_conv import LIMITS, conv2d, images, kernel_wins


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_a_row_of_the_benchmark_has_times_and_errors_of_library_and_chosen_plan(operation):
    choices = kernels.Choices(kernel_wins)
    row = narrow_conv.row(operation, (2, 16, 32, 4, 5), choices, torch.device("cpu"), torch.bfloat16)
    (measurement,) = choices.measured()
    assert row["chosen"] == measurement.chosen != "library" and row["chosen"] in row["all plans, us"]
    assert row["saved"] == row["cuDNN, us"] - row["ours, us"] > 0
    assert 0 < row["error, chosen"] <= LIMITS[torch.bfloat16] and 0 < row["error, cuDNN"] <= LIMITS[torch.bfloat16]


class Short(weight_gradient.Plan):
    """A wrong plan that uses only the first tile."""

    def splits(self, pixels: int, processors: int) -> tuple[int, int]:
        return 1, 1


def test_plans_that_fail_or_disagree_are_not_used(monkeypatch):
    """They are rejected with a warning that names the reason; the library computes the gradient."""
    bad = replace(weight_gradient.plans(16, 16)[0], pixels=48), Short(4, 4, pixels=16)
    monkeypatch.setattr(weight_gradient, "plans", lambda *channels: bad)
    monkeypatch.setattr(convolution_kernel, "plans", lambda channels: ())
    x, weight = images(2, 16, 4, 5).requires_grad_(), torch.randn(16, 16, 3, 3).bfloat16().requires_grad_()
    with kernels.choosing(kernels.Choices(kernel_wins)) as choices:
        with pytest.warns(RuntimeWarning, match=r"2 plans for the weight gradient of shapes \(2, 16, 4, 5\) and"):
            kernels.narrow_conv2d(x, weight).sum().backward()
    *without_plans, measurement = choices.measured()
    assert [other.chosen for other in without_plans] == ["library"] * 2
    assert measurement.chosen == "library"
    first, second = measurement.rejected.values()
    assert "power of 2" in first and "differs from the library's result" in second
    expected = torch.autograd.grad(F.conv2d(x, weight, padding=1).sum(), weight)[0]
    assert torch.equal(weight.grad, expected)


def test_a_warning_about_plans_comes_after_the_choice_is_stored(monkeypatch):
    """A warning that is an error, or a function that is called for it and needs a choice itself, changes nothing."""
    bad = (replace(convolution_kernel.plans(16)[0], pixels=48),)
    monkeypatch.setattr(convolution_kernel, "plans", lambda channels: bad)
    x, weight = images(1, 16, 3, 3), torch.randn(16, 16, 3, 3).bfloat16()
    shown = []

    def show(*arguments, **options) -> None:
        shown.append(kernels.narrow_conv2d(images(1, 16, 2, 2), weight))

    with kernels.choosing(kernels.Choices(kernel_wins)) as choices:
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            with pytest.raises(RuntimeWarning, match="1 plans for the output"):
                kernels.narrow_conv2d(x, weight)
            assert torch.equal(kernels.narrow_conv2d(x, weight), conv2d(x, weight))
        with warnings.catch_warnings():
            warnings.simplefilter("once")
            monkeypatch.setattr(warnings, "showwarning", show)
            kernels.narrow_conv2d(images(1, 16, 4, 4), weight)
        assert len(shown) == 2 and len(choices.measured()) == 3


def test_one_thread_measures_for_all():
    calls = []

    def timer(runs: dict) -> dict[str, float]:
        calls.append(threading.get_ident())
        return kernel_wins(runs)

    x, gradient = images(1, 16, 3, 3), images(1, 16, 3, 3)
    choices, plans = kernels.Choices(timer), []
    threads = [
        threading.Thread(target=lambda: plans.append(choices.plan(WEIGHT_GRADIENT, gradient, x))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert plans == [weight_gradient.plans(16, 16)[-1]] * 4


def test_short_memory_leaves_the_shape_to_the_library():
    """For good: both evaluations of a reversible branch must have the same bits."""
    x, weight = images(1, 16, 3, 3), torch.randn(16, 16, 3, 3).bfloat16()

    def timer(runs: dict) -> dict[str, float]:
        raise torch.OutOfMemoryError("planted")

    with kernels.choosing(kernels.Choices(timer)) as choices:
        with pytest.warns(
            RuntimeWarning, match="Our kernel for the output .* could not be tried.*OutOfMemoryError: planted"
        ):
            assert torch.equal(kernels.narrow_conv2d(x, weight), conv2d(x, weight))
        choices.timer = kernel_wins
        assert torch.equal(kernels.narrow_conv2d(x, weight), conv2d(x, weight))
        assert [measurement.chosen for measurement in choices.measured()] == ["library"]


@pytest.mark.parametrize("size", [4, 3_000_000])
def test_values_for_measuring_differ_from_image_to_image(size):
    """A plan that reads the wrong pixels must disagree with the library."""
    seen = []

    def library(first: Tensor, second: Tensor) -> Tensor:
        seen.extend((first, second))
        return first

    operation = choice.Operation("output", library, lambda first, second, plan: first, lambda first, second: (1,))
    x = torch.empty(2, 16, 1, size // 2, dtype=torch.bfloat16)
    kernels.Choices(kernel_wins).plan(operation, x, x)
    for tensor in seen:
        assert tensor.shape == x.shape and tensor.is_contiguous(memory_format=torch.channels_last)
        values = tensor.float()
        assert 0.25 < values.std() < 0.33 and values.abs().max() <= 0.5  # 1 / sqrt(12) = 0.29
        shifted = [values[0] - values[1], values[..., 1:] - values[..., :-1], values[:, 1:] - values[:, :-1]]
        assert all(0.3 < difference.std() < 0.5 for difference in shifted)
    assert not torch.equal(*seen[:2])
