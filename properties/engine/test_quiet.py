"""The short replay of quiet branches: which branches get it, and that it notices every change."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from memcnn import AdditiveCoupling, InvertibleModuleWrapper, ReversibleSequential
from memcnn.engine import quiet
from memcnn.engine.quiet import QuietReplay, replay_of
from memcnn.engine.replay import Replay
from memcnn.models.resnet import Branch
from properties.support.twin import assert_like_twin, backward, images, weighted_sum

pytestmark = pytest.mark.usefixtures("on_device")


def quiet_branch() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False),
        nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()),
        nn.Conv2d(4, 3, 1, bias=False),
        nn.BatchNorm2d(3),
    )


def kind(module: nn.Module) -> type:
    return type(replay_of(module, (torch.ones(2, 3, 4, 4),), True))


class Renamed(nn.Sequential):
    """A container that adds only its name."""

    def __init__(self, *modules: nn.Module):
        super().__init__(*modules, nn.Identity())


class Reversed(nn.Sequential):
    def __iter__(self):
        return iter([*super().__iter__()][::-1])


def patched(module: nn.Module) -> nn.Module:
    module[0].forward = lambda x: F.conv2d(x, module[0].weight, padding=1).cos()
    return module


def hooked(module: nn.Module) -> nn.Module:
    module[0].register_forward_hook(lambda *_: None)
    return module


def compiled(module: nn.Module) -> nn.Module:
    module[0].compile(backend="eager")
    return module


def with_buffer(module: nn.Module) -> nn.Module:
    module[0].register_buffer("mask", torch.ones(1))
    return module


def norm_in_evaluation_mode(module: nn.Module) -> nn.Module:
    module[1].eval()
    return module


def containing_itself(module: nn.Module) -> nn.Module:
    module[1].append(module)
    return module


class Conv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).cos()


@pytest.mark.parametrize(
    "module",
    [
        quiet_branch(),
        Renamed(*quiet_branch()),
        Branch(*quiet_branch()),
        nn.Sequential(nn.BatchNorm2d(3, momentum=None)),
        nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)),
        nn.Sequential(nn.Conv2d(3, 3, 1), nn.GroupNorm(1, 3)).eval(),
        nn.Linear(4, 4),
    ],
    ids=["layers", "subclass", "branch of a resnet", "cumulative", "without statistics", "evaluation", "single"],
)
def test_layers_of_pytorch_that_draw_nothing_are_quiet(module):
    assert kind(module) is QuietReplay


@pytest.mark.parametrize(
    "module",
    [
        nn.Sequential(nn.Dropout()),
        nn.Sequential(nn.RReLU()),
        nn.Sequential(Conv(3, 3, 1)),
        Reversed(*quiet_branch()),
        nn.Sequential(nn.InstanceNorm2d(3, track_running_stats=True)),
        nn.Sequential(nn.SyncBatchNorm(3)),
        nn.Sequential(nn.LazyConv2d(3, 1)),
        nn.Sequential(weight_norm(nn.Conv2d(3, 3, 1))),
        nn.ModuleList([nn.ReLU()]),
        patched(quiet_branch()),
        hooked(quiet_branch()),
        nn.Sequential(nn.BatchNorm2d(3, affine=False)),
        compiled(quiet_branch()),
        with_buffer(quiet_branch()),
        norm_in_evaluation_mode(quiet_branch()),
        containing_itself(quiet_branch()),
    ],
)
def test_everything_else_has_the_full_replay(module):
    assert kind(module) is Replay


def test_a_mode_and_a_global_hook_ask_for_the_full_replay():
    module = quiet_branch()
    with Counting():
        assert kind(module) is Replay
    with CountingOperators():
        assert kind(module) is Replay
    with Watching():
        assert kind(module) is QuietReplay, "it says that it changes nothing"
    with torch.device("cpu"):
        assert kind(module) is QuietReplay, "a default device changes nothing"
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert kind(module) is Replay
    finally:
        handle.remove()


def test_a_module_that_has_become_quiet_has_the_short_replay_again():
    module = quiet_branch()
    handle = module[0].register_forward_hook(lambda *_: None)
    assert kind(module) is kind(module) is Replay
    handle.remove()
    assert kind(module) is kind(module) is QuietReplay


class CountingOperators(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Watching(CountingOperators):
    only_watches = True


class Counting(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def every(module: nn.Module, layer: type) -> list:
    return [m for m in module.modules() if isinstance(m, layer)]


def evaluate(module: nn.Module) -> None:
    module.eval()


def change_eps(module: nn.Module) -> None:
    for norm in every(module, nn.BatchNorm2d):
        norm.eps = 0.5


def stop_tracking(module: nn.Module) -> None:
    for norm in every(module, nn.BatchNorm2d):
        norm.track_running_stats = False


def add_hooks(module: nn.Module) -> None:
    for conv in every(module, nn.Conv2d):
        conv.register_forward_hook(lambda _, __, y: 2 * y)


def add_global_hook(module: nn.Module) -> None:
    module.handle = nn.modules.module.register_module_forward_hook(lambda _, __, y: 2 * y)


def replace_parameters(module: nn.Module) -> None:
    for conv in every(module, nn.Conv2d):
        conv._parameters["weight"] = nn.Parameter(torch.zeros_like(conv.weight))


def replace_buffers(module: nn.Module) -> None:
    for norm in every(module, nn.BatchNorm2d):
        norm.running_mean = norm.running_mean + 1


def freeze(module: nn.Module) -> None:
    module.requires_grad_(False)


@pytest.mark.parametrize(
    "change", [evaluate, change_eps, stop_tracking, add_hooks, add_global_hook, freeze, replace_buffers]
)
@pytest.mark.parametrize("sequence", [False, True], ids=["wrapped", "sequence"])
def test_what_changes_between_forward_and_backward_has_no_effect(change, sequence):
    def coupling() -> nn.Module:
        return AdditiveCoupling(quiet_branch(), quiet_branch())

    def program(module: nn.Module, x: Tensor) -> Tensor:
        y = module(x)
        flags = [p.requires_grad for p in module.parameters()]
        statistics = [b.clone() for b in module.buffers()]
        change(module)
        try:
            (y * y).sum().backward()
        finally:
            if change is add_global_hook:
                module.handle.remove()
            for p, flag in zip(module.parameters(), flags, strict=True):
                p.requires_grad_(flag)
        if change is not replace_buffers:
            assert all(map(torch.equal, statistics, module.buffers())), "the second evaluation moves no statistic"
        return y

    make = ReversibleSequential if sequence else lambda *parts: nn.Sequential(*map(InvertibleModuleWrapper, parts))
    assert_like_twin(make(coupling(), coupling()).double(), program, images())


def double_in_place(module: nn.Module) -> None:
    with torch.no_grad():
        every(module, nn.Conv2d)[1].weight.mul_(2)


def give_other_data(module: nn.Module) -> None:
    conv = every(module, nn.Conv2d)[1]
    conv.weight.data = conv.weight.data * 2


def exchange_a_layer(module: nn.Module) -> None:
    module[1] = nn.Tanh()


def add_a_layer(module: nn.Module) -> None:
    module.append(nn.Tanh())


def nest_a_layer(module: nn.Module) -> None:
    module[1] = nn.Sequential(module[1])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (double_in_place, "the parameter 'weight' of shape .* was modified between forward and backward"),
        (give_other_data, "the parameter 'weight' of shape .* was modified between forward and backward"),
        (exchange_a_layer, "a module within Sequential was exchanged, added or removed between forward and backward"),
        (add_a_layer, "a module within Sequential was exchanged, added or removed between forward and backward"),
        (nest_a_layer, "a module within Sequential was exchanged, added or removed between forward and backward"),
    ],
)
def test_what_cannot_be_restored_is_refused(change: Callable, words: str):
    branch = quiet_branch()
    loss = weighted_sum(InvertibleModuleWrapper(AdditiveCoupling(branch, quiet_branch())).double()(images()))
    change(branch)
    with pytest.raises(RuntimeError, match=words):
        loss.backward()


def test_a_parameter_that_was_replaced_is_used_as_in_the_forward_pass():
    gradients = []
    for change in (lambda module: None, replace_parameters):
        torch.manual_seed(0)
        module = InvertibleModuleWrapper(AdditiveCoupling(quiet_branch(), quiet_branch())).double()
        x = images()
        loss = weighted_sum(module(x))
        change(module)
        loss.backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


@pytest.mark.parametrize("change", [evaluate, change_eps, add_hooks, replace_parameters, freeze, exchange_a_layer])
def test_what_changes_between_two_steps_is_used_in_the_second(change):
    def program(module: nn.Module, x: Tensor) -> Tensor:
        backward(module, x)
        change(every(module, nn.Sequential)[0])
        return backward(module, x)

    branch = quiet_branch()
    assert_like_twin(InvertibleModuleWrapper(AdditiveCoupling(branch, quiet_branch())).double(), program, images())


def dilate(module: nn.Module) -> None:
    module[0].dilation = module[0].padding = (2, 2)


@pytest.mark.parametrize(
    "change", [evaluate, change_eps, stop_tracking, add_hooks, replace_parameters, replace_buffers, freeze, dilate]
)
def test_what_changes_between_two_steps_of_the_direct_way_is_used_in_the_second(change):
    def program(module: nn.Module, x: Tensor) -> Tensor:
        backward(module, x)
        change(every(module, nn.Sequential)[0])
        module.zero_grad()
        return backward(module, x)

    branch = quiet_branch()
    assert_like_twin(InvertibleModuleWrapper(AdditiveCoupling(branch, quiet_branch())).double(), program, images())


def test_a_parameter_that_is_no_longer_frozen_is_trained():
    def program(module: nn.Module, x: Tensor) -> Tensor:
        first = every(module, nn.Sequential)[0]
        first.requires_grad_(False)
        backward(module, x)
        first.requires_grad_(True)
        module.zero_grad()
        return backward(module, x)

    module = InvertibleModuleWrapper(AdditiveCoupling(quiet_branch(), quiet_branch())).double()
    assert_like_twin(module, program, images())


def test_a_class_of_layers_that_is_patched_between_two_steps_is_used_as_it_is(monkeypatch):
    def program(module: nn.Module, x: Tensor) -> Tensor:
        with monkeypatch.context() as patch:
            backward(module, x)
            patch.setattr(nn.ReLU, "forward", lambda self, x: x.clamp_min(0.5))
            module.zero_grad()
            return backward(module, x)

    module = InvertibleModuleWrapper(AdditiveCoupling(quiet_branch(), quiet_branch())).double()
    assert_like_twin(module, program, images())


@pytest.mark.parametrize("change", [replace_parameters, add_hooks])
def test_registries_that_were_exchanged_for_equal_ones_are_the_ones_to_watch(change):
    def program(module: nn.Module, x: Tensor) -> Tensor:
        backward(module, x)
        branch = every(module, nn.Sequential)[0]
        for layer in branch.modules():
            for name in ("_parameters", "_forward_hooks"):
                setattr(layer, name, vars(layer)[name].copy())
        for action in (lambda _: None, change):
            action(branch)
            module.zero_grad()  # a step with earlier gradients would look at each branch alone
            y = backward(module, x)
        return y

    branch = quiet_branch()
    assert_like_twin(InvertibleModuleWrapper(AdditiveCoupling(branch, quiet_branch())).double(), program, images())


def test_a_full_replay_gives_the_same_gradients_bit_for_bit(monkeypatch):
    gradients = []
    for full in (False, True):
        if full:
            monkeypatch.setattr(quiet, "is_observed", lambda: True)
        torch.manual_seed(0)
        module = ReversibleSequential(*(AdditiveCoupling(quiet_branch(), quiet_branch()) for _ in range(3)))
        x = images(dtype=torch.float32)
        with torch.autocast(x.device.type, torch.bfloat16):
            y = module(x)
        (y.float() ** 2).sum().backward()
        gradients.append([x.grad, *(p.grad for p in module.parameters()), *module.buffers()])
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "without parameters"])
@pytest.mark.parametrize("full", [False, True], ids=["short", "full"])
def test_norms_under_autocast_are_recomputed(affine, full, monkeypatch):
    """Without parameters and running statistics, a BatchNorm would save its statistics in bfloat16."""
    if full:
        monkeypatch.setattr(quiet, "is_observed", lambda: True)
    branch = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3, affine=affine), nn.Tanh())
    module = ReversibleSequential(AdditiveCoupling(branch))
    x = images(dtype=torch.float32)
    with torch.autocast(x.device.type, torch.bfloat16):
        y = module(x)
    y.float().pow(2).sum().backward()
    assert module[0]._fn.Gm[1].num_batches_tracked == 1
    assert x.grad.isfinite().all()


def test_an_attribute_stands_for_that_names_no_layer_has_no_effect():
    class Labelled(nn.Linear):
        stands_for = "text"

    block = AdditiveCoupling(nn.Sequential(Labelled(3, 3), nn.Tanh()), nn.Sequential(Labelled(3, 3), nn.Tanh()))
    assert_like_twin(InvertibleModuleWrapper(block).double(), backward, images(4, 6))
