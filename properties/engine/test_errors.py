"""What cannot be had is refused, in words that say what to do, and leaves everything in order."""

import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

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
from memcnn.models import engine, tape
from memcnn.models.coupling import Coupling
from memcnn.testing.tolerances import tolerance
from properties.test_state import held_bytes
from properties.twin import assert_like_twin, assert_same, backward, block, images, plain_twin, run, weighted_sum


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))


def rows(*shape: int) -> Tensor:
    return images(*(shape or (4, 6)))


def wrapped(module: nn.Module, **options) -> InvertibleModuleWrapper:
    return InvertibleModuleWrapper(module, **options).double()


class Doubling(nn.Module):
    """An invertible module that a test spoils by overriding one half of it."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return x * self.scale

    def inverse(self, y):
        return y / self.scale


def refused(error: type[Exception], *words: str):
    return pytest.raises(error, match=".*".join(re.escape(word) for word in words))


# At the door


@pytest.mark.parametrize("disable", [False, True], ids=["engine", "disabled"])
@pytest.mark.parametrize("split_dim, shape, words", [
    (1, (4, 5), ["(4, 5)", "dimension 1", "5, is odd", "choose another split_dim"]),
    (1, (4, 1), ["(4, 1)", "dimension 1", "1, is odd"]),
    (-1, (4, 6, 3), ["(4, 6, 3)", "dimension -1", "3, is odd"]),
    (2, (4, 6), ["(4, 6)", "dimension 2", "has 2 dimensions", "choose another split_dim"]),
    (-3, (4, 6), ["(4, 6)", "dimension -3", "has 2 dimensions"]),
    (1, (), ["()", "has 0 dimensions"]),
], ids=str)
def test_an_input_that_cannot_be_halved_is_refused(split_dim, shape, words, disable):
    module = wrapped(AdditiveCoupling(nn.Identity(), split_dim=split_dim), disable=disable)
    for direction in (module.forward, module.inverse):
        with refused(ValueError, *words):
            direction(torch.ones(shape, dtype=torch.float64, requires_grad=True))
        with torch.no_grad(), refused(ValueError, *words):
            direction(torch.ones(shape, dtype=torch.float64))
    assert tape._tape() is None


@pytest.mark.parametrize("make, words", [
    (lambda: InvertibleModuleWrapper(nn.Linear(3, 3)), ["forward and inverse", "got Linear", "inverse method"]),
    (lambda: InvertibleModuleWrapper(torch.sin), ["forward and inverse", "got builtin_function_or_method"]),
    (lambda: InvertibleModuleWrapper(None), ["forward and inverse", "got NoneType"]),
    (lambda: InvertibleModuleWrapper(SimpleNamespace(inverse=torch.sin)), ["nn.Module with", "got SimpleNamespace"]),
    (lambda: ReversibleSequential(AdditiveCoupling(net()), nn.ReLU()), ["forward and inverse", "got ReLU"]),
    (lambda: AdditiveCoupling(torch.sin), ["Fm must be an nn.Module", "got builtin_function_or_method"]),
    (lambda: AdditiveCoupling(None), ["Fm must be an nn.Module", "got NoneType"]),
    (lambda: AdditiveCoupling(net(), torch.sin), ["Gm must be an nn.Module", "got builtin_function_or_method"]),
    (lambda: AdditiveCoupling(net(), split_dim="1"), ["split_dim must be an integer", "got '1'"]),
    (lambda: AdditiveCoupling(net(), split_dim=1.0), ["split_dim must be an integer", "got 1.0"]),
])
def test_a_block_of_the_wrong_parts_is_not_built(make, words):
    with refused(TypeError, *words):
        make()


@pytest.mark.parametrize("layer, shape", [
    (ChannelPermutation([1, 0]), (2,)), (ActNorm(2), (2,)), (InvertibleConv1x1(2), (2,)),
    (SpaceToDepth(), (2, 4)), (DepthToSpace(), (2, 4)),
], ids=str)
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
    """A branch that computes ``function`` and has a parameter."""
    class Branch(Doubling):
        def forward(self, x):
            return function(x * self.scale)
    return Branch


@pytest.mark.parametrize("disable", [False, True], ids=["engine", "disabled"])
@pytest.mark.parametrize("function, got", [
    (lambda x: torch.cat((x, x), 1), "got shape (4, 6)"),
    (lambda x: x[:2], "got shape (2, 3)"),
    (lambda x: x[None], "got shape (1, 4, 3)"),
    (lambda x: (x, x), "got a tuple"),
    (lambda x: None, "got a NoneType"),
])
def test_a_branch_that_changes_the_shape_is_refused(function, got, disable):
    with refused(ValueError, "must keep the shape of a half, (4, 3)", got):
        block(returning(function), disable=disable)(rows())


def test_a_branch_that_raises_the_precision_of_the_stream_is_refused():
    with refused(ValueError, "Branch does not fit its coupling", "float32", "would become torch.float64"):
        block(returning(Tensor.double)).float()(rows().float())


@pytest.mark.parametrize("function", [Tensor.float, lambda x: x.mean(1, keepdim=True), lambda x: x.mean()],
                         ids=["lower precision", "a column", "a number"])
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


@pytest.mark.parametrize("make", [lambda: block(TimesTwoInPlace), lambda: wrapped(DoublingInPlace())],
                         ids=["branch", "module"])
def test_a_module_that_modifies_its_input_is_refused(make):
    with refused(RuntimeError, "modifies its input in place", "out-of-place"):
        make()(rows().sin())


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


@pytest.mark.parametrize("make, words", [
    (InverseOfAnotherShape, ["does not invert itself", "(4, 6)", "(4, 2)"]),
    (InverseOfAnotherType, ["does not invert itself", "torch.float64", "torch.float32"]),
    (InverseOfNothing, ["does not invert itself", "NoneType"]),
], ids=lambda value: getattr(value, "__name__", ""))
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


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("mask", torch.tensor([1.0, 0.0, 1.0]))

    def forward(self, x):
        return self.linear(x * self.mask).tanh()


@pytest.mark.parametrize("make", [lambda: block(Masked), lambda: block(lambda: nn.Sequential(Masked())),
                                  lambda: ReversibleSequential(AdditiveCoupling(Masked()), block(net)).double(),
                                  lambda: wrapped(AdditiveCoupling(Masked()), keep_input=True)],
                         ids=["block", "nested", "sequence", "keep_input"])
@pytest.mark.parametrize("name, words", [
    ("linear.weight", ["the parameter 'weight' of shape (3, 3) was modified between forward and backward"]),
    ("linear.bias", ["the parameter 'bias' of shape (3,) was modified between forward and backward"]),
    ("mask", ["the buffer 'mask' of shape (3,) was modified between forward and backward"]),
])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_values_that_change_between_forward_and_backward_are_noticed(make, name, words, frozen):
    module = make().requires_grad_(not frozen)
    loss = weighted_sum(module(rows()))
    value = next(t for key, t in (*module.named_parameters(), *module.named_buffers()) if key.endswith(name))
    with torch.no_grad():
        value.mul_(2)
    with refused(RuntimeError, *words, "call backward before it changes"):
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


@pytest.mark.parametrize("make", [
    lambda: block(net), lambda: wrapped(Doubling()),
    lambda: ReversibleSequential(AdditiveCoupling(net()), AdditiveCoupling(net())).double(),
], ids=["coupling", "module", "sequence"])
@pytest.mark.parametrize("modify", [times_two, relu, a_part, unseen_by_autograd], ids=lambda modify: modify.__name__)
def test_an_output_modified_in_place_is_noticed(make, modify):
    y = make()(rows())
    modify(y)
    with refused(RuntimeError, "an output", "shape (4,", "modified in place", "modify a clone"):
        weighted_sum(y).backward()


@pytest.mark.parametrize("make", [lambda: block(net, keep_input=True), lambda: wrapped(Doubling(), keep_input=True)],
                         ids=["coupling", "module"])
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
    """Computes otherwise at every second call."""

    def __init__(self, *functions):
        super().__init__()
        self.functions, self.calls = functions, 0
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        self.calls += 1
        return self.functions[self.calls % len(self.functions)](x * self.scale)


@pytest.mark.parametrize("functions", [
    (torch.sin, lambda x: x.sin().cos()),
    (lambda x: x.sin().cos(), torch.sin),
    (lambda x: (x @ x.new_ones(3, 1) + x).sin(), lambda x: (x @ x.new_ones(3, 3)).sin()),
    (lambda x: x.float().sin(), torch.sin),
], ids=["fewer", "more", "shapes", "types"])
def test_a_branch_that_saves_other_tensors_the_second_time_is_noticed(functions):
    module = InvertibleModuleWrapper(AdditiveCoupling(Alternating(*functions), nn.Identity())).double()
    y = module(rows())
    with refused(RuntimeError, "Alternating computed something else in the recomputation than in the forward pass",
                 "its forward must depend on its input, parameters, buffers and torch's random numbers alone"):
        weighted_sum(y).backward()


# Afterwards


class Failing(nn.Module):
    """Draws, moves a buffer, and then raises at chosen evaluations, counted from 1."""

    def __init__(self, *evaluations: int, error: type[BaseException] = ArithmeticError):
        super().__init__()
        self.linear, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)
        self.register_buffer("moved", torch.ones(()))
        self.evaluations, self.error, self.seen = evaluations, error, 0

    def forward(self, x):
        self.seen += 1
        h = F.dropout(self.norm(self.linear(x)), 0.5)
        self.moved.mul_(2)
        if self.seen in self.evaluations:
            raise self.error("planned")
        return h * self.moved.clone() / 4


def surroundings(module: nn.Module) -> dict:
    """All that an evaluation sets for a while, and must put back."""
    parts = list(module.modules())
    return {
        "tape": tape._tape(), "storing": tape.is_storing(), "passes": dict(engine._passes),
        "saved-tensor hooks": torch._C._autograd._top_saved_tensors_default_hooks(True),
        "grad mode": torch.is_grad_enabled(), "autocast": torch.is_autocast_enabled("cpu"),
        "modes": [part.training for part in parts],
        "requires_grad": [p.requires_grad for p in module.parameters()],
        "hooks": [list(hooks.items()) for part in parts for hooks in (part._forward_hooks, part._forward_pre_hooks)],
        "global hooks": list(torch_module._global_forward_hooks.items()),
        "parameters": [id(p) for p in module.parameters()], "buffers": [id(b) for b in module.buffers()],
    }


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in module.state_dict().items()} | {"generator": torch.get_rng_state()}


def assert_in_order(module: nn.Module, twin: nn.Module, program=backward) -> None:
    """The module trains as the twin, which has never met an error."""
    twin.load_state_dict(module.state_dict())
    module.zero_grad()
    assert_same(run(module, program, [rows()]), run(twin, program, [rows()]), limit=tolerance(torch.float64, depth=2))


def failing_chain(*evaluations: int, error: type[BaseException] = ArithmeticError) -> tuple[nn.Module, nn.Module]:
    """A chain whose second block fails, and its twin that does not."""
    failing = Failing(*evaluations, error=error)
    failing.register_forward_hook(lambda module, inputs, output: None)
    module = nn.Sequential(block(net), InvertibleModuleWrapper(AdditiveCoupling(net(), failing))).double()
    twin = plain_twin(module)
    twin[1]._fn.Gm.evaluations = ()
    return module, twin


@pytest.mark.parametrize("error", [ArithmeticError, KeyboardInterrupt], ids=lambda error: error.__name__)
def test_an_error_in_the_forward_pass_leaves_everything_in_order(error):
    module, twin = failing_chain(1, error=error)
    before = surroundings(module)
    with torch.autocast("cpu", torch.bfloat16, enabled=False), pytest.raises(error):
        module(rows())
    assert surroundings(module) == before
    assert_in_order(module, twin)


@pytest.mark.parametrize("error", [ArithmeticError, KeyboardInterrupt], ids=lambda error: error.__name__)
@pytest.mark.parametrize("retain_graph", [False, True], ids=["freed", "retained"])
def test_an_error_in_the_recomputation_leaves_everything_in_order(error, retain_graph):
    module, twin = failing_chain(2, error=error)
    before = surroundings(module)
    loss = weighted_sum(module(rows()))
    module.eval()
    module[1]._fn.Gm.linear.weight.requires_grad_(False)
    between, generator = surroundings(module), state(module)
    with pytest.raises(error):
        loss.backward(retain_graph=retain_graph)
    assert surroundings(module) == between
    for name, value in state(module).items():
        assert torch.equal(value, generator[name]), name
    module.train()
    module[1]._fn.Gm.linear.weight.requires_grad_(True)
    assert surroundings(module) == before
    assert_in_order(module, twin)


def test_a_retained_graph_is_differentiated_after_an_error():
    module, twin = failing_chain(2)
    x, twin_x = rows(), rows()
    losses = []
    for part, argument in ((module, x), (twin, twin_x)):
        torch.manual_seed(0)
        losses.append(weighted_sum(part(argument)))
    with pytest.raises(ArithmeticError):
        losses[0].backward(retain_graph=True)
    module.zero_grad()
    x.grad = None
    for loss in losses:
        loss.backward(retain_graph=True)
    for got, wanted in zip((x, *module.parameters()), (twin_x, *twin.parameters()), strict=True):
        assert (got.grad - wanted.grad).abs().max() <= 1e-10 * (1 + wanted.grad.abs().max())


@pytest.mark.parametrize("make", [
    lambda failing: InvertibleModuleWrapper(AdditiveCoupling(failing, net())),
    lambda failing: InvertibleModuleWrapper(AdditiveCoupling(net(), failing)),
    lambda failing: ReversibleSequential(AdditiveCoupling(net(), net()), AdditiveCoupling(net(), failing)),
], ids=["F", "G", "sequence"])
@pytest.mark.parametrize("instead", [lambda other, h: other(h), lambda other, h: h.sin(),
                                     lambda other, h: other(h.detach()).sum() * h.sin()],
                         ids=["another block", "no block", "both"])
def test_the_input_of_a_block_that_failed_may_go_elsewhere(make, instead):
    """As in code that tries a smaller batch, or falls back to something else."""
    def program(module, x):
        first, failing, other = module
        h = first(x)
        with pytest.raises(ArithmeticError):
            failing(h)
        y = instead(other, h)
        weighted_sum(y).backward()
        return y
    module = nn.ModuleList([block(net), make(Failing(1)).double(), block(net)])
    twin = plain_twin(module)
    assert_same(run(module, program, [rows()]), run(twin, program, [rows()]), limit=tolerance(torch.float64, depth=2))


@pytest.mark.parametrize("retain_graph", [False, True], ids=["freed", "retained"])
def test_an_error_of_a_hook_between_blocks_leaves_everything_in_order(retain_graph):
    def fail(gradient):
        raise ArithmeticError("planned")
    module = nn.Sequential(block(net), block(net))
    twin = plain_twin(module)
    before = surroundings(module)
    middle = module[0](rows())
    middle.register_hook(fail)
    loss = weighted_sum(module[1](middle))
    held = held_bytes()
    with pytest.raises(ArithmeticError):
        loss.backward(retain_graph=retain_graph)
    assert surroundings(module) == before
    assert held_bytes() <= held
    assert_in_order(module, twin)


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
