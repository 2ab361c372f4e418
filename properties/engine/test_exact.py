"""Exact mode: the inversion is exact at any depth, and gradients equal those of stored activations bit for bit."""

from itertools import count

import pytest
import torch
from torch import nn

from memcnn import AdditiveCoupling, AffineCoupling, InvertibleModuleWrapper, ReversibleSequential
from memcnn.engine.couple import fingerprint
from memcnn.engine.exact import Grid
from properties.support.twin import conv_branch, images, plain_twin, weighted_sum

pytestmark = pytest.mark.usefixtures("on_device")


def chain(depth: int = 4, exact=True, branch=conv_branch, composition=ReversibleSequential) -> nn.Module:
    couplings = [AdditiveCoupling(branch(), branch(), exact=exact) for _ in range(depth)]
    return composition(*(map(InvertibleModuleWrapper, couplings)))


def bounded_branch() -> nn.Module:
    """Return a branch bounded by 1/8, so that a thousand blocks stay on the grid."""

    class Bounded(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x):
            return torch.tanh(self.conv(x)) / 8

    return Bounded()


def gradients(module: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.detach().clone().requires_grad_()
    y = module(x)
    weighted_sum(y).backward()
    return [y.detach(), x.grad, *(p.grad for p in module.parameters())]


def assert_equal(actual, expected):
    assert len(actual) == len(expected)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@torch.no_grad()
def test_a_thousand_blocks_are_undone_without_any_error():
    module = chain(1000, branch=bounded_branch)
    x = Grid().snap(images(dtype=torch.float32))
    y = module(x)
    assert not torch.equal(x, y)
    assert torch.equal(module.inverse(y), x)
    inexact = chain(1000, exact=False, branch=bounded_branch)
    inexact.load_state_dict(module.state_dict())
    assert not torch.equal(inexact.inverse(inexact(x)), x), "the test cannot tell exact from inexact"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("composition", [ReversibleSequential, nn.Sequential])
def test_gradients_are_those_of_stored_activations_bit_for_bit(dtype, composition):
    module = chain(composition=composition).to(dtype)
    assert_equal(gradients(module, images(dtype=dtype)), gradients(plain_twin(module), images(dtype=dtype)))


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16], ids=str)
def test_branches_in_low_precision_have_the_same_bits_too(precision):
    class Low(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = conv_branch().to(precision)

        def forward(self, x):
            return self.net(x.to(precision))

    module = chain(branch=Low)
    x = images(dtype=torch.float32)
    assert_equal(gradients(module, x), gradients(plain_twin(module), x))


def test_branches_under_autocast_have_the_same_bits_too():
    def autocast(module):
        with torch.autocast(torch.get_default_device().type, torch.bfloat16):
            return gradients(module, images(dtype=torch.float32))

    module = chain()
    assert_equal(autocast(module), autocast(plain_twin(module)))


def test_without_exact_mode_the_bits_differ():
    module = chain(12, exact=False).float()
    x = images(dtype=torch.float32)
    pairs = zip(gradients(module, x), gradients(plain_twin(module), x), strict=True)
    assert not all(torch.equal(a, e) for a, e in pairs)


def test_the_sequential_sets_the_grid_of_its_couplings():
    module = ReversibleSequential(AdditiveCoupling(conv_branch()), AdditiveCoupling(conv_branch()), exact=2.0**-6)
    assert {block._fn.grid for block in module} == {Grid(2.0**-6)}
    y = module(images(dtype=torch.float32)).detach() * 2**6
    assert torch.equal(y, y.round())
    assert ReversibleSequential(*module, exact=False)[0]._fn.grid is None


def test_a_value_that_leaves_the_grid_is_an_error():
    module = chain().float()
    with pytest.raises(OverflowError, match=r"2e\+04 .* ends at 1.64e\+04: use a larger step, float64, or exact=False"):
        module(torch.full((2, 6, 5, 4), 2e4))
    with pytest.raises(OverflowError, match="inf"):
        module(torch.full((2, 6, 5, 4), float("inf")))
    chain(exact=1.0).float()(torch.full((2, 6, 5, 4), 2e4))
    chain().double()(torch.full((2, 6, 5, 4), 2e4, dtype=torch.float64))


def test_the_grid_ends_with_the_largest_number_whose_neighbours_are_on_it():
    grid, end = Grid(), torch.tensor([2.0**14, -(2.0**14)])
    assert grid.limit(torch.float32) == 2.0**14 and grid.limit(torch.float64) == 2.0**43
    assert torch.equal(grid.snap(end), end)
    with pytest.raises(OverflowError):
        grid.snap(torch.nextafter(end, 2 * end))


def test_a_zero_on_the_grid_is_a_positive_one():
    assert not Grid().snap(torch.tensor([-0.0, -1e-9, 0.0])).signbit().any()


@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_a_branch_that_does_not_reproduce_itself_is_an_error(direction):
    class Drifting(nn.Module):
        calls = count(1)  # a number would be set back in the recomputation

        def forward(self, x):
            return x.tanh() * (1 + 1e-7 * next(self.calls))

    (block,) = chain(1, branch=Drifting)
    loss = weighted_sum(getattr(block, direction)(images(dtype=torch.float32)))
    with pytest.raises(RuntimeError, match="Drifting does not reproduce itself bit for bit"):
        loss.backward()


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str
)
def test_one_bit_changes_the_fingerprint_of_a_branch(dtype):
    h = torch.linspace(0.5, 1, 6).to(dtype)
    other = h.clone()
    other.view(torch.uint8)[7 % other.element_size()] ^= 1
    assert not torch.equal(fingerprint(h), fingerprint(other))
    assert torch.equal(fingerprint(h), fingerprint(h.clone()))


@pytest.mark.parametrize("step", [0.3, -0.5, 0.0, float("inf"), 2])
def test_a_step_that_is_no_float_or_no_power_of_two_is_refused(step):
    with pytest.raises(ValueError, match="must be a float that is a power of two, such as 2.0.*got"):
        AdditiveCoupling(conv_branch(), exact=step)


def test_what_cannot_be_exact_is_refused():
    with pytest.raises(ValueError, match="module 1 is a AffineCoupling"):
        ReversibleSequential(AdditiveCoupling(conv_branch()), AffineCoupling(conv_branch()), exact=True)
    with pytest.raises(ValueError, match="module 0 is a ReversibleSequential"):
        ReversibleSequential(ReversibleSequential(AdditiveCoupling(conv_branch())), exact=True)
    with pytest.raises(ValueError, match="needs a float32 or float64 input: got torch.bfloat16"):
        chain().bfloat16()(images(dtype=torch.bfloat16))
