"""What is given to a block works, or is refused in the forward pass."""

import math

import pytest
import torch
from torch import Tensor, nn

from memcnn import (
    ActNorm,
    AdditiveCoupling,
    AffineAdapterExp,
    AffineAdapterNaive,
    AffineAdapterSigmoid,
    AffineCoupling,
    InvertibleModuleWrapper,
    ReversibleSequential,
)
from memcnn.engine.recompute import Activation
from properties.engine.test_errors import Doubling, net, refused, rows, wrapped
from properties.support.held import living
from properties.support.twin import OnlyInvertible, assert_like_twin, backward, block, images, weighted_sum

pytestmark = pytest.mark.usefixtures("on_device")


# Lazy layers


def lazy_branch() -> nn.Module:
    return nn.Sequential(nn.LazyConv2d(4, 3, padding=1), nn.LazyBatchNorm2d(), nn.Tanh(), nn.LazyConv2d(3, 1))


def lazy_coupling() -> nn.Module:
    return AdditiveCoupling(lazy_branch(), lazy_branch())


@pytest.mark.parametrize(
    "make",
    [
        lambda: InvertibleModuleWrapper(lazy_coupling()),
        lambda: InvertibleModuleWrapper(lazy_coupling(), keep_input=True),
        lambda: ReversibleSequential(lazy_coupling(), lazy_coupling()),
    ],
    ids=["block", "keep_input", "sequence"],
)
def test_lazy_layers_are_initialised_by_the_first_forward_pass(make):
    """PyTorch cannot copy such a layer, so that the twin is built as the module is."""
    gradients = []
    for disable in (False, True):
        torch.manual_seed(1)
        one = make().double()
        for part in one.modules():
            if isinstance(part, InvertibleModuleWrapper):
                part.disable = disable
        for seed in range(2):
            x = images(seed=seed)
            weighted_sum(one(x)).backward()
        gradients.append([x.grad, *(p.grad for p in one.parameters()), *one.buffers()])
    torch.testing.assert_close(*gradients)
    assert len(gradients[0]) > 10


# Arguments that are no tensors


class Powered(Doubling):
    def forward(self, x, power):
        return x * self.scale**power

    def inverse(self, y, power):
        return y / self.scale**power


class ForgetsToTakePower(Powered):
    def inverse(self, y):
        return y / self.scale


class TakesPowerAsKeyword(Powered):
    def forward(self, x, *, power):
        return super().forward(x, power)

    def inverse(self, y):
        return y / self.scale


@pytest.mark.parametrize("keep_input", [False, True])
def test_a_number_is_an_argument_like_others(keep_input):
    def program(module: nn.Module, x: Tensor) -> Tensor:
        y = module(module(x, 0.5), power=2)
        weighted_sum(y.sin()).backward()
        return y

    assert_like_twin(wrapped(Powered(), keep_input=keep_input), program, rows())


def test_an_inverse_that_cannot_be_given_the_arguments_is_refused_in_the_forward_pass():
    with refused(TypeError, "the inverse of ForgetsToTakePower", "give inverse the parameters of forward"):
        wrapped(ForgetsToTakePower())(rows(), 0.5)
    with refused(TypeError, "the inverse of TakesPowerAsKeyword", "['power']", "keep_input=True"):
        wrapped(TakesPowerAsKeyword())(rows(), power=0.5)
    assert_like_twin(
        wrapped(ForgetsToTakePower(), keep_input=True), lambda m, x: backward(lambda x: m(x, 2.0), x), rows()
    )


def test_a_number_that_a_coupling_does_not_take_is_refused_in_the_forward_pass():
    with pytest.raises(TypeError, match="takes 2 positional arguments but 3 were given"):
        block(net)(rows(), 0.5)


# Tensors made under inference_mode


@pytest.mark.parametrize(
    "make",
    [
        lambda: block(net),
        lambda: wrapped(Doubling()),
        lambda: wrapped(AdditiveCoupling(net(), exact=True)),
        lambda: ReversibleSequential(block(net), block(net)),
    ],
    ids=["coupling", "module", "exact", "sequence"],
)
def test_an_input_made_under_inference_mode_is_refused_with_the_fix(make):
    module = make()
    with torch.inference_mode():
        x = rows().detach() + 1
        module(x)
    with refused(RuntimeError, "input of", "(4, 6), was made under torch.inference_mode()", "x.clone()"):
        module(x)
    weighted_sum(module(x.clone())).backward()


def test_an_argument_made_under_inference_mode_is_refused():
    with torch.inference_mode():
        index = torch.ones(())
    with refused(RuntimeError, "an argument of Powered", "was made under torch.inference_mode()"):
        wrapped(Powered())(rows(), {"index": index})


def test_a_module_made_under_inference_mode_is_refused():
    with torch.inference_mode():
        frozen = nn.BatchNorm1d(3).requires_grad_(False)
    with refused(RuntimeError, "'weight' of BatchNorm1d was made under torch.inference_mode()", "outside of"):
        wrapped(AdditiveCoupling(nn.Sequential(nn.Linear(3, 3), frozen), net()))(rows())


# A first operation that works in place


class ReluInPlace(nn.Module):
    """As ``nn.ReLU(inplace=True)``, without autograd's own check of views."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x.clamp_(min=0)
        return self.linear(x)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("options", [{}, {"disable": True}, {"keep_input": True}], ids=str)
def test_a_branch_that_changes_its_input_under_no_grad_is_refused(options, grad):
    module = wrapped(AdditiveCoupling(nn.Linear(3, 3), ReluInPlace()), **options)
    with torch.set_grad_enabled(grad), refused(RuntimeError, "ReluInPlace modifies its input in place", "out-of-place"):
        module(rows())


def test_a_branch_may_change_a_copy_of_a_half():
    """F is given a dense copy of a half that is a view with gaps: nobody else sees what becomes of it."""
    module, x = wrapped(AdditiveCoupling(ReluInPlace(), nn.Linear(3, 3))), rows()
    before = x.detach().clone()
    with torch.no_grad():
        module(x)
    assert torch.equal(x, before)


# Keyword arguments of couplings


class Attention(nn.Module):
    """Takes a mask, and a condition with a gradient."""

    def __init__(self, out: int = 3):
        super().__init__()
        self.linear, self.condition = nn.Linear(3, out), nn.Linear(2, out)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, condition: dict | None = None) -> Tensor:
        h = self.linear(x)
        if condition is not None:
            h = h + self.condition(condition["on"]).tanh()
        return (h if mask is None else h.masked_fill(mask, -3.0)).tanh()


def additive() -> nn.Module:
    return AdditiveCoupling(Attention(), net())


def affine(adapter, out: int):
    return lambda: AffineCoupling(Attention(out), nn.Sequential(nn.Linear(3, out), nn.Tanh()), adapter)


COUPLINGS = {
    "additive": additive,
    "affine, naive": affine(AffineAdapterNaive, 3),
    "affine, sigmoid": affine(AffineAdapterSigmoid, 6),
    "affine, exp": affine(AffineAdapterExp, 6),
}
CHAINS = {
    "blocks": lambda make: [wrapped(make()) for _ in range(3)],
    "keep_input": lambda make: [wrapped(make(), keep_input=True) for _ in range(3)],
    "sequence": lambda make: [ReversibleSequential(*(make() for _ in range(3))).double()],
    "sequence with other modules": lambda make: [
        ReversibleSequential(ActNorm(6), make(), InvertibleModuleWrapper(make()), ReversibleSequential(make())).double()
    ],
    "sequence that keeps some": lambda make: [ReversibleSequential(*(make() for _ in range(3)), keep_every=2).double()],
    "modules": lambda make: [wrapped(OnlyInvertibleWithKeywords(make())) for _ in range(2)],
}


class OnlyInvertibleWithKeywords(OnlyInvertible):
    def forward(self, x, **kwargs):
        return self.coupling(x, **kwargs)

    def inverse(self, y, **kwargs):
        return self.coupling.inverse(y, **kwargs)


def conditioned(run):
    def program(chain: nn.Module, x: Tensor, given: Tensor) -> Tensor:
        condition = {"on": given.sin()}
        for module in chain:
            x = run(module)(x, mask=given[:, :1] > 0, condition=condition)
        weighted_sum(x).backward()
        return x

    return program


@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("kind", COUPLINGS)
@pytest.mark.parametrize("chain", CHAINS)
def test_couplings_hand_keyword_arguments_to_the_branches_that_take_them(chain, kind, direction):
    torch.manual_seed(0)
    module = nn.ModuleList(CHAINS[chain](COUPLINGS[kind]))
    if chain == "sequence with other modules":
        with torch.no_grad():
            module[0](rows())  # initialises the ActNorm
    program = conditioned(lambda m: m if direction == "forward" else m.inverse)
    assert_like_twin(module, program, rows() / 2, rows(4, 2))


@pytest.mark.parametrize("kind", COUPLINGS)
def test_keyword_arguments_are_undone_by_the_inverse_and_reach_the_log_determinant(kind):
    module = ReversibleSequential(*(COUPLINGS[kind]() for _ in range(2))).double()
    x, keywords = rows() / 2, {"condition": {"on": rows(4, 2)}}
    y, log_det = module.forward_log_det(x, **keywords)
    back, inverse_log_det = module.inverse_log_det(y, **keywords)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(inverse_log_det, -log_det)
    torch.testing.assert_close(y, module(x, **keywords))
    assert not torch.allclose(y, module(x))


@pytest.mark.parametrize(
    "make",
    [
        lambda: block(net),
        lambda: ReversibleSequential(block(Attention), block(net)),
        lambda: wrapped(COUPLINGS["affine, exp"]()),
    ],
    ids=["coupling", "sequence", "adapter"],
)
def test_a_keyword_argument_that_no_branch_takes_is_refused(make):
    with refused(TypeError, "has no branch whose forward takes the keyword argument 'masc'", "correct its name"):
        make()(rows(), masc=1)


def test_a_keyword_argument_that_changes_before_backward_is_noticed():
    condition = {"on": rows(4, 2).detach()}
    loss = weighted_sum(block(Attention)(rows(), condition=condition))
    condition["on"].mul_(2)
    with refused(RuntimeError, "an argument of Attention, shape (4, 2), was modified in place between"):
        loss.backward()


# A branch that differentiates itself


class Hamiltonian(nn.Module):
    """The gradient of a scalar function with respect to the input, as in Hamiltonian networks."""

    def __init__(self, between=nn.Identity):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), between(), nn.Linear(5, 1))

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            energy = self.net(x).sum()
            (gradient,) = torch.autograd.grad(energy, x, create_graph=True)
        return gradient / math.sqrt(3)


@pytest.mark.parametrize(
    "between", [nn.Identity, nn.Sigmoid, lambda: nn.Dropout(0.5)], ids=["plain", "saves its output", "dropout"]
)
@pytest.mark.parametrize("requires_grad", [True, False])
def test_a_branch_that_differentiates_itself_works_with_kept_inputs(between, requires_grad):
    def branch() -> nn.Module:
        return Hamiltonian(between)

    module = nn.Sequential(block(branch, keep_input=True), block(net), block(branch, keep_input=True))
    assert_like_twin(module, backward, rows().detach().requires_grad_(requires_grad))


def test_a_branch_that_differentiates_itself_is_differentiated_twice_with_a_retained_graph():
    def program(module: nn.Module, x: Tensor) -> Tensor:
        y = module(x)
        weighted_sum(y).backward(retain_graph=True)
        weighted_sum(y * y).backward()
        return y

    assert_like_twin(block(Hamiltonian, keep_input=True), program, rows())


def test_a_branch_that_differentiates_itself_is_refused_in_the_forward_pass_without_kept_inputs():
    with refused(RuntimeError, "differentiates within its own forward pass", "keep_input=True"):
        block(Hamiltonian)(rows())


def test_kept_activations_are_dropped_when_the_evaluation_ends():
    before = {id(activation) for activation in living(Activation)}
    y = block(net, keep_input=True)(rows())
    made = [activation for activation in living(Activation) if id(activation) not in before]
    assert made and all(activation.tensor is None for activation in made)
    weighted_sum(y).backward()
