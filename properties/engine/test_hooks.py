"""Hooks of every kind are called as often as under ordinary autograd, with the same values."""

import functools
from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
    register_module_full_backward_hook,
    register_module_full_backward_pre_hook,
)

from memcnn import ReversibleSequential
from properties.support.twin import (
    OnlyInvertible,
    assert_like_twin,
    backward,
    block,
    conv_branch,
    images,
    plain_twin,
    weighted_sum,
)

pytestmark = pytest.mark.usefixtures("on_device")

CHAINS = {
    "couplings": lambda: nn.Sequential(block(), block()),
    "ReversibleSequential": lambda: ReversibleSequential(block()._fn, block()._fn),
    "modules with forward and inverse": lambda: ReversibleSequential(*(OnlyInvertible(block()._fn) for _ in range(2))),
}
REGISTRATIONS = {
    "forward pre-hook": lambda m, note: m.register_forward_pre_hook(lambda *_: note()),
    "forward hook": lambda m, note: m.register_forward_hook(lambda *_: note()),
    "forward hook with keywords": lambda m, note: m.register_forward_hook(lambda *_: note(), with_kwargs=True),
    "full backward pre-hook": lambda m, note: m.register_full_backward_pre_hook(lambda *_: note()),
    "full backward hook": lambda m, note: m.register_full_backward_hook(lambda *_: note()),
}


@pytest.mark.parametrize("kind", REGISTRATIONS)
@pytest.mark.parametrize("chain", CHAINS)
def test_a_hook_on_any_module_is_called_once_a_step(chain, kind):
    module = CHAINS[chain]()
    calls = Counter()
    for name, part in module.named_modules():
        REGISTRATIONS[kind](part, lambda name=name: calls.update([name]))
    run_names = {name for name, part in module.named_modules() if not isinstance(part, nn.ModuleList)}
    for step in (1, 2):
        weighted_sum(module(images(seed=step))).backward()
        assert calls == dict.fromkeys(run_names, step)


@pytest.mark.parametrize("name", ["0", "1._fn", "1._fn.Fm", "0._fn.Gm.3"])
def test_a_hook_on_one_module_alone_is_called_once(name):
    module, calls = CHAINS["ReversibleSequential"](), Counter()
    module.get_submodule(name).register_forward_hook(lambda *_: calls.update([name]))
    weighted_sum(module(images())).backward()
    assert calls == {name: 1}


def test_parameter_and_tensor_hooks_are_called_once():
    module = nn.Sequential(block(), block())
    calls = Counter()
    for name, parameter in module.named_parameters():
        parameter.register_hook(lambda gradient, name=name: calls.update([name]))
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: calls.update([name + " accumulated"]))
    x = images()
    x.register_hook(lambda gradient: calls.update(["input"]))
    middle = module[0](x)
    middle.register_hook(lambda gradient: calls.update(["between blocks"]))
    weighted_sum(module[1](middle)).backward()
    names = [name for name, _ in module.named_parameters()]
    assert calls == Counter([*names, *(name + " accumulated" for name in names), "input", "between blocks"])


def test_a_tensor_hook_between_blocks_may_replace_the_gradient():
    def program(module, x):
        middle = module(x)
        middle.register_hook(lambda gradient: 2 * gradient + 1)
        y = module(middle)
        weighted_sum(y).backward()
        return y

    assert_like_twin(block(), program, images())


@pytest.mark.parametrize(
    "register",
    [
        lambda m: m.register_forward_hook(lambda module, args, output: output * 1.5),
        lambda m: m.register_forward_pre_hook(lambda module, args: (args[0].sin(),)),
    ],
    ids=["output replaced", "input replaced"],
)
def test_a_hook_that_replaces_a_value_replaces_it_in_the_recomputation_too(register):
    module = nn.Sequential(block(), block())
    register(module[0]._fn.Fm[3])
    register(module[1]._fn.Gm)
    assert_like_twin(module, backward, images())


def test_a_hook_registered_after_the_forward_pass_is_not_called_by_backward():
    module = block()
    loss = weighted_sum(module(images()))
    handle = module._fn.Fm.register_forward_hook(lambda *_: pytest.fail("called in the recomputation"))
    loss.backward()
    handle.remove()


@pytest.mark.parametrize(
    "register",
    [
        register_module_forward_hook,
        register_module_forward_pre_hook,
        register_module_full_backward_hook,
        register_module_full_backward_pre_hook,
    ],
    ids=lambda register: register.__name__,
)
@pytest.mark.parametrize("chain", [block, lambda: ReversibleSequential(block(), block())], ids=["block", "sequence"])
def test_global_hooks_see_each_module_once(register, chain):
    seen = Counter()
    module = chain()
    handle = register(lambda m, *_: seen.update([id(m)]))
    try:
        weighted_sum(module(images())).backward()
    finally:
        handle.remove()
    assert seen == {id(m): 1 for m in module.modules()}


def test_a_hook_may_be_a_builtin_without_a_module():
    seen = {}
    module = block()
    module._fn.Fm.register_forward_pre_hook(seen.__setitem__)
    weighted_sum(module(images())).backward()
    assert list(seen) == [module._fn.Fm]


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_a_hook_may_be_given_a_quantized_tensor():
    class Quantized(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.reading = nn.Linear(3, 3), nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q = torch.quantize_per_tensor(x.detach().float(), 0.1, 0, torch.qint8)
            return self.linear(x) * self.reading(q).dequantize()

    module = block(Quantized)
    module._fn.Fm.reading.register_forward_hook(lambda *_: None)
    assert_like_twin(module, backward, images(4, 6))


def test_a_hook_may_be_a_partial_of_a_function():
    seen = Counter()
    module = block()
    module._fn.Fm.register_forward_hook(functools.partial(lambda word, *_: seen.update([word]), "hook"))
    weighted_sum(module(images())).backward()
    assert seen == {"hook": 1}


def test_a_hook_by_which_torch_computes_a_weight_runs_in_the_recomputation_too():
    def branch():
        return nn.Sequential(nn.utils.spectral_norm(nn.Conv2d(3, 3, 3, padding=1)), nn.Tanh())

    assert_like_twin(nn.Sequential(block(branch), block(branch)), backward, images())


def test_hooks_survive_an_error_in_the_branch():
    module = block(lambda: nn.Sequential(conv_branch(), nn.Conv2d(3, 3, 1)))
    calls = Counter()
    handles = [part.register_forward_hook(lambda *_: calls.update(["hook"])) for part in module._fn.Fm]
    module._fn.Fm[1].weight = nn.Parameter(torch.ones(2, 2, 1, 1, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="channels"):
        module(images())
    assert calls == {"hook": 1}
    module._fn.Fm[1].weight = nn.Parameter(torch.ones(3, 3, 1, 1, dtype=torch.float64))
    module(images())
    assert calls == {"hook": 3}
    for handle in handles:
        handle.remove()
    assert not any(part._forward_hooks for part in module.modules())


def test_the_twin_of_the_tests_calls_hooks_once_as_well():
    calls = Counter()
    twin = plain_twin(block())
    twin._fn.Fm.register_forward_hook(lambda *_: calls.update(["F"]))
    weighted_sum(twin(images())).backward()
    assert calls == {"F": 1}
