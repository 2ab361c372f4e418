"""The law of the log-determinant: it is log|det| of the dense Jacobian, both directions cancel, and memory is flat."""

import math
from functools import partial

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from memcnn import (
    ActNorm,
    AdditiveCoupling,
    AffineAdapterExp,
    AffineAdapterNaive,
    AffineCoupling,
    InvertibleConv1x1,
    InvertibleModuleWrapper,
    ReversibleSequential,
)
from memcnn.testing import Inverted, Report, WithLogDet, check_gradients, check_log_det
from memcnn.testing.cases import LAYERS, RANDOM_LAYERS, Network
from memcnn.testing.strategies import networks
from memcnn.testing.tolerances import relative_error, tolerance
from properties.support.blocks import Notes
from properties.support.errors import assert_holds
from properties.support.flows import glow, nice
from properties.support.memory import assert_flat
from properties.support.networks import SCALES_CHANNELS, run_check
from properties.support.twin import assert_like_twin, conv_branch, images, weighted_sum

DETERMINISTIC = [name for name in LAYERS if name not in RANDOM_LAYERS]
flows = partial(networks, split_batch=False, compositions=["sequence", "sequences in a sequence"])
small_flows = partial(flows, max_depth=3, max_size=2)


@pytest.mark.parametrize("mix_samples", [False, True], ids=["samples apart", "samples mix"])
@given(data=st.data())
@settings(max_examples=10)
def test_log_determinants_are_those_of_the_dense_jacobian_and_cancel(mix_samples: bool, data: st.DataObject):
    flow = data.draw(small_flows(mix_samples=mix_samples))
    assert_holds(run_check(check_log_det, flow), flow, "log-det")


@given(flow=flows())
@example(flow=SCALES_CHANNELS)
def test_log_determinants_of_larger_flows_are_right_and_cancel(flow: Network):
    assert_holds(run_check(check_log_det, flow), flow, "log-det")


def check_with_log_det(module: nn.Module, x: Tensor, *, inverse: bool, **options) -> Report:
    """Check the gradients of a loss that contains the result and its log-determinant."""
    flow = WithLogDet(module)
    return check_gradients(Inverted(flow) if inverse else flow, x, torch.zeros(len(x)).to(x), **options)


each_direction = pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])


@each_direction
@given(flow=flows(frozen=True))
def test_gradients_are_the_twins(inverse: bool, device: str, flow: Network):
    assert_gradients(flow, device, inverse, finite_differences=False)


@each_direction
@given(flow=small_flows(dtypes=[torch.float64], mix_samples=False))
@settings(max_examples=5)
def test_gradients_are_those_of_finite_differences(inverse: bool, flow: Network):
    assert_gradients(flow, "cpu", inverse)


def assert_gradients(flow: Network, device: str, inverse: bool, **options) -> None:
    module, values = flow.build(device), flow.output if inverse else flow.input
    report = check_with_log_det(module, values.build(device), inverse=inverse, seed=flow.input.seed, **options)
    assert_holds(report, flow, "gradients of log-det, inverse" if inverse else "gradients of log-det")


@given(networks(split_batch=False, compositions=["sequence"], layers=DETERMINISTIC))
@torch.no_grad()
def test_each_block_computes_the_same_bits_with_its_log_determinant(flow: Network):
    module, x = flow.build(), flow.input.build()
    module(x)  # layers such as ActNorm initialise themselves here
    for block in module:
        y = block(x)
        for actual, expected in ((block.forward_log_det(x)[0], y), (block.inverse_log_det(y)[0], block.inverse(y))):
            torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
        x = y


def log_det_alone(module, x):
    log_det = module.forward_log_det(x)[1]
    weighted_sum(log_det).backward()
    return log_det


def log_det_modified_in_place(module, x):
    total = module[0].forward_log_det(x)[1]
    y, log_det = module[1].forward_log_det(x)
    log_det += total
    log_det *= 2
    (weighted_sum(y) + weighted_sum(log_det)).backward()
    return log_det


def both_directions(module, x):
    y, log_det = module.forward_log_det(x)
    back, inverse_log_det = module.inverse_log_det(y.sin())
    (weighted_sum(back) + weighted_sum(log_det * inverse_log_det)).backward()
    return back, log_det, inverse_log_det


def retained(module, x):
    y, log_det = module.forward_log_det(x)
    weighted_sum(log_det).backward(retain_graph=True)
    weighted_sum(y).backward(retain_graph=True)
    weighted_sum(log_det.square()).backward()


def double_backward(module, x):
    y, log_det = module.forward_log_det(x)
    (gradient,) = torch.autograd.grad(weighted_sum(y.sin()) + weighted_sum(log_det.sin()), x, create_graph=True)
    gradient.square().sum().backward()
    return gradient


def nested():
    return ReversibleSequential(glow(1), InvertibleModuleWrapper(InvertibleModuleWrapper(ActNorm(8))), nice(1), glow(1))


PROGRAMS = [log_det_alone, log_det_modified_in_place, both_directions, retained, double_backward]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
@pytest.mark.parametrize("chain", [partial(glow, 2), nested], ids=["glow", "nested"])
def test_a_program_computes_what_it_computes_on_the_twin(chain, program):
    flow, x = chain().double(), images(4, 8, 4, 4)
    with torch.no_grad():
        flow(x)
    assert_like_twin(flow, program, x, depth=12)


@pytest.mark.parametrize("chain", [glow, nice])
def test_a_step_of_maximum_likelihood_is_flat_in_depth(chain):
    class Likelihood(nn.Module):
        def __init__(self, flow):
            super().__init__()
            self.flow = flow

        def forward(self, x):
            y, log_det = self.flow.forward_log_det(x)
            return 0.5 * y.square().flatten(1).sum(1) - log_det

    assert_flat(lambda depth: Likelihood(chain(depth)), least_maps=3)


@pytest.mark.parametrize("coupling", [AdditiveCoupling, partial(AffineCoupling, adapter=AffineAdapterNaive)])
@pytest.mark.parametrize("direction", ["forward_log_det", "inverse_log_det"])
@pytest.mark.parametrize(("keep_every", "evaluations"), [(None, [2, 2, 2]), (2, [1, 2, 1]), (1, [1, 1, 1])])
def test_the_branches_are_evaluated_twice_a_step_where_nothing_is_kept(coupling, direction, keep_every, evaluations):
    class Counting(nn.Conv2d):
        def __init__(self, *args):
            super().__init__(*args)
            self.evaluations = Notes()

        def forward(self, x):
            self.evaluations.append(None)
            return super().forward(x)

    couplings = [coupling(Counting(3, 3, 1), Counting(3, 3, 1)) for _ in evaluations]
    chain = ReversibleSequential(*couplings, keep_every=keep_every).double()
    y, log_det = getattr(chain, direction)(images())
    (weighted_sum(y) + weighted_sum(log_det)).backward()
    assert [len(part.evaluations) for part in chain.modules() if isinstance(part, Counting)] == [
        n for n in evaluations for _ in "FG"
    ]


def test_the_density_of_a_flow_integrates_to_one():
    def branch():
        return nn.Sequential(nn.Conv1d(1, 8, 1), nn.Tanh(), nn.Conv1d(8, 2, 1))

    flow = (
        ReversibleSequential(
            *(
                layer
                for _ in range(3)
                for layer in (ActNorm(2), InvertibleConv1x1(2), AffineCoupling(branch(), branch(), AffineAdapterExp))
            )
        )
        .double()
        .eval()
    )
    with torch.no_grad():
        for part in flow.modules():
            if isinstance(part, ActNorm):
                part.log_scale.uniform_(-0.5, 0.5)
                part.shift.uniform_(-0.5, 0.5)
            if isinstance(part, InvertibleConv1x1):
                part.triangles.add_(0.3 * torch.randn_like(part.triangles))
        axis = torch.linspace(-20, 20, 401, dtype=torch.float64)
        x = torch.cartesian_prod(axis, axis).unsqueeze(2)
        y, log_det = flow.forward_log_det(x)
        density = torch.exp(-0.5 * y.square().flatten(1).sum(1) - math.log(2 * math.pi) + log_det)
    assert abs(density.sum() * (axis[1] - axis[0]) ** 2 - 1) < 1e-4


def test_a_users_module_has_log_determinants_within_a_chain():
    class Power(nn.Module):
        """y = sign(x) |x|**exp(a), elementwise."""

        def __init__(self, a):
            super().__init__()
            self.a = nn.Parameter(torch.tensor(a, dtype=torch.float64))

        def forward(self, x):
            return x.sign() * x.abs() ** self.a.exp()

        def inverse(self, y):
            return y.sign() * y.abs() ** (-self.a).exp()

        def forward_log_det(self, x):
            return self(x), (self.a + (self.a.exp() - 1) * x.abs().log()).flatten(1).sum(1)

    def program(module, x):
        y, log_det = module.forward_log_det(x)
        (weighted_sum(y) + weighted_sum(log_det)).backward()
        return y, log_det

    chain = ReversibleSequential(Power(0.3), InvertibleConv1x1(6), Power(-0.2)).double()
    outcome = assert_like_twin(chain, program, images(2, 6, 2, 1), depth=6)
    assert outcome.results[1].shape == (2,)
    report = check_log_det(chain, images(2, 6, 2, 1, requires_grad=False))
    assert [r.verdict for r in report if r.claim == "forward_log_det is log|det| of the Jacobian"] == ["PASS"], report
    with pytest.raises(TypeError, match="Power has no inverse_log_det: give it one"):
        chain.inverse_log_det(images(2, 6, 2, 1))


@pytest.mark.filterwarnings("ignore:rebuilding a:UserWarning")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_log_determinants_are_at_least_float32(dtype):
    flow = glow(1, channels=6).to(dtype)
    for block in flow:
        y, log_det = block.forward_log_det(images(dtype=dtype))
        assert y.dtype == dtype and log_det.dtype == torch.float32


def test_under_autocast_the_log_determinant_is_that_of_the_applied_scale():
    coupling = AffineCoupling(conv_branch(), conv_branch(), AffineAdapterNaive).eval()
    x = images(dtype=torch.float32, requires_grad=False)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y, log_det = InvertibleModuleWrapper(coupling).forward_log_det(x)
        scales = torch.cat([coupling.Fm(x[:, 3:])[0], coupling.Gm(y[:, :3])[0]], 1)
    assert scales.dtype == torch.bfloat16 and log_det.dtype == torch.float32
    expected = scales.double().log().flatten(1).sum(1)
    assert relative_error(log_det, expected, least_scale=1.0) <= tolerance(torch.float32)


@pytest.mark.parametrize("coupling", [AdditiveCoupling, partial(AffineCoupling, adapter=AffineAdapterNaive)])
@pytest.mark.parametrize("split_dim", [0, -4])
def test_a_coupling_that_splits_the_batch_has_no_log_determinant(coupling, split_dim):
    block = InvertibleModuleWrapper(coupling(nn.Conv2d(6, 6, 1), split_dim=split_dim)).double()
    for method in (block.forward_log_det, block.inverse_log_det):
        with pytest.raises(ValueError, match=r"splits the batch.*shape \(2, 6, 5, 4\).*choose another split_dim"):
            method(images())
