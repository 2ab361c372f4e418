"""Running a program on a reversible module and on its twin, which has the same values and stores everything."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from memcnn import AdditiveCoupling, InvertibleModuleWrapper
from memcnn.testing.cases import OnlyInvertible
from memcnn.testing.tolerances import relative_error, tolerance

__all__ = ["FLOOR", "OnlyInvertible", "Outcome", "assert_like_twin", "assert_same", "backward", "block", "conv_branch",
           "differences", "images", "plain_twin", "run", "weighted_sum"]

FLOOR = 1e-3
"""A gradient that cancels to zero is compared at this fraction of the largest one."""


def plain_twin(module: nn.Module) -> nn.Module:
    """A deep copy that runs under ordinary autograd."""
    twin = copy.deepcopy(module)
    for part in twin.modules():
        if isinstance(part, InvertibleModuleWrapper):
            part.disable = True
    return twin


@dataclass
class Outcome:
    """All that a program computed and all that it left behind."""

    results: list[Tensor]
    gradients: dict[str, Tensor | None]
    buffers: dict[str, Tensor]
    generators: Tensor


def run(module: nn.Module, program: Callable[..., object], inputs: list[Tensor], seed: int = 0) -> Outcome:
    """``program(module, *inputs)`` on leaf copies of the inputs; it differentiates, and returns tensors or None."""
    leaves = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_(x.requires_grad) for x in inputs]
    cuda = sorted({x.device.index for x in inputs if x.is_cuda})
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        results = program(module, *leaves)
        generators = torch.cat([torch.get_rng_state(), *map(torch.cuda.get_rng_state, cuda)])
    results = [results] if isinstance(results, Tensor) else list(results or [])
    named = [(f"input {i}", x) for i, x in enumerate(leaves)] + list(module.named_parameters())
    return Outcome([r.detach() for r in results], {name: x.grad for name, x in named},
                   dict(module.named_buffers()), generators)


def assert_same(actual: Outcome, expected: Outcome, *, limit: float) -> None:
    """Same results, gradients, buffers and generator state, tensors up to the relative error ``limit``."""
    for name, error in differences(actual, expected).items():
        assert error <= limit, f"{name}: relative error {error:.1e}, limit {limit:.1e}"


def differences(actual: Outcome, expected: Outcome) -> dict[str, float]:
    """The relative errors by name, where the generators agree, and all that was computed in the one in the other."""
    assert torch.equal(actual.generators, expected.generators), "the random numbers drawn are not the twin's"
    assert len(actual.results) == len(expected.results)
    assert actual.gradients.keys() == expected.gradients.keys()
    results = zip(actual.results, expected.results, strict=True)
    return {
        **_differences({f"result {i}": pair for i, pair in enumerate(results)}),
        **_differences({f"gradient of {name}": (actual.gradients[name], wanted)
                        for name, wanted in expected.gradients.items()}),
        **{f"buffer {name}": relative_error(actual.buffers[name], wanted) for name, wanted in expected.buffers.items()},
    }


def _differences(pairs: dict[str, tuple[Tensor | None, Tensor | None]]) -> dict[str, float]:
    largest = max((wanted.abs().max().item() for _, wanted in pairs.values() if wanted is not None), default=0.0)
    for name, (got, wanted) in pairs.items():
        assert (got is None) == (wanted is None), f"{name}: got {got}, wanted {wanted}"
        assert wanted is None or got.dtype == wanted.dtype, f"{name}: got {got.dtype}, wanted {wanted.dtype}"
    return {name: relative_error(got, wanted, least_scale=FLOOR * largest)
            for name, (got, wanted) in pairs.items() if wanted is not None}


def assert_like_twin(module: nn.Module, program: Callable[..., object], *inputs: Tensor, depth: int = 4) -> Outcome:
    """``program`` computes on ``module`` what it computes on the twin."""
    twin = plain_twin(module)
    actual = run(module, program, list(inputs))
    assert_same(actual, run(twin, program, list(inputs)), limit=tolerance(inputs[0].dtype, depth=depth))
    return actual


def backward(module: nn.Module, *inputs: Tensor) -> Tensor:
    """The plainest program: outputs, weighted so that no gradient is constant, and one backward pass."""
    y = module(*inputs)
    weighted_sum(y).backward()
    return y


def weighted_sum(y: Tensor) -> Tensor:
    """A scalar of y whose gradient with respect to y varies from entry to entry."""
    weights = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).sin().to(y.dtype).view(y.shape)
    return (y * weights.to(y.device)).sum()


class Container(nn.Sequential):
    """The container of somebody who has not heard of ours."""

    def inverse(self, y: Tensor) -> Tensor:
        for module in reversed(self):
            y = module.inverse(y)
        return y


def conv_branch(channels: int = 3) -> nn.Sequential:
    """Convolution, normalisation, activation, convolution: (N, channels, H, W) to the same shape.

    The first convolution has no bias: before a normalisation its gradient is 0, and what is computed is rounding alone.
    """
    return nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.Tanh(),
                         nn.Conv2d(channels, channels, 3, padding=1))


def block(branch: Callable[[], nn.Module] = conv_branch, **options) -> InvertibleModuleWrapper:
    """A wrapped additive coupling of two branches, in float64."""
    return InvertibleModuleWrapper(AdditiveCoupling(branch(), branch()), **options).double()


def images(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0, requires_grad: bool = True) -> Tensor:
    """Normally distributed values, (2, 6, 5, 4) if no shape is given, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape or (2, 6, 5, 4), generator=generator, dtype=dtype, device="cpu")
    return values.to(torch.get_default_device()).requires_grad_(requires_grad)
