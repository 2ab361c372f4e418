"""Random numbers of PyTorch, Python and NumPy are the same in the recomputation."""

import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from memcnn.engine import generators
from properties.support.blocks import net, rows
from properties.support.scaled import PROGRAMS, Scaled, chain
from properties.support.twin import assert_like_twin, backward, block, weighted_sum

pytestmark = pytest.mark.usefixtures("on_device")


class PythonUniform(Scaled):
    def scale(self, x):
        return random.random() + random.randrange(3)


class PythonGauss(Scaled):
    """``gauss`` caches every second number for the next call."""

    def scale(self, x):
        return random.gauss(1, 0.3)


class NumpyUniform(Scaled):
    def scale(self, x):
        return float(np.random.rand())


class NumpyNormal(Scaled):
    """``randn`` caches every second number for the next call."""

    def scale(self, x):
        return float(np.random.randn())


class NumpyInTurns(Scaled):
    """Draws from NumPy only after some evaluations."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def scale(self, x):
        self.calls += 1
        return float(np.random.rand(2)[1]) if self.calls > 2 else 1.0


class TorchsOwn(Scaled):
    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def scale(self, x):
        return torch.rand(3, generator=self.generator, dtype=torch.float64, device="cpu").to(x.device)


class PythonsOwn(Scaled):
    def __init__(self):
        super().__init__()
        self.generator = random.Random(0)

    def scale(self, x):
        return self.generator.gauss(1, 0.3)


class NumpysOwn(Scaled):
    def __init__(self):
        super().__init__()
        self.generator = np.random.default_rng(0)

    def scale(self, x):
        return float(self.generator.normal())


class NumpysOwnLegacy(NumpysOwn):
    def __init__(self):
        super().__init__()
        self.generator = np.random.RandomState(0)


@PROGRAMS
@pytest.mark.parametrize(
    "branch",
    [
        PythonUniform,
        PythonGauss,
        NumpyUniform,
        NumpyNormal,
        NumpyInTurns,
        TorchsOwn,
        PythonsOwn,
        NumpysOwn,
        NumpysOwnLegacy,
    ],
)
def test_every_generator_gives_the_recomputation_the_numbers_of_the_forward_pass(branch, program):
    """The generator ends in the same state as with the twin."""

    def several(module: nn.Module, x: Tensor) -> list[Tensor]:
        random.seed(1)
        np.random.seed(1)
        for _ in range(4):
            y = program(module, x)
        own = getattr(module[1]._fn.Gm, "generator", None)
        drawn = [random.gauss(0, 1), *np.random.randn(3)]
        drawn += (
            []
            if own is None
            else [getattr(own, "random", own.initial_seed if isinstance(own, torch.Generator) else None)()]
        )
        return [y, torch.tensor(drawn, dtype=torch.float64, device="cpu")]

    assert_like_twin(chain(branch), several, rows())


@pytest.mark.parametrize(
    ("branch", "name"),
    [
        (TorchsOwn, "its own torch.Generator"),
        (PythonsOwn, "its own random.Random"),
        (PythonGauss, "Python's random module"),
    ],
)
def test_a_branch_that_draws_more_in_the_recomputation_is_an_error(branch, name):
    calls = []

    class DrawsMore(branch):
        def scale(self, x):
            calls.append(None)
            scales = [super(DrawsMore, self).scale(x) for _ in calls]
            return scales[0]

    y = block(DrawsMore)(rows())
    with pytest.raises(RuntimeError, match=f"drew other random numbers from {name} in the recomputation"):
        weighted_sum(y).backward()


def test_a_hook_that_draws_draws_again():
    def register(module: nn.Module) -> nn.Module:
        module._fn.Gm.register_forward_hook(lambda m, args, output: output * random.random())
        return module

    def program(module: nn.Module, x: Tensor) -> Tensor:
        random.seed(1)
        return backward(module, x)

    assert_like_twin(register(block(net)), program, rows())


def test_the_memory_of_the_generators_is_understood_here():
    """If it were not understood, reading the states would take ten times as long in every evaluation."""
    assert generators.python_is_readable()
    assert generators.NUMPY.read(None) == generators.numpy_state_from(generators.numpy_memory())
    assert len(generators.numpy_memory()) == 2500
