"""Unusual layers and arguments of a block work, or the forward pass raises an error."""

import pytest
import torch
from torch import Tensor, nn

from memcnn import (
    AdditiveCoupling,
    InvertibleModuleWrapper,
    ReversibleSequential,
)
from properties.support.blocks import Doubling, net, refused, rows, wrapped
from properties.support.twin import assert_like_twin, backward, block, images, weighted_sum

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
    with refused(
        TypeError,
        "the inverse of ForgetsToTakePower cannot be called with the outputs",
        "Give inverse the parameters of forward",
    ):
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
    """``nn.ReLU(inplace=True)`` without autograd's own check of views."""

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
    """F gets a dense copy of a half that is a view with gaps, so a change in place reaches no other tensor."""
    module, x = wrapped(AdditiveCoupling(ReluInPlace(), nn.Linear(3, 3))), rows()
    before = x.detach().clone()
    with torch.no_grad():
        module(x)
    assert torch.equal(x, before)
