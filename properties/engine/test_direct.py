"""The direct way: which runs of quiet additive steps use it, and that its results equal those with hooks."""

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from memcnn import AdditiveCoupling, AffineAdapterNaive, AffineCoupling, InvertibleModuleWrapper, ReversibleSequential
from memcnn.engine.direct import LONGEST_RUN
from memcnn.memory import TensorMeter
from memcnn.testing.tolerances import relative_error
from properties.support.twin import assert_like_twin, backward, images, weighted_sum

pytestmark = pytest.mark.usefixtures("on_device")


def quiet_branch() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.Tanh(),
        nn.Conv2d(4, 3, 1, bias=False),
        nn.BatchNorm2d(3),
    )


def chain(depth: int = 2, **options) -> nn.Module:
    torch.manual_seed(0)
    couplings = (AdditiveCoupling(quiet_branch(), quiet_branch()) for _ in range(depth))
    return nn.Sequential(*(InvertibleModuleWrapper(coupling, **options) for coupling in couplings)).double()


class Ordinary(TorchFunctionMode):
    """A mode without effect. Blocks do not use the direct way within it, because a mode could change any operation."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def number_of_direct_runs(y: Tensor) -> int:
    nodes, waiting = set(), [y.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            waiting += [following for following, _ in node.next_functions]
    return sum(node.name() == "RunStartBackward" for node in nodes)


def with_dropout() -> nn.Module:
    branch = nn.Sequential(quiet_branch(), nn.Dropout())
    return InvertibleModuleWrapper(AdditiveCoupling(branch)).double()


def with_gradients() -> nn.Module:
    module = chain(1)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return module


def with_backward_hooks() -> nn.Module:
    module = chain(1)
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_full_backward_hook(lambda *_: None)
    return module


def affine() -> nn.Module:
    return InvertibleModuleWrapper(AffineCoupling(quiet_branch(), adapter=AffineAdapterNaive)).double()


def exact() -> nn.Module:
    return InvertibleModuleWrapper(AdditiveCoupling(quiet_branch(), exact=True)).double()


def with_their_own_couple() -> nn.Module:
    """Return couplings that define ``couple`` themselves, so the engine does not join their steps with others."""

    class Scaled(AdditiveCoupling):
        def couple(self, x1: Tensor, x2: Tensor, **kwargs) -> tuple[Tensor, Tensor]:
            y1, y2 = super().couple(x1, x2)
            return y1, y2

    return ReversibleSequential(Scaled(quiet_branch()), Scaled(quiet_branch())).double()


@pytest.mark.parametrize(
    ("make", "runs"),
    [
        (chain, 2),
        (lambda: ReversibleSequential(*chain()), 1),
        (lambda: ReversibleSequential(*chain(LONGEST_RUN + 1)), 2),
        (with_their_own_couple, 2),
        (with_dropout, 0),
        (with_gradients, 0),
        (with_backward_hooks, 0),
        (affine, 0),
        (exact, 0),
        (lambda: chain(keep_input=True), 0),
        (lambda: chain(check_inverse=1e-3), 0),
    ],
    ids=["wrapped", "sequence", "long", "couple", "dropout", "gradients", "hooks", "affine", "exact", "keep", "check"],
)
def test_quiet_additive_steps_alone_go_the_direct_way(make, runs):
    assert number_of_direct_runs(make()(images().sin())) == runs


def test_inputs_without_gradients_modes_and_watched_evaluations_go_the_ordinary_way():
    assert number_of_direct_runs(chain(1)(images().detach())) == 0
    with Ordinary():
        assert number_of_direct_runs(chain()(images())) == 0
    with torch.autograd.set_detect_anomaly(True):
        assert number_of_direct_runs(chain()(images())) == 0
    module = chain()
    assert [number_of_direct_runs(module(images())) for _ in range(5)] == [2, 2, 2, 0, 2]


def test_a_patched_call_of_modules_sees_every_layer(monkeypatch):
    module, called, call = chain(), [], nn.Module.__call__

    def noting(self, *args, **kwargs):
        called.append(self)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "__call__", noting)
    y = module(images())
    assert number_of_direct_runs(y) == 0
    assert {*module.modules()} - {block._fn for block in module} <= {*called}


def test_the_blocks_of_a_run_that_cannot_go_the_direct_way_go_each_its_own():
    blocks = [*chain(2), with_dropout(), *chain(1)]
    module = ReversibleSequential(*blocks)
    assert number_of_direct_runs(module(images())) == 3
    assert_like_twin(module, lambda module, x: weighted_sum(module(x)).backward(), images())


def gradients(context=nullcontext, dtype: torch.dtype = torch.float64, autocast: bool = False, inverse: bool = False):
    module, x = ReversibleSequential(*chain(3)).to(dtype), images(dtype=dtype)
    with context(), torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
        y = module.inverse(x) if inverse else module(x)
    assert (number_of_direct_runs(y) > 0) == (context is nullcontext)
    weighted_sum(y.to(dtype)).backward()
    return [x.grad, *(p.grad for p in module.parameters()), *module.buffers()]


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_both_ways_give_the_same_gradients_and_buffers_bit_for_bit(autocast, inverse):
    direct, ordinary = (gradients(context, torch.float32, autocast, inverse) for context in (nullcontext, Ordinary))
    torch.testing.assert_close(direct, ordinary, rtol=0, atol=0)


def peak_bytes(make: Callable, context: Callable, autocast: bool) -> int:
    module, x = make().float(), images(dtype=torch.float32, requires_grad=False)
    with TensorMeter() as meter:
        x = x.sin().requires_grad_()
        with context(), torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
            y = module(x)
        assert (number_of_direct_runs(y) > 0) == (context is nullcontext)
        loss = weighted_sum(y.float())
        del x, y
        loss.backward()
    return meter.peak_bytes


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize(
    "make",
    [chain, lambda: ReversibleSequential(*chain(3)), lambda: ReversibleSequential(*chain(LONGEST_RUN + 2))],
    ids=["wrapped", "sequence", "two runs"],
)
def test_the_direct_way_needs_no_more_bytes(make, autocast):
    direct, ordinary = (peak_bytes(make, way, autocast) for way in (nullcontext, Ordinary))
    assert direct <= ordinary


def test_a_forward_pass_under_autocast_keeps_no_cast_weights():
    module, x = ReversibleSequential(*chain(3)).float(), images(dtype=torch.float32)
    with TensorMeter() as meter, torch.autocast(x.device.type, torch.bfloat16):
        y = module(x)
        left = meter.current_bytes
    assert number_of_direct_runs(y) == 1
    assert left == meter.current_bytes, "the cache held weights until its context ended"


def register_before(module: nn.Module, register: Callable) -> Callable:
    register(module)
    return lambda: None


def register_between(module: nn.Module, register: Callable) -> Callable:
    return lambda: register(module)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")
@pytest.mark.parametrize("when", [register_before, register_between])
@pytest.mark.parametrize("create_graph", [False, True])
def test_hooks_of_parameters_run_once_with_the_whole_gradient(when, create_graph):
    module, x, seen = chain(1), images(), []
    weight = module[0]._fn.Fm[0].weight

    def register(_: nn.Module) -> None:
        weight.register_hook(lambda g: seen.append(g.detach()) or 2 * g)
        weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.detach()))

    then = when(module, register)
    y = module(x)
    assert number_of_direct_runs(y) == (when is register_between)
    then()
    weighted_sum(y).backward(create_graph=create_graph)
    assert len(seen) == 2
    torch.testing.assert_close(seen[1], 2 * seen[0])
    twin = chain(1)
    with Ordinary():
        y = twin(images())
    weighted_sum(y).backward()
    torch.testing.assert_close(seen[0], twin[0]._fn.Fm[0].weight.grad)
    module.zero_grad()  # gradients with a graph refer to themselves
    x.grad = None


@pytest.mark.parametrize("everywhere", [False, True], ids=["module", "global"])
def test_backward_hooks_that_are_registered_after_the_forward_pass_do_not_run(everywhere):
    module, seen = chain(1), []
    loss = weighted_sum(module(images()))

    def hook(*_: object) -> None:
        seen.append(1)

    if everywhere:
        handle = nn.modules.module.register_module_full_backward_hook(hook)
    else:
        handle = module[0]._fn.Fm[0].register_full_backward_hook(hook)
    loss.backward()
    assert not seen and (everywhere or len(module[0]._fn.Fm[0]._backward_hooks) == 1)
    handle.remove()


class ConvolutionGradients(TorchDispatchMode):
    """Records for each convolution's backward whether input, weight and bias get a gradient."""

    only_watches = True

    def __init__(self):
        super().__init__()
        self.masks: list[list[bool]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.convolution_backward.default:
            self.masks.append(args[-1])
        return function(*args, **(kwargs or {}))


def test_only_the_gradients_that_are_asked_for_are_computed():
    module, x = chain(), images()
    y = module(x)
    with ConvolutionGradients() as watch:
        (got,) = torch.autograd.grad(weighted_sum(y), [x])
    assert len(watch.masks) == 8 and all(not weight and not bias for _, weight, bias in watch.masks)
    with Ordinary():
        y = module(x)
    torch.testing.assert_close(got, torch.autograd.grad(weighted_sum(y), [x])[0])

    y = module(x)
    weight = module[1]._fn.Gm[0].weight  # of the branch that is differentiated first
    with ConvolutionGradients() as watch:
        torch.autograd.grad(weighted_sum(y), [weight])
    assert len(watch.masks) == 2


def test_a_second_backward_pass_over_a_freed_graph_is_refused():
    y = chain()(images())
    y.backward(torch.ones_like(y))
    with pytest.raises(RuntimeError, match="a second time"):
        y.backward(torch.ones_like(y))


def test_a_weight_that_is_used_again_under_autocast_keeps_its_graph():
    """Autocast caches a cast weight. If it was cast without a graph, it has no gradient where it is used again."""

    def program(module: nn.Module, x: Tensor) -> None:
        with torch.autocast(x.device.type, torch.bfloat16):
            y = module(x.float())
            again = module[0]._fn.Fm[0](x.float().chunk(2, 1)[0])
        (y.float().sum() + again.float().square().sum()).backward()

    found = []
    for context in (nullcontext, Ordinary):
        module = chain(1).float()
        with context():
            program(module, images())
        found.append(module[0]._fn.Fm[0].weight.grad)
    if found[0].is_cuda:  # there the two gradients of the weight may be added in bfloat16
        assert relative_error(*found) <= 2**-7
    else:
        torch.testing.assert_close(*found)


def shared_layer() -> nn.Module:
    first, second, third = quiet_branch(), quiet_branch(), quiet_branch().requires_grad_(False)
    first[0].weight.requires_grad_(False)
    second[1] = first[1]
    return ReversibleSequential(AdditiveCoupling(first, second), AdditiveCoupling(third)).double()


def branch_used_twice() -> nn.Module:
    branch = quiet_branch()
    return ReversibleSequential(AdditiveCoupling(branch, branch), AdditiveCoupling(quiet_branch(), branch)).double()


@pytest.mark.parametrize(("make", "runs"), [(shared_layer, 1), (branch_used_twice, 1)])
@pytest.mark.parametrize("requires_grad", [True, False])
def test_frozen_parameters_and_what_branches_share(make, runs, requires_grad):
    module, x = make(), images(requires_grad=requires_grad)
    assert number_of_direct_runs(module(x)) == runs
    assert_like_twin(module, lambda module, x: weighted_sum(module(x)).backward(), x)


class WithUnusedParameter(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 3, 1), nn.Tanh())
        self.unused = nn.Parameter(torch.ones(2))


def test_a_parameter_that_no_layer_uses_has_no_gradient():
    module = ReversibleSequential(AdditiveCoupling(WithUnusedParameter()), AdditiveCoupling(quiet_branch())).double()
    y = module(images())
    assert number_of_direct_runs(y) == 1
    weighted_sum(y).backward()
    assert {name for name, p in module.named_parameters() if p.grad is None} == {"0._fn.Fm.unused", "0._fn.Gm.unused"}


def test_a_branch_that_returns_its_input_or_is_broadcast():
    """The gradients of such a branch are the gradients of its half themselves, or sums of them."""
    pooled = nn.Sequential(nn.Conv2d(3, 3, 1), nn.AdaptiveAvgPool2d(1))
    module = ReversibleSequential(AdditiveCoupling(nn.Identity(), pooled), AdditiveCoupling(nn.Sequential())).double()
    assert number_of_direct_runs(module(images())) == 1
    assert_like_twin(module, lambda module, x: weighted_sum(module(x)).backward(), images())


def test_a_branch_that_changes_its_input_is_refused():
    in_place = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 3, 1))
    module = InvertibleModuleWrapper(AdditiveCoupling(in_place, quiet_branch())).double()
    with pytest.raises(RuntimeError, match="modifies its input in place"):
        module(images().sin())


def test_a_loss_before_a_run_may_be_differentiated_first():
    """The run must then rebuild its inputs, although its own gradients are not needed."""

    def program(module: nn.Module, x: Tensor) -> Tensor:
        before = module[0](x)
        y = module[1](before)
        before.square().sum().backward(retain_graph=True)
        weighted_sum(y).backward()
        return y

    assert_like_twin(chain(), program, images())


class Doubled(torch.autograd.Function):
    """A function whose graph node is written in Python."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return 2 * gradient


class DoubledLinear(nn.Linear):
    stands_for = nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        return Doubled.apply(super().forward(x))


def test_the_last_node_of_a_branch_may_be_written_in_python():
    """On PyTorch 2.11 an edge to such a node does not keep it alive."""
    block = AdditiveCoupling(*(nn.Sequential(DoubledLinear(3, 3)) for _ in range(2)))
    assert_like_twin(InvertibleModuleWrapper(block).double(), backward, images(4, 6))
