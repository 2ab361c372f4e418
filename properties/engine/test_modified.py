"""Changes between forward and backward, or in the second evaluation, are noticed: no gradient is silently wrong."""

from itertools import count

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from memcnn import AdditiveCoupling, InvertibleModuleWrapper, ReversibleSequential
from memcnn.testing.tolerances import tolerance
from properties.support.blocks import Doubling, net, refused, rows, wrapped
from properties.support.twin import (
    assert_like_twin,
    assert_same,
    backward,
    block,
    images,
    plain_twin,
    run,
    weighted_sum,
)

pytestmark = pytest.mark.usefixtures("on_device")


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("mask", torch.tensor([1.0, 0.0, 1.0]))

    def forward(self, x):
        return self.linear(x * self.mask).tanh()


@pytest.mark.parametrize(
    "make",
    [
        lambda: block(Masked),
        lambda: block(lambda: nn.Sequential(Masked())),
        lambda: ReversibleSequential(AdditiveCoupling(Masked()), block(net)).double(),
        lambda: wrapped(AdditiveCoupling(Masked()), keep_input=True),
    ],
    ids=["block", "nested", "sequence", "keep_input"],
)
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("linear.weight", ["the parameter 'weight' of shape (3, 3) was modified between forward and backward"]),
        ("linear.bias", ["the parameter 'bias' of shape (3,) was modified between forward and backward"]),
        ("mask", ["the buffer 'mask' of shape (3,) was modified between forward and backward"]),
    ],
)
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_values_that_change_between_forward_and_backward_are_noticed(make, name, words, frozen):
    module = make().requires_grad_(not frozen)
    loss = weighted_sum(module(rows()))
    value = next(t for key, t in (*module.named_parameters(), *module.named_buffers()) if key.endswith(name))
    with torch.no_grad():
        value.mul_(2)
    with refused(RuntimeError, *words, "call backward before it changes"):
        loss.backward()


class Borrowing(nn.Module):
    """Uses a leaf tensor that is not one of its parameters."""

    def __init__(self):
        super().__init__()
        self.borrowed = [torch.full((3, 3), 0.5, dtype=torch.float64, requires_grad=True)]

    def forward(self, x):
        return (x @ self.borrowed[0]).tanh()


def test_a_leaf_of_somebody_else_that_changes_between_forward_and_backward_is_noticed():
    branch = Borrowing()
    loss = weighted_sum(wrapped(AdditiveCoupling(branch, net()))(rows()))
    with torch.no_grad():
        branch.borrowed[0].mul_(2)
    with refused(
        RuntimeError,
        "a parameter of shape (3, 3) that Borrowing used was modified between forward and backward",
        "call backward before the parameters change",
    ):
        loss.backward()


class Noisy(nn.Module):
    """y = x + noise, which saves nothing for backward. The inverse subtracts ``times`` the noise."""

    def __init__(self, times: float):
        super().__init__()
        self.times = times

    def forward(self, x):
        return x + torch.randn_like(x)

    def inverse(self, y):
        return y - self.times * torch.randn_like(y)


def test_random_numbers_of_a_module_that_saves_nothing_are_undone_or_refused():
    def chain(times: float) -> nn.Module:
        return nn.Sequential(block(net), wrapped(Noisy(times)))

    assert_like_twin(chain(1.0), backward, rows())
    loss = weighted_sum(chain(2.0)(rows()))
    with pytest.raises(RuntimeError, match="Noisy draws random numbers .* its inverse does not undo"):
        loss.backward()


def test_running_statistics_that_move_between_an_evaluation_and_its_backward_pass_are_noticed():
    module = block().eval()
    loss = weighted_sum(module(images()))
    module.train()(images(seed=1))
    with refused(RuntimeError, "the buffer 'num_batches_tracked'", "was modified between forward and backward"):
        loss.backward()


def times_two(y):
    y.mul_(2)


def relu(y):
    F.relu(y, inplace=True)


def a_part(y):
    y[:, 1:2] += 1


def unseen_by_autograd(y):
    with torch.no_grad():
        y.zero_()


@pytest.mark.parametrize(
    "make",
    [
        lambda: block(net),
        lambda: wrapped(Doubling()),
        lambda: ReversibleSequential(AdditiveCoupling(net()), AdditiveCoupling(net())).double(),
    ],
    ids=["coupling", "module", "sequence"],
)
@pytest.mark.parametrize("modify", [times_two, relu, a_part, unseen_by_autograd], ids=lambda modify: modify.__name__)
def test_an_output_modified_in_place_is_noticed(make, modify):
    y = make()(rows())
    modify(y)
    with refused(RuntimeError, "an output", "shape (4,", "modified in place", "modify a clone"):
        weighted_sum(y).backward()


@pytest.mark.parametrize(
    "make",
    [lambda: block(net, keep_input=True), lambda: wrapped(Doubling(), keep_input=True)],
    ids=["coupling", "module"],
)
def test_a_kept_input_modified_in_place_is_noticed(make):
    x = rows().sin()
    y = make()(x)
    x.zero_()
    with refused(RuntimeError, "kept input", "modified in place"):
        weighted_sum(y).backward()


@pytest.mark.parametrize("make", [lambda: block(net), lambda: wrapped(Doubling())], ids=["coupling", "module"])
def test_an_input_that_is_not_kept_may_be_modified(make):
    def program(module, x):
        h = x.clone()
        y = module(h)
        if not module.disable:  # the twin has saved it
            with torch.no_grad():
                h.zero_()
        weighted_sum(y).backward()
        return y

    module = make()
    twin = plain_twin(module)
    assert_same(run(module, program, [rows()]), run(twin, program, [rows()]), limit=tolerance(torch.float64))


class Shifted(nn.Module):
    def forward(self, x, index, shift=0):
        return x + self.of(index) + shift * 2

    def inverse(self, y, index, shift=0):
        return y - self.of(index) - shift * 2

    def of(self, index):
        return (self.scale * index)[:, None]

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))


@pytest.mark.parametrize("which", [0, 1], ids=["positional", "keyword"])
def test_an_argument_modified_in_place_is_noticed(which):
    arguments = [torch.arange(4), torch.ones(4, 6, dtype=torch.float64)]
    y = wrapped(Shifted())(rows(), arguments[0], shift=arguments[1])
    arguments[which].mul_(2)
    with refused(RuntimeError, "an argument of Shifted", "was modified in place between forward and backward"):
        weighted_sum(y).backward()


class SavedAndModified(nn.Module):
    def forward(self, x):
        y = x.exp()
        z = y.sin()
        y.mul_(2)
        return z + y


def test_a_branch_that_modifies_what_its_gradient_needs_is_refused_as_by_torch():
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        weighted_sum(block(SavedAndModified, disable=True)(rows())).backward()
    with refused(RuntimeError, "SavedAndModified modifies in place a tensor of shape (4, 3)", "out-of-place"):
        weighted_sum(block(SavedAndModified)(rows())).backward()


class Alternating(nn.Module):
    """Computes something else at every second call."""

    def __init__(self, *functions):
        super().__init__()
        self.functions, self.calls = functions, count(1)  # a plain number would be set back for the recomputation
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.functions[next(self.calls) % len(self.functions)](x * self.scale)


@pytest.mark.parametrize(
    "functions",
    [
        (torch.sin, lambda x: x.sin().cos()),
        (lambda x: x.sin().cos(), torch.sin),
        (lambda x: (x @ x.new_ones(3, 1) + x).sin(), lambda x: (x @ x.new_ones(3, 3)).sin()),
        (lambda x: x.float().sin(), torch.sin),
    ],
    ids=["fewer", "more", "shapes", "types"],
)
def test_a_branch_that_saves_other_tensors_the_second_time_is_noticed(functions):
    module = InvertibleModuleWrapper(AdditiveCoupling(Alternating(*functions), nn.Identity())).double()
    y = module(rows())
    with refused(
        RuntimeError,
        "Alternating computed something else in the recomputation than in the forward pass",
        "its forward must depend on its input, parameters, buffers and torch's random numbers alone",
    ):
        weighted_sum(y).backward()


def test_an_output_modified_before_the_next_block_is_not_taken_for_what_the_block_put_out():
    first, second = block(), block()
    y = first(images())
    with torch.no_grad():
        y.mul_(2)
    loss = weighted_sum(second(y))
    with pytest.raises(RuntimeError, match="modified in place after the forward pass"):
        loss.backward()


def test_an_output_given_other_data_before_the_next_block_trains_as_in_the_twin():
    def program(module, x):
        y = module(x)
        y.data = y.data * 2
        weighted_sum(module(y)).backward()

    assert_like_twin(block(), program, images())
