"""State that PyTorch keeps no account of: it is the same in the recomputation, or a change of it is an error."""

import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from memcnn import AdditiveCoupling, InvertibleModuleWrapper, ReversibleSequential
from memcnn.engine import generators
from properties.engine.test_errors import net, refused, rows, wrapped
from properties.support.twin import assert_like_twin, assert_same, backward, block, plain_twin, run, weighted_sum

pytestmark = pytest.mark.usefixtures("on_device")


class Scaled(nn.Module):
    """A branch whose ``scale()`` is defined by a subclass."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.scale(x)
        return (self.linear(x) * scale).tanh()


def chain(branch, **options) -> nn.Module:
    return nn.Sequential(block(branch, **options), block(branch, **options))


def twice(module: nn.Module, x: Tensor) -> Tensor:
    """Two forward passes before the one backward pass: state has moved on when the first is rebuilt."""
    y = module(x) + module(x + 1)
    weighted_sum(y).backward()
    return y


PROGRAMS = pytest.mark.parametrize("program", [backward, twice], ids=lambda program: program.__name__)


# Buffers


class Averaged(Scaled):
    """Keeps an exponential moving average, as VQ-VAE does of its codes."""

    def __init__(self, size: int = 3):
        super().__init__()
        self.register_buffer("average", torch.ones(size))


class ByData(Averaged):
    def scale(self, x):
        self.average.data.mul_(0.5).add_(x.detach().abs().mean(), alpha=0.5)
        return self.average[:3].clone()


class ByNumpy(Averaged):
    def scale(self, x):
        self.average.numpy()[:] *= 0.5
        return self.average[:3].clone()


class ByDetachedStorage(Averaged):
    def scale(self, x):
        torch.tensor([], dtype=x.dtype).set_(self.average.untyped_storage(), 0, (3,)).mul_(0.5)
        return self.average[:3].clone()


class ByAssignment(Averaged):
    def scale(self, x):
        self.average = self.average * 0.5
        return self.average[:3]


class Codebook(Scaled):
    """Assigns a new parameter at every step."""

    def __init__(self):
        super().__init__()
        self.average = nn.Parameter(torch.ones(3), requires_grad=False)

    def scale(self, x):
        self.average = nn.Parameter(self.average * 0.5, requires_grad=False)
        return self.average


@PROGRAMS
@pytest.mark.parametrize("size", [3, 2**13], ids=["small", "large"])
@pytest.mark.parametrize("branch", [ByData, ByNumpy, ByDetachedStorage, ByAssignment, Codebook])
def test_a_buffer_that_forward_changes_unseen_moves_once_and_is_replayed(branch, program, size):
    if torch.get_default_device().type == "cuda" and branch is ByNumpy:
        pytest.skip("NumPy has no tensors on a GPU")
    assert_like_twin(chain(branch if branch is Codebook else lambda: branch(size)), program, rows())


class Masked(Averaged):
    def scale(self, x):
        return self.average[:3]


@pytest.mark.parametrize("size", [3, 2**13], ids=["small", "large"])
@pytest.mark.parametrize("change", [lambda b: b.data.mul_(2), lambda b: b.numpy().__imul__(2)], ids=["data", "NumPy"])
def test_a_buffer_that_changes_unseen_between_forward_and_backward_is_noticed(change, size):
    if torch.get_default_device().type == "cuda":
        pytest.skip("on a GPU the value of the forward pass is put back for the recomputation")
    module = block(lambda: Masked(size))
    loss = weighted_sum(module(rows()))
    change(module._fn.Fm.average)
    with refused(RuntimeError, "the buffer 'average'", "modified between forward and backward through .data, NumPy"):
        loss.backward()


@pytest.mark.parametrize("name", ["linear", "added"])
def test_a_module_that_is_exchanged_or_added_between_forward_and_backward_is_noticed(name):
    module = block(Masked)
    loss = weighted_sum(module(rows()))
    setattr(module._fn.Gm, name, nn.Linear(3, 3, dtype=torch.float64))
    with refused(RuntimeError, "a module within Masked was exchanged, added or removed between forward and backward"):
        loss.backward()


def test_a_parameter_that_is_removed_before_backward_is_put_back_for_the_recomputation():
    class Weighted(Scaled):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def scale(self, x):
            return 1 if self.weight is None else self.weight

    def program(module: nn.Module, x: Tensor) -> Tensor:
        y, weight = module(x), module._fn.Fm.weight
        module._fn.Fm.weight = None
        weighted_sum(y).backward()
        assert module._fn.Fm.weight is None
        module._fn.Fm.weight = weight
        return y

    assert_like_twin(block(Weighted), program, rows())


# Generators


class PythonUniform(Scaled):
    def scale(self, x):
        return random.random() + random.randrange(3)


class PythonGauss(Scaled):
    """``gauss`` keeps every other number for the next call."""

    def scale(self, x):
        return random.gauss(1, 0.3)


class NumpyUniform(Scaled):
    def scale(self, x):
        return float(np.random.rand())


class NumpyNormal(Scaled):
    """``randn`` keeps every other number for the next call."""

    def scale(self, x):
        return float(np.random.randn())


class NumpyInTurns(Scaled):
    """Begins to draw after some evaluations."""

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
    """And is left where the twin leaves it."""

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


def test_a_hook_that_draws_draws_again():
    def register(module: nn.Module) -> nn.Module:
        module._fn.Gm.register_forward_hook(lambda m, args, output: output * random.random())
        return module

    def program(module: nn.Module, x: Tensor) -> Tensor:
        random.seed(1)
        return backward(module, x)

    assert_like_twin(register(block(net)), program, rows())


def test_the_memory_of_the_generators_is_understood_here():
    """Else every evaluation of a branch would take ten times as long to read them."""
    assert generators.python_is_readable()
    assert generators.NUMPY.read(None) == generators.numpy_state_from(generators.numpy_memory())
    assert len(generators.numpy_memory()) == 2500


# Attributes


class Tempered(Scaled):
    def __init__(self):
        super().__init__()
        self.temperature, self.negate, self.kind = 2.0, False, "linear"

    def scale(self, x):
        scale = {"linear": 1.0, "double": 2.0}[self.kind] / self.temperature
        return -scale if self.negate else scale


@pytest.mark.parametrize(("name", "value"), [("temperature", 0.5), ("negate", True), ("kind", "double")])
@pytest.mark.parametrize(
    "make",
    [lambda: block(Tempered), lambda: wrapped(AdditiveCoupling(Tempered()), keep_input=True)],
    ids=["rebuilt", "keep_input"],
)
def test_an_attribute_that_changes_between_forward_and_backward_is_replayed(make, name, value):
    def program(module: nn.Module, x: Tensor) -> Tensor:
        y = module(x)
        for part in (module._fn.Fm, module._fn.Gm):
            setattr(part, name, value)
        weighted_sum(y).backward()
        assert getattr(module._fn.Fm, name) == getattr(module._fn.Gm, name) == value
        return y

    assert_like_twin(make(), program, rows())


def test_the_rate_of_a_dropout_that_changes_between_forward_and_backward_is_replayed():
    def program(module: nn.Module, x: Tensor) -> Tensor:
        y = module(x)
        module._fn.Fm[1].p = 0.9
        weighted_sum(y).backward()
        return y

    assert_like_twin(block(lambda: nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.3), nn.Tanh())), program, rows())


def test_an_attribute_that_a_user_adds_to_a_layer_of_pytorch_is_replayed():
    class Reading(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * self[0].strength)

    def branch() -> nn.Module:
        module = Reading(nn.Linear(3, 3), nn.Tanh())
        module[0].strength = 2.0
        return module

    def program(module: nn.Module, x: Tensor) -> Tensor:
        y = module(x)
        module._fn.Fm[0].strength = 5.0
        weighted_sum(y).backward()
        return y

    assert_like_twin(block(branch), program, rows())


class Counting(Scaled):
    """Warms up over its calls, and turns its sign at every one."""

    def __init__(self):
        super().__init__()
        self.calls, self.positive = 0, True

    def scale(self, x):
        self.calls += 1
        self.positive = not self.positive
        return self.calls / 3 * (1 if self.positive else -1)


class CountingFromTheClass(Counting):
    """Begins with attributes of its class."""

    calls, positive = 0, True

    def __init__(self):
        super().__init__()
        del self.calls, self.positive


@PROGRAMS
@pytest.mark.parametrize("branch", [Counting, CountingFromTheClass])
def test_a_count_of_calls_moves_once_a_step_and_is_replayed(program, branch):
    module = chain(branch)
    twin = plain_twin(module)
    for _ in range(2):
        assert_same(run(module, program, [rows()]), run(twin, program, [rows()]), limit=1e-10)
        for got, wanted in zip(module, twin, strict=True):
            assert (got._fn.Fm.calls, got._fn.Fm.positive) == (wanted._fn.Fm.calls, wanted._fn.Fm.positive)


class Lazy(Scaled):
    """Builds a layer, or sets another one's weight, in its first forward pass and notes that in a flag."""

    def __init__(self, builds: bool):
        super().__init__()
        self.builds, self.is_ready = builds, False

    def scale(self, x):
        if not self.is_ready:
            self.is_ready = True
            if self.builds:
                self.built = nn.Linear(3, 3, dtype=x.dtype)
            else:
                with torch.no_grad():
                    self.linear.weight.copy_(self.linear.weight / x.abs().mean())
        return self.built(x) if self.builds else 1.0


@pytest.mark.parametrize("builds", [True, False], ids=["builds a layer", "sets a weight"])
def test_a_flag_that_says_that_a_module_is_initialised_stays_set(builds):
    module = block(lambda: Lazy(builds))
    twin = plain_twin(module)
    outcomes = []
    for one in (module, twin):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            x = rows()
            y = one(x)
            kept = list(one.parameters())
            weighted_sum(y).backward()
        assert all(p is q for p, q in zip(kept, one.parameters(), strict=True))
        outcomes.append([x.grad, *(p.grad for p in kept)])
    torch.testing.assert_close(*outcomes)


# Containers among the arguments


class Conditioned(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = net()

    def forward(self, x, context, *, more=None):
        return x + self.shift(context, more)

    def inverse(self, y, context, *, more=None):
        return y - self.shift(context, more)

    def shift(self, context, more):
        return self.f(context["shift"][0] + (0 if more is None else 3 * more[-1]))


@pytest.mark.parametrize("which", ["dictionary", "list"])
def test_a_tensor_within_a_container_that_is_modified_is_noticed(which):
    context, more = {"shift": [rows(4, 3).detach()]}, [rows(4, 3).detach()]
    y = wrapped(Conditioned())(rows(4, 3), context, more=more)
    (context["shift"] if which == "dictionary" else more)[0].mul_(2)
    with refused(RuntimeError, "an argument of Conditioned, shape (4, 3), was modified in place between"):
        weighted_sum(y).backward()


def test_a_container_that_changes_between_forward_and_backward_is_used_as_it_was():
    def program(module: nn.Module, x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        context, more = {"shift": [first]}, [second]
        y = module(x, context, more=more)
        more.append(first)
        context["shift"][0] = second
        weighted_sum(y).backward()
        return y

    assert_like_twin(wrapped(Conditioned()), program, *(rows(4, 3) * (i + 1) for i in range(3)))


def test_the_same_module_used_in_two_blocks_keeps_its_attributes():
    shared = Tempered()
    module = ReversibleSequential(*(InvertibleModuleWrapper(AdditiveCoupling(shared, shared)) for _ in range(3)))
    assert_like_twin(module.double(), twice, rows())
