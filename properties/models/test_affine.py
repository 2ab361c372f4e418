"""The affine coupling: equations, cost, bounds, the numerics and names of MemCNN 1.5.2, and refused branches."""

from functools import partial

import pytest
import torch
from torch import nn

from memcnn import (
    AffineAdapterExp,
    AffineAdapterNaive,
    AffineAdapterSigmoid,
    AffineCoupling,
    InvertibleModuleWrapper,
    ReversibleBlock,
    ReversibleSequential,
    create_coupling,
)
from memcnn.testing.tolerances import relative_error, tolerance
from properties.support.blocks import Notes
from properties.support.memory import assert_flat
from properties.support.twin import assert_like_twin, backward, images, plain_twin, run, weighted_sum

adapters = pytest.mark.parametrize(
    ("adapter", "outputs"), [(AffineAdapterNaive, 1), (AffineAdapterSigmoid, 2), (AffineAdapterExp, 2)]
)


def branch(outputs: int = 1, channels: int = 3) -> nn.Sequential:
    """Return a branch whose result has ``outputs`` times the channels of its input."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.BatchNorm2d(channels),
        nn.Tanh(),
        nn.Conv2d(channels, outputs * channels, 3, padding=1),
    )


def test_the_equations_and_the_adapters_numerics_are_those_of_1_5_2():
    x = images()
    x1, x2 = x[:, :3], x[:, 3:]
    F, G = branch().double().eval(), branch().double().eval()
    y1 = x1 * torch.exp(F(x2)) + F(x2)
    y2 = x2 * torch.exp(G(y1)) + G(y1)
    y = AffineCoupling(F, G, AffineAdapterNaive)(x)
    assert relative_error(y, torch.cat([y1, y2], 1)) <= tolerance(x.dtype)

    F, G = branch(2).double().eval(), branch(2).double().eval()
    f, y1 = F(x2), torch.empty_like(x1)
    for channel in range(3):  # channels 2c of the result are shifts, and channels 2c + 1 are scales
        y1[:, channel] = x1[:, channel] / (1 + torch.exp(-2 - f[:, 2 * channel + 1])) + f[:, 2 * channel]
    g, y2 = G(y1), torch.empty_like(x2)
    for channel in range(3):
        y2[:, channel] = x2[:, channel] / (1 + torch.exp(-2 - g[:, 2 * channel + 1])) + g[:, 2 * channel]
    y = AffineCoupling(F, G, AffineAdapterSigmoid)(x)
    assert relative_error(y, torch.cat([y1, y2], 1)) <= tolerance(x.dtype)


@pytest.mark.parametrize("adapter", [AffineAdapterNaive, AffineAdapterSigmoid, AffineAdapterExp])
def test_the_state_has_the_names_of_1_5_2(adapter):
    block = InvertibleModuleWrapper(AffineCoupling(nn.Conv2d(3, 3, 1), adapter=adapter))
    assert set(block.state_dict()) == {f"_fn.{F}.f.{name}" for F in ("Fm", "Gm") for name in ("weight", "bias")}
    bare = AffineCoupling(nn.Conv2d(3, 3, 1))
    assert set(bare.state_dict()) == {f"{F}.{name}" for F in ("Fm", "Gm") for name in ("weight", "bias")}


def test_without_an_adapter_the_branches_give_scale_and_shift_themselves():
    class ScaleAndShift(nn.Module):
        def forward(self, x):
            return 2 + x.sin(), x.cos()

    block = InvertibleModuleWrapper(AffineCoupling(ScaleAndShift())).double()
    x = images()
    y = assert_like_twin(block, backward, x, depth=2).results[0]
    x1, x2 = x.detach().chunk(2, 1)
    y1 = (2 + x2.sin()) * x1 + x2.cos()
    assert relative_error(y, torch.cat([y1, (2 + y1.sin()) * x2 + y1.cos()], 1)) <= tolerance(x.dtype)


@adapters
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_the_branches_are_evaluated_twice_a_step(adapter, outputs, direction):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.branch, self.evaluations = branch(outputs), Notes()

        def forward(self, x):
            self.evaluations.append(None)
            return self.branch(x)

    chain = ReversibleSequential(*(AffineCoupling(Counting(), Counting(), adapter) for _ in range(3))).double()
    run(chain, lambda module, x: weighted_sum(getattr(module, direction)(x)).backward(), [images()])
    assert [len(part.evaluations) for part in chain.modules() if isinstance(part, Counting)] == [2] * 6


def affine_chain(depth: int, channels: int = 4) -> ReversibleSequential:
    """Return a chain of couplings whose activations keep about the same size at any depth."""
    adapter = partial(AffineAdapterExp, bound=0.1)
    return ReversibleSequential(
        *(AffineCoupling(branch(2, channels), branch(2, channels), adapter) for _ in range(depth))
    )


def test_a_further_block_costs_less_than_a_hundredth_of_its_activations():
    assert_flat(affine_chain, least_maps=4)


def test_a_bounded_scale_does_not_overflow_where_the_exponential_does():
    class Times(nn.Module):
        def __init__(self, factor, repeats):
            super().__init__()
            self.factor, self.repeats = factor, repeats

        def forward(self, x):
            return self.factor * x.repeat_interleave(self.repeats, 1)

    x = images(dtype=torch.float32, requires_grad=False)
    assert not AffineCoupling(Times(1e4, 1), adapter=AffineAdapterNaive)(x).isfinite().all()

    block = InvertibleModuleWrapper(AffineCoupling(Times(1e4, 2), adapter=AffineAdapterExp))
    y = block(x.requires_grad_())
    assert y.isfinite().all()
    weighted_sum(y).backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("bound", [0.5, 3.0])
def test_a_bounded_scale_stays_within_its_bounds_and_starts_as_the_exponential(bound):
    class Given(nn.Module):
        def forward(self, x):
            return torch.stack([torch.zeros_like(x), x], 2).flatten(1, 2)

    adapter = AffineAdapterExp(Given(), bound=bound)
    h = torch.linspace(-100, 100, 201, dtype=torch.float64).view(1, -1)
    scale, shift = adapter(h)
    assert torch.equal(shift, torch.zeros_like(h))
    assert scale.log().abs().max() <= bound * (1 + tolerance(h.dtype))
    assert (scale.diff() >= 0).all() and scale.max() > scale.min()
    z = 1e-6 * h
    assert relative_error(adapter(z)[0], z.exp()) <= z.max().item() ** 3 / bound**2  # tanh(z) = z - z**3 / 3 + ...


@adapters
def test_under_autocast_the_stream_stays_in_float32(adapter, outputs):
    chain = ReversibleSequential(*(AffineCoupling(branch(outputs), branch(outputs), adapter) for _ in range(2))).eval()

    def program(module, x):
        with torch.autocast("cpu", torch.bfloat16):
            y = module(x)
            assert y.dtype == torch.float32
            back = module.inverse(y.detach())
            assert relative_error(back, x) <= tolerance(torch.float32, depth=2)
        weighted_sum(y).backward()
        return y

    x = images(dtype=torch.float32)
    actual, expected = run(chain, program, [x]), run(plain_twin(chain), program, [x])
    for name, gradient in expected.gradients.items():
        assert relative_error(actual.gradients[name], gradient) <= torch.finfo(torch.bfloat16).eps, name


def test_names_and_order_of_arguments_are_those_of_1_5_2():
    F, G = branch(2), branch(2)
    coupling = create_coupling(F, G, "affine", None, None, AffineAdapterSigmoid, 2)
    assert isinstance(coupling, AffineCoupling) and coupling.split_dim == 2
    assert isinstance(coupling.Fm, AffineAdapterSigmoid) and coupling.Fm.f is F and coupling.Gm.f is G
    block = ReversibleBlock(F, G, "affine", True, False, None, None, AffineAdapterSigmoid)
    assert block.keep_input and not block.keep_input_inverse
    assert isinstance(block._fn, AffineCoupling) and isinstance(block._fn.Gm, AffineAdapterSigmoid)
    copied = AffineCoupling(F, adapter=AffineAdapterSigmoid)
    assert copied.Gm.f is not F and torch.equal(copied.Gm.f[0].weight, F[0].weight)
    with pytest.raises(NotImplementedError, match="unknown coupling 'cubic': choose 'additive' or 'affine'"):
        create_coupling(F, G, "cubic")
    with pytest.warns(DeprecationWarning, match="no effect"):
        AffineCoupling(F, implementation_fwd=1)


def test_a_branch_that_returns_no_pair_is_refused_and_the_message_names_adapters():
    x = images()  # two samples, so that unpacking the branch's result would succeed
    with pytest.raises(TypeError, match=r"a pair \(scale, shift\): got Tensor; .*adapter=AffineAdapterNaive"):
        AffineCoupling(branch()).double()(x)


class Returns(nn.Module):
    """Return the values that ``make`` computes from its half of the input."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, x):
        return self.make(x)


def test_a_branch_that_gives_three_values_is_refused():
    with pytest.raises(TypeError, match=r"a pair \(scale, shift\): got 3 values"):
        AffineCoupling(Returns(lambda x: (x.exp(), x, x)))(images())


def test_a_scale_of_another_shape_is_refused():
    module = InvertibleModuleWrapper(AffineCoupling(Returns(lambda x: (x.exp()[None], x))))
    with pytest.raises(
        ValueError,
        match=r"does not fit its coupling: .* of shape \(2, 3, 5, 4\) and would become "
        r".* of shape \(1, 2, 3, 5, 4\)",
    ):
        module(images())


@pytest.mark.parametrize("outputs", [1, 3])
def test_a_branch_that_does_not_double_is_refused(outputs):
    coupling = AffineCoupling(branch(outputs), adapter=AffineAdapterSigmoid).double()
    with pytest.raises(ValueError, match=r"must double one dimension .*gave shape .* for shape \(2, 3, 5, 4\)"):
        coupling(images())


@pytest.mark.parametrize("bound", [0, -1.0, float("nan")])
def test_a_bound_that_is_not_positive_is_refused(bound):
    with pytest.raises(ValueError, match="bound must be positive"):
        AffineAdapterExp(branch(2), bound=bound)


@adapters
def test_the_first_block_of_a_network_trains_on_an_input_without_a_gradient(adapter, outputs):
    """There forward saves fewer tensors: the half that requires no gradient is not needed for one."""
    module = InvertibleModuleWrapper(AffineCoupling(branch(outputs), branch(outputs), adapter)).double()
    assert_like_twin(module, backward, images(requires_grad=False))
