"""Inputs and modules that cannot work raise an error in the forward pass, whose message names the fix."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from memcnn import (
    ActNorm,
    AdditiveCoupling,
    AffineAdapterExp,
    AffineAdapterSigmoid,
    ChannelPermutation,
    DepthToSpace,
    InvertibleConv1x1,
    InvertibleModuleWrapper,
    ReversibleSequential,
    SpaceToDepth,
)
from memcnn.engine.chain import thread_state
from memcnn.models.coupling import Coupling
from memcnn.testing.tolerances import tolerance
from properties.support.blocks import Doubling, net, refused, rows, wrapped
from properties.support.twin import assert_same, backward, block, plain_twin, run, weighted_sum

pytestmark = pytest.mark.usefixtures("on_device")


# In the forward pass and before it


@pytest.mark.parametrize("disable", [False, True], ids=["engine", "disabled"])
@pytest.mark.parametrize(
    ("split_dim", "shape", "words"),
    [
        (1, (4, 5), ["(4, 5)", "dimension 1", "5, is odd", "choose another split_dim"]),
        (1, (4, 1), ["(4, 1)", "dimension 1", "1, is odd"]),
        (-1, (4, 6, 3), ["(4, 6, 3)", "dimension -1", "3, is odd"]),
        (2, (4, 6), ["(4, 6)", "dimension 2", "has 2 dimensions", "choose another split_dim"]),
        (-3, (4, 6), ["(4, 6)", "dimension -3", "has 2 dimensions"]),
        (1, (), ["()", "has 0 dimensions"]),
    ],
    ids=str,
)
def test_an_input_that_cannot_be_halved_is_refused(split_dim, shape, words, disable):
    module = wrapped(AdditiveCoupling(nn.Identity(), split_dim=split_dim), disable=disable)
    for direction in (module.forward, module.inverse):
        with refused(ValueError, *words):
            direction(torch.ones(shape, dtype=torch.float64, requires_grad=True))
        with torch.no_grad(), refused(ValueError, *words):
            direction(torch.ones(shape, dtype=torch.float64))
    assert thread_state.recording is None


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: InvertibleModuleWrapper(nn.Linear(3, 3)), ["forward and inverse", "got Linear", "inverse method"]),
        (lambda: InvertibleModuleWrapper(torch.sin), ["forward and inverse", "got builtin_function_or_method"]),
        (lambda: InvertibleModuleWrapper(None), ["forward and inverse", "got NoneType"]),
        (
            lambda: InvertibleModuleWrapper(SimpleNamespace(inverse=torch.sin)),
            ["nn.Module with", "got SimpleNamespace"],
        ),
        (lambda: ReversibleSequential(AdditiveCoupling(net()), nn.ReLU()), ["forward and inverse", "got ReLU"]),
        (lambda: AdditiveCoupling(torch.sin), ["Fm must be an nn.Module", "got builtin_function_or_method"]),
        (lambda: AdditiveCoupling(None), ["Fm must be an nn.Module", "got NoneType"]),
        (lambda: AdditiveCoupling(net(), torch.sin), ["Gm must be an nn.Module", "got builtin_function_or_method"]),
        (lambda: AdditiveCoupling(net(), split_dim="1"), ["split_dim must be an integer", "got '1'"]),
        (lambda: AdditiveCoupling(net(), split_dim=1.0), ["split_dim must be an integer", "got 1.0"]),
    ],
)
def test_a_block_of_the_wrong_parts_is_not_built(make, words):
    with refused(TypeError, *words):
        make()


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (ChannelPermutation([1, 0]), (2,)),
        (ActNorm(2), (2,)),
        (InvertibleConv1x1(2), (2,)),
        (SpaceToDepth(), (2, 4)),
        (DepthToSpace(), (2, 4)),
    ],
    ids=str,
)
def test_a_layer_refuses_an_input_without_channels_or_positions(layer, shape):
    for direction in (layer, layer.inverse):
        with refused(ValueError, f"got {shape}"):
            direction(torch.ones(shape))


def test_an_adapter_refuses_a_module_that_drops_dimensions():
    x = torch.ones(2, 3, 2, 2)
    for adapter in (AffineAdapterSigmoid, AffineAdapterExp):
        with refused(ValueError, "must double one dimension", "(2, 6)", "(2, 3, 2, 2)"):
            adapter(nn.Sequential(nn.Flatten(), nn.Linear(12, 6)))(x)
    assert AffineAdapterExp(net()).bound == 2


def test_a_factor_of_one_moves_nothing():
    x = rows(2, 3, 2)
    assert torch.equal(SpaceToDepth(1)(x), x) and torch.equal(DepthToSpace(1)(x), x)


def test_a_coupling_of_ones_own_says_what_it_lacks():
    class Own(Coupling):
        pass

    own = Own(nn.Identity())
    assert own.split_dim == 1 and own.Gm is not own.Fm
    with refused(NotImplementedError, "Own must define couple(x1, x2)"):
        own(rows())
    with refused(NotImplementedError, "Own must define uncouple(y1, y2)"):
        own.inverse(rows())


def returning(function) -> type[nn.Module]:
    """Return a branch that computes ``function`` and has a parameter."""

    class Branch(Doubling):
        def forward(self, x):
            return function(x * self.scale)

    return Branch


@pytest.mark.parametrize("disable", [False, True], ids=["engine", "disabled"])
@pytest.mark.parametrize(
    ("function", "got"),
    [
        (lambda x: torch.cat((x, x), 1), "got shape (4, 6)"),
        (lambda x: x[:2], "got shape (2, 3)"),
        (lambda x: x[None], "got shape (1, 4, 3)"),
        (lambda x: (x, x), "got a tuple"),
        (lambda x: None, "got a NoneType"),
    ],
)
def test_a_branch_that_changes_the_shape_is_refused(function, got, disable):
    with refused(ValueError, "must keep the shape of a half, (4, 3)", got):
        block(returning(function), disable=disable)(rows())


@pytest.mark.parametrize("disable", [False, True], ids=["engine", "disabled"])
def test_a_branch_that_changes_the_shape_is_refused_by_the_inverse(disable):
    with refused(ValueError, "must keep the shape of a half, (4, 3)", "got shape (2, 4, 3)"):
        block(returning(lambda x: torch.stack((x, x))), disable=disable).inverse(rows())


def test_a_branch_that_raises_the_precision_of_the_stream_is_refused():
    with refused(ValueError, "Branch does not fit its coupling", "float32", "would become torch.float64"):
        block(returning(Tensor.double)).float()(rows().float())


@pytest.mark.parametrize(
    "function",
    [Tensor.float, lambda x: x.mean(1, keepdim=True), lambda x: x.mean()],
    ids=["lower precision", "a column", "a number"],
)
def test_a_branch_may_return_what_is_cast_or_broadcast_to_a_half(function):
    module = block(returning(function))
    twin = plain_twin(module)
    assert_same(run(module, backward, [rows()]), run(twin, backward, [rows()]), limit=tolerance(torch.float64))


class TimesTwoInPlace(nn.Module):
    def forward(self, x):
        return x.mul_(2)


class DoublingInPlace(Doubling):
    def forward(self, x):
        return x.mul_(2) * self.scale


@pytest.mark.parametrize(
    "make", [lambda: block(TimesTwoInPlace), lambda: wrapped(DoublingInPlace())], ids=["branch", "module"]
)
def test_a_module_that_modifies_its_input_is_refused(make):
    with refused(RuntimeError, "modifies its input in place", "out-of-place"):
        make()(rows().sin())


def test_a_hook_that_changes_nothing_is_not_named_as_the_cause():
    module = block(TimesTwoInPlace)
    module._fn.Fm.register_forward_hook(lambda *_: None)
    with refused(RuntimeError, "TimesTwoInPlace modifies its input in place", "make its first operation an out-of"):
        module(rows().sin())


class ReturnsDict(Doubling):
    def forward(self, x):
        return {"y": super().forward(x)}


def test_an_output_without_a_tensor_to_go_back_from_is_refused():
    with refused(TypeError, "ReturnsDict must return a floating-point tensor", "got dict"):
        wrapped(ReturnsDict())(rows())


# In backward


class InverseOfAnotherShape(Doubling):
    def inverse(self, y):
        return super().inverse(y)[:, :2]


class InverseOfAnotherType(Doubling):
    def inverse(self, y):
        return super().inverse(y).float()


class InverseOfNothing(Doubling):
    def inverse(self, y):
        return None


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (InverseOfAnotherShape, ["must return what forward was given", "(4, 6)", "(4, 2)"]),
        (InverseOfAnotherType, ["must return what forward was given", "torch.float64", "torch.float32"]),
        (InverseOfNothing, ["must return what forward was given", "NoneType"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_an_inverse_that_returns_something_else_is_refused(make, words):
    y = wrapped(make())(rows())
    with refused(RuntimeError, *words):
        weighted_sum(y).backward()


@pytest.mark.parametrize("make", [lambda: block(net), lambda: wrapped(Doubling())], ids=["coupling", "module"])
def test_a_second_backward_pass_without_retain_graph_is_torchs_error(make):
    loss = weighted_sum(make()(rows()))
    loss.backward()
    with refused(RuntimeError, "backward through the graph a second time"):
        loss.backward()
