"""Arguments and outputs of a block: several tensors, keywords, integers, None, complex and empty tensors."""

import pytest
import torch
from torch import Tensor, nn

from memcnn import AdditiveCoupling, InvertibleModuleWrapper, ReversibleSequential
from memcnn.testing.tolerances import relative_error, tolerance
from properties.support.blocks import net
from properties.support.twin import (
    OnlyInvertible,
    assert_like_twin,
    block,
    conv_branch,
    images,
    plain_twin,
    weighted_sum,
)

pytestmark = pytest.mark.usefixtures("on_device")

DEPTH = 3


def rows(seed: int = 0, *, requires_grad: bool = True) -> Tensor:
    return images(4, 3, seed=seed, requires_grad=requires_grad)


class TwoStreams(nn.Module):
    """y1 = x1 + F(x2), y2 = x2 + G(y1) of two tensors, by hand."""

    def __init__(self):
        super().__init__()
        self.F, self.G = net(), net()

    def forward(self, x1, x2):
        y1 = x1 + self.F(x2)
        return y1, x2 + self.G(y1)

    def inverse(self, y1, y2):
        x2 = y2 - self.G(y1)
        return y1 - self.F(x2), x2


class ListOfStreams(TwoStreams):
    def forward(self, x1, x2):
        return list(super().forward(x1, x2))

    def inverse(self, y1, y2):
        return list(super().inverse(y1, y2))


class PassesOneOn(nn.Module):
    """Returns its second input itself."""

    def __init__(self):
        super().__init__()
        self.F = net()

    def forward(self, x1, x2):
        return x1 + self.F(x2), x2

    def inverse(self, y1, y2):
        return y1 - self.F(y2), y2


class WithNone(PassesOneOn):
    def forward(self, x1, x2):
        y1, y2 = super().forward(x1, x2)
        return None, y1, None, y2

    def inverse(self, _1, y1, _2, y2):
        return super().inverse(y1, y2)


class WithLengths(PassesOneOn):
    """Returns an integer tensor beside its streams."""

    def forward(self, x1, x2):
        return *super().forward(x1, x2), torch.tensor(x1.shape)

    def inverse(self, y1, y2, lengths):
        assert lengths.tolist() == list(y1.shape)
        return super().inverse(y1, y2)


class Conditioned(nn.Module):
    """y = 2 scale x + F(condition) + shift, of keywords."""

    def __init__(self):
        super().__init__()
        self.F = net()

    def forward(self, x, *, condition, scale=1.0, shift=None):
        return 2 * scale * x + self.F(condition) + (0 if shift is None else shift)

    def inverse(self, y, *, condition, scale=1.0, shift=None):
        return (y - (0 if shift is None else shift) - self.F(condition)) / (2 * scale)


class Looked(nn.Module):
    """y = x + scale[kind] f(embedding of index), of an integer tensor and a word."""

    def __init__(self):
        super().__init__()
        self.table, self.f = nn.Embedding(5, 3), net()

    def forward(self, x, index, kind):
        return x + self._shift(index, kind)

    def inverse(self, y, index, kind):
        return y - self._shift(index, kind)

    def _shift(self, index, kind):
        return self.f(self.table(index)) * {"once": 1, "twice": 2}[kind]


class HandsBack(Looked):
    """Its inverse returns all inputs of forward; the stream is the last one."""

    def forward(self, kind, index, x):
        return super().forward(x, index, kind)

    def inverse(self, y, kind, index):
        return kind, index, super().inverse(y, index, kind)


def wrapped(module: nn.Module) -> InvertibleModuleWrapper:
    return InvertibleModuleWrapper(module).double()


def differentiated(*outputs):
    tensors = [y for y in outputs if isinstance(y, Tensor) and y.is_floating_point()]
    sum(weighted_sum(y) * (i + 1) for i, y in enumerate(tensors)).backward()
    return tensors


def once(module, *inputs):
    return differentiated(*module(*inputs))


def in_a_chain(module, *inputs):
    for _ in range(DEPTH):
        inputs = [y for y in module(*inputs) if isinstance(y, Tensor) and y.is_floating_point()]
    return differentiated(*inputs)


def one_output_used(module, *inputs):
    return differentiated(next(y for y in module(*inputs) if y is not None))


def one_input_without_gradient(module, x1, x2):
    return differentiated(*module(x1, x2.detach()))


def same_tensor_twice(module, x1, x2):
    return differentiated(*module(x1, x1))


@pytest.mark.parametrize(
    "program",
    [once, in_a_chain, one_output_used, one_input_without_gradient, same_tensor_twice],
    ids=lambda program: program.__name__,
)
@pytest.mark.parametrize(
    "make", [TwoStreams, ListOfStreams, PassesOneOn, WithNone, WithLengths], ids=lambda make: make.__name__
)
def test_several_tensors_go_in_and_out(make, program):
    assert_like_twin(wrapped(make()), program, rows(0), rows(1))


@pytest.mark.parametrize("make", [TwoStreams, ListOfStreams, PassesOneOn], ids=lambda make: make.__name__)
def test_several_tensors_go_in_and_out_of_the_inverse(make):
    def program(module, y1, y2):
        x1, x2 = module.inverse(*module.inverse(y1, y2))
        return differentiated(*module(x1.sin(), x2))

    assert_like_twin(wrapped(make()), program, rows(0), rows(1))


@pytest.mark.parametrize(
    "condition", [lambda x: x, lambda x: x.sin(), lambda x: x.detach()], ids=["leaf", "computed", "without gradient"]
)
def test_keyword_arguments_reach_the_module_and_get_gradients(condition):
    def program(module, x, other):
        given = condition(other)
        for _ in range(DEPTH):
            x = module(x, condition=given, scale=0.5, shift=other.mean())
        y = module.inverse(x.tanh(), condition=given)
        return differentiated(y)

    assert_like_twin(wrapped(Conditioned()), program, rows(0), rows(1))


@pytest.mark.parametrize("requires_grad", [True, False])
def test_integers_and_strings_reach_the_module(requires_grad):
    def program(module, x):
        index = torch.tensor([0, 1, 1, 4])
        for kind in ("once", "twice", "once"):
            x = module(x, index, kind)
        return differentiated(module.inverse(x.tanh(), index, "twice"))

    assert_like_twin(wrapped(Looked()), program, rows(requires_grad=requires_grad))


def test_an_inverse_may_also_return_values_that_are_no_stream():
    def program(module, x):
        index = torch.tensor([0, 1, 1, 4])
        for kind in ("once", "twice", "once"):
            x = module(kind, index, x)
        return differentiated(x)

    assert_like_twin(wrapped(HandsBack()), program, rows())


def test_a_coupling_takes_its_input_as_a_keyword():
    assert_like_twin(block(net), lambda module, x: differentiated(module(x=x)), images(4, 6))


class Doubled(AdditiveCoupling):
    """A coupling with a forward and an inverse of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)

    def inverse(self, y: Tensor) -> Tensor:
        return super().inverse(y / 2)


def test_a_sequence_calls_what_a_subclass_has_made_of_a_coupling():
    sequence = ReversibleSequential(*(Doubled(net(), net()) for _ in range(DEPTH))).double()
    assert_like_twin(sequence, lambda module, x: differentiated(module(x)), images(4, 6))


@pytest.mark.parametrize(
    ("branch", "shape"),
    [(net, (0, 6)), (conv_branch, (0, 6, 5, 4)), (nn.Identity, (2, 0, 3))],
    ids=["no rows", "no images", "no channels"],
)
def test_empty_inputs_give_gradients_of_zero(branch, shape):
    model = nn.Sequential(block(branch), block(branch)).eval()
    x = images(*shape)
    y = model(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


class SoftSign(nn.Module):
    """A bounded function. Complex tangent and sine are unbounded, and the inverse could not undo such large sums."""

    def forward(self, x):
        return x / (1 + x.abs())


@pytest.mark.parametrize("kind", [lambda coupling: coupling, OnlyInvertible], ids=["coupling", "module"])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_streams_have_the_twins_gradients(dtype, kind):
    def branch() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 3, dtype=dtype), SoftSign(), nn.Linear(3, 3, dtype=dtype))

    model = nn.Sequential(*(InvertibleModuleWrapper(kind(AdditiveCoupling(branch(), branch()))) for _ in range(2)))
    gradients = []
    for module in (model, plain_twin(model)):
        x = torch.complex(rows(0, requires_grad=False), rows(1, requires_grad=False)).repeat(1, 2).to(dtype)
        x.requires_grad_()
        weighted_sum(torch.view_as_real(module(x))).backward()
        gradients.append([torch.view_as_real(t.grad) for t in (x, *module.parameters())])
    for got, wanted in zip(*gradients, strict=True):
        assert relative_error(got, wanted) < tolerance(wanted.dtype, depth=2)


class Embedding(nn.Module):
    """Takes only integers, so there is no input to rebuild."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 2, dtype=torch.float64))

    def forward(self, indices):
        return self.weight[indices].sin()

    def inverse(self, y):
        return ()


def test_a_module_without_an_input_to_rebuild_has_the_gradients_of_plain_training():
    module, indices = InvertibleModuleWrapper(Embedding()), torch.tensor([0, 2, 2])
    found = []
    for module.disable in (False, True):
        module.zero_grad()
        module(indices).sum().backward()
        found.append(module._fn.weight.grad)
    assert torch.equal(*found) and found[0].any()
