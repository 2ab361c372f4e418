"""Compare a program on a reversible module with the same program on its plain twin; make small blocks for this."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from memcnn import AdditiveCoupling, InvertibleModuleWrapper
from memcnn.testing.cases import OnlyInvertible
from memcnn.testing.laws.twin import FLOOR, Outcome, plain_twin, run, weighted_sum
from memcnn.testing.tolerances import tolerance

__all__ = [
    "FLOOR",
    "Container",
    "OnlyInvertible",
    "Outcome",
    "assert_like_twin",
    "assert_same",
    "backward",
    "block",
    "conv_branch",
    "data",
    "images",
    "plain_twin",
    "run",
    "weighted_sum",
]


def assert_same(actual: Outcome, expected: Outcome, *, limit: float) -> None:
    """Assert the same results, gradients, buffers and generator state, tensors up to the relative error ``limit``."""
    for name, error in actual.errors(expected).items():
        assert error <= limit, f"{name}: relative error {error:.1e}, limit {limit:.1e}"


def assert_like_twin(module: nn.Module, program: Callable[..., object], *inputs: Tensor, depth: int = 4) -> Outcome:
    """Assert that ``program`` computes on ``module`` what it computes on the twin, and return its outcome."""
    twin = plain_twin(module)
    actual = run(module, program, inputs)
    assert_same(actual, run(twin, program, inputs), limit=tolerance(inputs[0].dtype, depth=depth))
    return actual


def backward(module: nn.Module, *inputs: Tensor) -> Tensor:
    """Run the simplest program: a forward pass and one backward pass."""
    y = module(*inputs)
    weighted_sum(y).backward()
    return y


class Container(nn.Sequential):
    """An invertible container as a user would write it, without the classes of memcnn."""

    def inverse(self, y: Tensor) -> Tensor:
        for module in reversed(self):
            y = module.inverse(y)
        return y


def conv_branch(channels: int = 3) -> nn.Sequential:
    """Return convolution, normalisation, activation, convolution: (N, channels, H, W) to the same shape.

    The first convolution has no bias: before a normalisation its gradient is 0, so only rounding would be compared.
    """
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.Tanh(),
        nn.Conv2d(channels, channels, 3, padding=1),
    )


def block(branch: Callable[[], nn.Module] = conv_branch, **options) -> InvertibleModuleWrapper:
    """Return a wrapped additive coupling of two branches, in float64."""
    return InvertibleModuleWrapper(AdditiveCoupling(branch(), branch()), **options).double()


def images(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0, requires_grad: bool = True) -> Tensor:
    """Return normally distributed values, the same on every device, of shape (2, 6, 5, 4) if none is given."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape or (2, 6, 5, 4), generator=generator, dtype=dtype, device="cpu")
    return values.to(torch.get_default_device()).requires_grad_(requires_grad)


def data(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return the same values as ``images``, which require no gradient."""
    return images(*shape, dtype=dtype, requires_grad=False)
