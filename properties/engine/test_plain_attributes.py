"""Plain attributes and arguments in containers are those of the forward pass in the recomputation."""

import io

import pytest
import torch
from torch import Tensor, nn

from memcnn import AdditiveCoupling, InvertibleModuleWrapper, ReversibleSequential
from properties.support.blocks import Notes, net, refused, rows, wrapped
from properties.support.scaled import PROGRAMS, Scaled, chain, twice
from properties.support.twin import assert_like_twin, assert_same, backward, block, plain_twin, run, weighted_sum

pytestmark = pytest.mark.usefixtures("on_device")


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
    """Counts its calls; the scale grows with the count and changes its sign at every call."""

    def __init__(self):
        super().__init__()
        self.calls, self.positive = 0, True

    def scale(self, x):
        self.calls += 1
        self.positive = not self.positive
        return self.calls / 3 * (1 if self.positive else -1)


class CountingBesideATensor(Counting):
    """Has a tensor attribute that is no buffer."""

    def __init__(self):
        super().__init__()
        self.mask = torch.ones(3)


class CountingFromTheClass(Counting):
    """Starts with attributes of its class."""

    calls, positive = 0, True

    def __init__(self):
        super().__init__()
        del self.calls, self.positive


@PROGRAMS
@pytest.mark.parametrize("branch", [Counting, CountingBesideATensor, CountingFromTheClass])
def test_a_count_of_calls_moves_once_a_step_and_is_replayed(program, branch):
    module = chain(branch)
    twin = plain_twin(module)
    for _ in range(2):
        assert_same(run(module, program, [rows()]), run(twin, program, [rows()]), limit=1e-10)
        for got, wanted in zip(module, twin, strict=True):
            assert (got._fn.Fm.calls, got._fn.Fm.positive) == (wanted._fn.Fm.calls, wanted._fn.Fm.positive)


class Remembering(Scaled):
    """Sets an attribute, which is None before, in its first forward pass."""

    def __init__(self, value: object):
        super().__init__()
        self.value, self.noted = value, None

    def scale(self, x):
        scale = 1.0 if self.noted is None else 2.0
        self.noted = self.value.clone() if isinstance(self.value, Tensor) else self.value
        return scale


@pytest.mark.parametrize("value", [3, 0.5, True, "word", torch.ones(2)], ids=lambda value: type(value).__name__)
def test_an_attribute_that_the_first_forward_pass_sets_is_none_in_the_recomputation_too(value):
    module = chain(lambda: Remembering(value))
    assert_like_twin(module, backward, rows())
    assert all(type(wrapped._fn.Gm.noted) is type(value) for wrapped in module)


def test_an_object_that_the_first_forward_pass_opens_is_opened_once():
    class Logging(Scaled):
        """Opens a log in its first forward pass."""

        def __init__(self):
            super().__init__()
            self.log, self.opened = None, Notes()

        def scale(self, x):
            if self.log is None:
                self.opened.append(None)
                self.log = io.StringIO()
            return 1.0

    module = block(Logging)
    weighted_sum(module(rows())).backward()
    for branch in (module._fn.Fm, module._fn.Gm):
        assert isinstance(branch.log, io.StringIO) and len(branch.opened) == 1


class Lazy(Scaled):
    """Builds a layer, or sets another layer's weight, in its first forward pass, and sets a flag."""

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
