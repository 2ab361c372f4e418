"""A reversible block behaves like the same block under ordinary autograd in every program around it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.nn.utils.parametrizations import spectral_norm

from properties.support.twin import assert_like_twin, backward, block, conv_branch, images, weighted_sum

pytestmark = pytest.mark.usefixtures("on_device")


def around(before=lambda x: x, after=lambda y: y):
    """Return the program that differentiates after(module(before(x)))."""

    def program(module, x):
        y = after(module(before(x)))
        weighted_sum(y).backward()
        return y

    return program


def skip_around(module, x):
    y = x * 2
    return differentiated(y + module(y))


def input_used_by_something_else(module, x):
    h = x.sin()
    return differentiated(module(h) * torch.exp(h))


def output_used_twice(module, x):
    y = module(x)
    return differentiated(y * y.cos())


def output_dropped(module, x):
    y = module(x)
    module(y.detach() * 2)
    return differentiated(y)


def same_input_twice(module, x):
    return differentiated(module(x) - 3 * module(x.clone()) + module(x).sin())


def accumulated(module, x):
    for factor in (1, 2):
        weighted_sum(module(x * factor)).backward()


def two_forwards_before_two_backwards(module, x):
    first, second = weighted_sum(module(x)), weighted_sum(module(x.flip(0)))
    first.backward()
    second.backward()


def retained(module, x):
    loss = weighted_sum(module(x))
    for _ in range(3):
        loss.backward(retain_graph=True)
    loss.backward()


def retain_grad_inside(module, x):
    h = x.sin()
    h.retain_grad()
    y = module(h)
    y.retain_grad()
    weighted_sum(y.square()).backward()
    return h.grad, y.grad


def through_autograd_grad(module, x):
    loss = weighted_sum(module(x))
    return torch.autograd.grad(loss, [x, *module.parameters()])


def backward_to_one_parameter(module, x):
    weighted_sum(module(x)).backward(inputs=[next(module.parameters())])


def backward_in_two_pieces(module, x):
    middle = module(x)
    end = module(middle)
    (gradient,) = torch.autograd.grad(weighted_sum(end), middle)
    middle.backward(gradient)
    return gradient


def double_backward(module, x):
    (gradient,) = torch.autograd.grad(weighted_sum(module(x).sin()), x, create_graph=True)
    gradient.square().sum().backward()
    return gradient


def under_save_on_cpu(module, x):
    with save_on_cpu():
        return differentiated(module(x.sin()).cos())


def by_hand(module, x):
    for _ in range(4):
        x = module(x)
    return differentiated(x)


def through_the_inverse(module, x):
    return differentiated(module.inverse(x))


def there_and_back(module, x):
    return differentiated(module.inverse(module(x).sin()))


def modes_switched_before_backward(module, x):
    loss = weighted_sum(module(x))
    module.eval()
    loss.backward()
    assert not any(part.training for part in module.modules())
    module.train()


def differentiated(y):
    weighted_sum(y).backward()
    return y


PROGRAMS = [
    backward,
    skip_around,
    input_used_by_something_else,
    output_used_twice,
    output_dropped,
    same_input_twice,
    accumulated,
    two_forwards_before_two_backwards,
    retained,
    retain_grad_inside,
    through_autograd_grad,
    backward_to_one_parameter,
    backward_in_two_pieces,
    double_backward,
    under_save_on_cpu,
    by_hand,
    through_the_inverse,
    there_and_back,
    modes_switched_before_backward,
]
AROUND = {
    "relu_before": around(before=F.relu),
    "sigmoid_before": around(before=torch.sigmoid),
    "dropout_before": around(before=lambda x: F.dropout(x, 0.4)),
    "inplace_relu_on_a_clone_after": around(after=lambda y: y.clone().relu_()),
    "slice_before": around(before=lambda x: torch.cat([x, x], 3)[..., 1::2]),
    "transposed_before": around(before=lambda x: x.transpose(2, 3)),
    "expanded_before": around(before=lambda x: x[:1].expand(3, -1, -1, -1)),
    "channels_last_before": around(before=lambda x: x.contiguous(memory_format=torch.channels_last)),
    "no_gradient_to_the_input": around(before=lambda x: x.detach()),
    "slice_after": around(after=lambda y: y[:, 2:4]),
}


class WithDropout(nn.Module):
    """A branch that draws random numbers."""

    def __init__(self):
        super().__init__()
        self.net = conv_branch()

    def forward(self, x):
        return F.dropout(self.net(F.dropout(x, 0.3)), 0.5)


class InPlaceInside(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        y = self.conv(x)
        y.mul_(2).tanh_()
        return F.silu(y + x, inplace=True)


class ViewOfInput(nn.Module):
    def forward(self, x):
        return x.flip(2).view(x.shape)


class SelfMadeNorm(nn.Module):
    """Updates a buffer in every forward pass in training, and its output depends on it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(1))

    def forward(self, x):
        if self.training:
            self.scale.mul_(0.5).add_(x.detach().abs().mean() + 0.5)
        return x.tanh() * self.scale.clone()


class FunctionalNorm(nn.Module):
    """Passes its buffers to the functional batch norm, which updates them without autograd's version counter."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("var", torch.ones(3))

    def forward(self, x):
        return F.batch_norm(x, self.mean, self.var, training=self.training).sin()


BRANCHES = {
    "conv": conv_branch,
    "dropout": WithDropout,
    "in_place_inside": InPlaceInside,
    "identity": nn.Identity,
    "view_of_input": ViewOfInput,
    "cumulative_batch_norm": lambda: nn.Sequential(nn.BatchNorm2d(3, momentum=None), nn.Conv2d(3, 3, 1)),
    "spectral_norm": lambda: nn.Sequential(spectral_norm(nn.Conv2d(3, 3, 3, padding=1)), nn.Tanh()),
    "self_made_norm": lambda: nn.Sequential(SelfMadeNorm(), nn.Conv2d(3, 3, 1)),
    "functional_norm": FunctionalNorm,
    "linear_on_a_flattened_view": lambda: nn.Sequential(
        nn.Flatten(2), nn.Linear(20, 20), nn.GELU(), nn.Unflatten(2, (5, 4))
    ),
    "instance_and_group_norm": lambda: nn.Sequential(
        nn.InstanceNorm2d(3, affine=True, track_running_stats=True), nn.GroupNorm(3, 3), nn.SiLU()
    ),
    "max_pool": lambda: nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.Conv2d(3, 3, 1)),
    "nested_block": lambda: nn.Sequential(nn.Conv2d(3, 4, 1), block(lambda: conv_branch(2)), nn.Conv2d(4, 3, 1)),
}


@pytest.mark.parametrize(
    "program", [*PROGRAMS, *AROUND.values()], ids=[*(program.__name__ for program in PROGRAMS), *AROUND]
)
@pytest.mark.parametrize("branch", ["conv", "dropout"])
def test_a_program_computes_what_it_computes_on_the_twin(program, branch):
    assert_like_twin(block(BRANCHES[branch]), program, images())


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize(
    "program",
    [backward, by_hand, two_forwards_before_two_backwards, through_the_inverse, double_backward],
    ids=lambda program: program.__name__,
)
def test_a_branch_computes_what_it_computes_in_the_twin(program, branch):
    assert_like_twin(block(BRANCHES[branch]), program, images())


@pytest.mark.parametrize("training", [True, False])
def test_a_block_follows_train_and_eval_mode(training):
    assert_like_twin(block(WithDropout).train(training), backward, images())
