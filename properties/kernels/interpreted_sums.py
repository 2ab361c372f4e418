"""Run the kernels of channel sums on a CPU with Triton's interpreter.

The variable must be set before Triton is imported, so ``test_channel_sums.py`` runs this file in a process of its own.
By hand: ``TRITON_INTERPRET=1 pytest properties/kernels/interpreted_sums.py``.
"""

from itertools import permutations, product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memcnn.kernels.channel_sums import COUNTERS, batch_statistics, divide, gradient_sums

CHANNELS = (1, 3, 16, 56, 64, 112, 128, 300)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
H100 = 132  # multiprocessors
NO_UPDATE = dict(momentum=0.0, running_mean=None, running_var=None, count=None)


def images(n: int, channels: int, height: int, width: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return images in channels_last between two images of NaN in memory, which a read out of bounds would spread."""
    padded = torch.full((n + 2, channels, height, width), torch.nan, dtype=dtype)
    padded = padded.contiguous(memory_format=torch.channels_last)
    padded[1:-1] = torch.randn(n, channels, height, width)
    return padded[1:-1]


def rows(x: Tensor) -> Tensor:
    """Return the values of each channel, (N * H * W, C)."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def counters(number: int = COUNTERS) -> Tensor:
    """Return a new counter."""
    return torch.zeros(number, dtype=torch.int32)


def statistics(x: Tensor, *, eps: float = 1e-5, processors: int = H100, counter: Tensor | None = None) -> Tensor:
    """Return the kernel's statistics, without running statistics, and check that the counter is 0 afterwards."""
    counter = counters() if counter is None else counter
    result = batch_statistics(x, eps=eps, processors=processors, counter=counter, **NO_UPDATE)
    assert (result.dtype, result.shape) == (torch.float32, (2, x.shape[1]))
    assert not counter.any()
    return result


def exact_statistics(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Return mean and reciprocal deviation, (2, C), in float64."""
    variance, mean = torch.var_mean(rows(x).double(), 0, correction=0)
    return torch.stack([mean, (variance + eps).rsqrt()])


def assert_statistics(result: Tensor, x: Tensor, *, mean_error: float = 1e-6, scale_error: float = 1e-5) -> None:
    """Check the statistics against float64. The errors are shares of the largest value and of the scale."""
    expected = exact_statistics(x)
    assert ((result[0] - expected[0]).abs() <= mean_error * rows(x).double().abs().amax(0)).all()
    assert ((result[1] / expected[1] - 1).abs() <= scale_error).all()


def masked_gradient(gradient: Tensor, xhat: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return the gradient (rows, C) before a ReLU. The mask is computed in float32, as the kernel does."""
    z = (xhat * weight + bias).to(gradient.dtype)
    return torch.where(z <= 0, 0, gradient)


def assert_gradient_sums(
    gradient: Tensor, x: Tensor, *, relu: bool, processors: int = H100, counter: Tensor | None = None
) -> Tensor:
    """Check both sums against float64, and return them."""
    counter, channels = counters() if counter is None else counter, x.shape[1]
    weight, bias, given = torch.randn(channels), torch.randn(channels), exact_statistics(x).float()
    options = dict(relu=relu, processors=processors, counter=counter)
    result = gradient_sums(gradient, x, given, weight, bias, **options)
    assert (result.dtype, result.shape) == (torch.float32, (2, channels))
    assert not counter.any()
    xhat, g = (rows(x).float() - given[0]) * given[1], rows(gradient)
    g = (masked_gradient(g, xhat, weight, bias) if relu else g).double()
    for ours, terms in zip(result, (g, g * xhat), strict=True):
        assert ((ours - terms.sum(0)).abs() <= 1e-6 * terms.abs().sum(0)).all()
    return result


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", CHANNELS)
def test_statistics_against_float64(channels, dtype):
    x = images(3, channels, 3, 5, dtype=dtype)
    assert_statistics(statistics(x), x)


@pytest.mark.parametrize(
    ("channels", "dtype", "relu"),
    [*product(CHANNELS, [torch.float32], [True]), *product([3, 56, 64], DTYPES[1:], [False, True])],
    ids=str,
)
def test_gradient_sums_against_float64(channels, dtype, relu):
    x, gradient = (images(3, channels, 3, 5, dtype=dtype) for _ in range(2))
    assert_gradient_sums(gradient, x, relu=relu)


@pytest.mark.parametrize("dtypes", list(permutations(DTYPES, 2)), ids=str)
def test_gradient_of_another_dtype(dtypes):
    x, gradient = (images(3, 56, 3, 9, dtype=dtype) for dtype in dtypes)
    assert_gradient_sums(gradient, x, relu=True)


@pytest.mark.parametrize("processors", [1, H100])
@pytest.mark.parametrize("shape", [(3, 16, 11, 25), (1, 40, 5, 35)], ids=str)
def test_every_division_gives_the_same_sums(shape, processors):
    """The number of programs changes only the rounding. Launches that use one counter in turn repeat the bits."""
    x, gradient = images(*shape), images(*shape)
    counter = counters()
    first = statistics(x, processors=processors, counter=counter)
    assert_statistics(first, x)
    torch.manual_seed(1)
    first_sums = assert_gradient_sums(gradient, x, relu=True, processors=processors, counter=counter)
    assert torch.equal(statistics(x, processors=processors, counter=counter), first)
    torch.manual_seed(1)
    second_sums = assert_gradient_sums(gradient, x, relu=True, processors=processors, counter=counter)
    assert torch.equal(second_sums, first_sums)


def test_more_programs_than_are_merged_at_a_time():
    x, gradient = (images(1, 17, 64, 65) for _ in range(2))
    division = divide(x.shape, x.element_size(), H100)
    assert division.constants["LOADS"] > 4
    assert_statistics(statistics(x), x)
    assert_gradient_sums(gradient, x, relu=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_row(dtype):
    x = images(1, 5, 1, 1, dtype=dtype)
    result = statistics(x, eps=0.25)
    assert torch.equal(result[0], x.flatten().float())
    assert torch.allclose(result[1], torch.full((5,), 2.0), rtol=1e-6)
    assert_gradient_sums(images(1, 5, 1, 1, dtype=dtype), x, relu=True)


@pytest.mark.parametrize("processors", [1, H100])
def test_constant_channels_have_no_variance(processors):
    x = images(3, 16, 15, 13)
    constants = torch.linspace(-1, 1, 16)
    x[:] = constants[:, None, None]
    result = statistics(x, eps=0.25, processors=processors)
    assert torch.allclose(result[0], constants, rtol=1e-6)
    assert torch.allclose(result[1], torch.full((16,), 2.0), rtol=1e-6)


@pytest.mark.parametrize("processors", [1, H100])
def test_variance_of_large_means(processors):
    """The variance does not lose its digits, nor if the first row is far away from the others."""
    x = images(3, 16, 11, 23)
    x.mul_(0.1).add_(1000)
    assert_statistics(statistics(x, processors=processors), x, scale_error=1e-3)
    x[0, :, 0, 0] = -1e6
    assert_statistics(statistics(x, processors=processors), x, scale_error=1e-3)


def test_means_that_differ_between_programs():
    x = images(3, 16, 11, 23)
    x += 100 * torch.arange(3)[:, None, None, None]
    x[0] *= 1e-3
    assert_statistics(statistics(x), x)


@pytest.mark.parametrize(("dtype", "momentum"), [*product(DTYPES, [0.1]), (torch.float32, 1.0)], ids=str)
def test_running_statistics_are_those_of_batch_norm(dtype, momentum):
    """They agree after three updates by several programs and channel blocks."""
    layer, counter = nn.BatchNorm2d(40, momentum=momentum), counters()
    running_mean, running_var, count = (value.clone() for value in layer.buffers())
    for update in range(3):
        x = images(2, 40, 5, 7, dtype=dtype)
        x.mul_(1 + update)
        layer(x.float())
        copy = torch.full((2, 40), torch.nan)
        result = batch_statistics(
            x,
            eps=layer.eps,
            momentum=momentum,
            running_mean=running_mean,
            running_var=running_var,
            count=count,
            counter=counter,
            processors=H100,
            copy=copy,
        )
        assert_statistics(result, x)
        assert torch.equal(copy, result)
        assert not counter.any()
    torch.testing.assert_close([running_mean, running_var, count], list(layer.buffers()), rtol=1e-5, atol=1e-6)
    assert count.item() == 3


@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
def test_gradients_of_weight_and_bias(relu):
    """They are those of PyTorch's batch_norm and relu, from the kernel's own statistics."""
    x, gradient = (images(3, 32, 9, 11) for _ in range(2))
    weight, bias = (torch.randn(32, dtype=torch.float64, requires_grad=True) for _ in range(2))
    y = F.batch_norm(x.double(), None, None, weight, bias, training=True)
    expected = torch.autograd.grad(y.relu() if relu else y, (bias, weight), gradient.double())
    options = dict(relu=relu, counter=counters(), processors=H100)
    result = gradient_sums(gradient, x, statistics(x), weight.detach().float(), bias.detach().float(), **options)
    torch.testing.assert_close(result.double(), torch.stack(expected), rtol=1e-5, atol=1e-4)


def test_zeros_of_both_signs():
    """A zero before the ReLU, of either sign, stops the gradient. Gradients of -0.0 add nothing. Sums are exact."""
    x, gradient = images(3, 8, 5, 7), images(3, 8, 5, 7)
    x.copy_(torch.randint(-2, 3, x.shape))
    gradient.copy_(torch.randint(-3, 4, x.shape)).mul_(-1)
    assert (rows(gradient).signbit() & (rows(gradient) == 0)).any()
    weight = torch.tensor([1.0, -1.0, 0.0, -0.0, 2.0, 1.0, 1.0, 1.0])
    bias = torch.tensor([0.0, 0.0, 0.0, -0.0, -2.0, 1.0, -0.0, -2.0])
    given = torch.tensor([[0.0] * 8, [1.0] * 8])
    result = gradient_sums(gradient, x, given, weight, bias, relu=True, counter=counters(), processors=H100)
    g = masked_gradient(rows(gradient), rows(x), weight, bias)
    assert torch.equal(result, torch.stack([g.sum(0), (g * rows(x)).sum(0)]))
    assert not result[:, 2:4].any() and not result[:, 7].any() and result[:, :2].any()


@pytest.mark.parametrize(("dtype", "counts"), [(torch.float16, False), (torch.float32, True)], ids=str)
def test_output_that_rounds_to_zero_stops_the_gradient(dtype, counts):
    x, gradient = (images(1, 4, 3, 3, dtype=dtype) for _ in range(2))
    given = torch.stack([torch.zeros(4), torch.ones(4)])
    options = dict(relu=True, counter=counters(), processors=H100)
    result = gradient_sums(gradient, x, given, torch.zeros(4), torch.full((4,), 1e-9), **options)
    assert result.any() == counts


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy's, where infinities cancel
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_not_finite_values_stay_in_their_channel(value):
    x, gradient = images(3, 16, 5, 7), images(3, 16, 5, 7)
    others = torch.arange(16) != 5
    expected, options = statistics(x), dict(relu=True, counter=counters(), processors=H100)
    expected_sums = gradient_sums(gradient, x, expected, torch.ones(16), torch.zeros(16), **options)
    x[2, 5, 3, 4] = value
    result = statistics(x)
    sums = gradient_sums(gradient, x, result, torch.ones(16), torch.zeros(16), **options)
    assert not result[0, 5].isfinite() and result[1, 5].isnan()
    assert sums[1, 5].isnan()
    assert torch.equal(result[:, others], expected[:, others])
    assert torch.equal(sums[:, others], expected_sums[:, others])


def test_arguments_that_cannot_be_right_raise():
    x, buffers = images(1, 4, 1, 1), dict(running_mean=torch.zeros(4), running_var=torch.ones(4), count=torch.tensor(0))
    with pytest.raises(ValueError, match=r"Expected more than 1 value per channel .* \(1, 4, 1, 1\)"):
        batch_statistics(x, eps=1e-5, momentum=0.1, counter=counters(), processors=H100, **buffers)
    with pytest.raises(ValueError, match="counter has 1 elements, expected at least 10"):
        statistics(images(1, 300, 1, 1), counter=counters(1))
