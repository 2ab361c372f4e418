"""The recomputation sees hooks that change values in place, or are removed before backward, as forward saw them."""

import itertools
import threading
from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from memcnn import ReversibleSequential
from properties.support.twin import (
    assert_like_twin,
    assert_same,
    backward,
    block,
    images,
    plain_twin,
    run,
    weighted_sum,
)

pytestmark = pytest.mark.usefixtures("on_device")


def branch() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Softplus(), nn.Conv2d(3, 3, 1))


def output_times_two(module, args, output):
    output.mul_(2)


def output_clamped(module, args, output):
    output.clamp_(-0.1, 0.1)


def input_times_two(module, args):
    args[0].mul_(2)


def keyword_input_times_two(module, args, kwargs):
    args[0].mul_(2)


def output_times_two_by_data(module, args, output):
    output.data.mul_(2)


def input_times_two_by_numpy(module, args):
    args[0].detach().numpy()[:] *= 2


HOOKS = {
    "output in place": lambda m: m.register_forward_hook(output_times_two),
    "output clamped in place": lambda m: m.register_forward_hook(output_clamped),
    "input in place": lambda m: m.register_forward_pre_hook(input_times_two),
    "input in place, with keywords": lambda m: m.register_forward_pre_hook(keyword_input_times_two, with_kwargs=True),
    "output replaced": lambda m: m.register_forward_hook(lambda module, args, output: output * 1.5),
    "input replaced": lambda m: m.register_forward_pre_hook(lambda module, args: (args[0].sin(),)),
    "input replaced, with keywords": lambda m: m.register_forward_pre_hook(
        lambda module, args, kwargs: ((args[0].sin(),), kwargs), with_kwargs=True
    ),
}
UNCOUNTED = {
    "output by .data": lambda m: m.register_forward_hook(output_times_two_by_data),
    "input by NumPy": lambda m: m.register_forward_pre_hook(input_times_two_by_numpy),
}


def hooked_chain(kind: str, part: int) -> tuple[nn.Module, list]:
    """Return a chain of two blocks with a hook on one branch of each, and the handles of the hooks."""
    module = ReversibleSequential(block(branch), block(branch))
    return module, [(HOOKS | UNCOUNTED)[kind](b._fn.Fm[part]) for b in module]


@pytest.mark.parametrize("part", [0, 2], ids=["first layer", "last layer"])
@pytest.mark.parametrize("kind", HOOKS)
def test_a_hook_that_changes_a_value_changes_it_in_the_recomputation_too(kind, part):
    if part == 0 and kind.startswith("input in place"):
        pytest.skip("the input of the first layer is that of the branch, and refused")
    module, _ = hooked_chain(kind, part)
    assert_like_twin(module, backward, images())


@pytest.mark.parametrize("kind", UNCOUNTED)
def test_a_change_that_pytorch_does_not_count_is_noticed(kind):
    if torch.get_default_device().type == "cuda":
        pytest.skip("on a GPU such a hook is an error, see the next test")
    module, _ = hooked_chain(kind, 2)
    assert_like_twin(module, backward, images())


def test_a_change_that_is_seen_in_backward_alone_is_an_error_that_names_the_hook(monkeypatch):
    """On a GPU the forward pass does not wait for the comparison."""
    monkeypatch.setattr(Tensor, "is_cuda", True)
    module, _ = hooked_chain("output by .data", 2)
    loss = weighted_sum(module(images()))
    with pytest.raises(RuntimeError, match="forward hook 'output_times_two_by_data' changed .*return a new tensor"):
        loss.backward()


@pytest.mark.parametrize("kind", HOOKS)
def test_a_hook_that_is_removed_after_the_forward_pass_is_called_in_the_recomputation(kind):
    module, _handles = hooked_chain(kind, 2)
    twin = plain_twin(module)

    def program(module: nn.Module, x: Tensor) -> Tensor:
        y = module(x)
        for b in module:
            for hooks in (
                b._fn.Fm[2]._forward_hooks,
                b._fn.Fm[2]._forward_pre_hooks,
                b._fn.Fm[2]._forward_pre_hooks_with_kwargs,
            ):
                hooks.clear()
        weighted_sum(y).backward()
        return y

    assert_same(run(module, program, [images()]), run(twin, program, [images()]), limit=1e-10)
    assert not any(
        b._fn.Fm[2]._forward_hooks or b._fn.Fm[2]._forward_pre_hooks or b._fn.Fm[2]._forward_pre_hooks_with_kwargs
        for b in module
    )


def test_a_hook_that_removes_itself_stays_removed():
    def program(module: nn.Module, x: Tensor) -> Tensor:
        def once(m, args, output):
            handle.remove()
            return output * 1.5

        handle = module._fn.Fm.register_forward_hook(once)
        y = module(x)
        assert not module._fn.Fm._forward_hooks
        weighted_sum(y).backward()
        assert not module._fn.Fm._forward_hooks
        return y

    assert_like_twin(block(branch), program, images())


def test_hooks_run_in_the_recomputation_in_the_order_of_the_forward_pass():
    def program(module: nn.Module, x: Tensor) -> Tensor:
        part = module._fn.Fm[0]
        first = part.register_forward_hook(lambda m, args, output: output + 1)
        part.register_forward_hook(lambda m, args, output: output * 3)
        y = module(x)
        first.remove()
        weighted_sum(y).backward()
        return y

    assert_like_twin(block(branch), program, images())


@pytest.mark.parametrize("hook", [input_times_two, keyword_input_times_two], ids=lambda hook: hook.__name__)
def test_a_hook_that_changes_the_input_of_a_branch_is_named(hook):
    module = block(branch)
    module._fn.Gm.register_forward_pre_hook(hook, with_kwargs=hook is keyword_input_times_two)
    with pytest.raises(RuntimeError, match=f"modifies its input in place.*hook '{hook.__name__}'.*return a new"):
        module(images())


def test_a_hook_within_a_nested_block_changes_its_recomputation():
    inner = block(lambda: nn.Sequential(nn.Conv2d(2, 2, 1), nn.Tanh()))
    inner._fn.Fm[0].register_forward_hook(lambda m, args, output: output * 1.5)
    inner._fn.Gm[0].register_forward_hook(output_times_two)
    assert_like_twin(block(lambda: nn.Sequential(nn.Conv2d(3, 4, 1), inner, nn.Conv2d(4, 3, 1))), backward, images())


def test_another_threads_hooks_are_called_while_a_branch_is_rebuilt():
    """The hook is global. A recomputation in the first thread silences it only for that thread."""
    other, called, argument = nn.Tanh(), Counter(), torch.ones(2)

    class Waiting(nn.Module):
        """Lets another thread call a module during the recomputation."""

        def __init__(self):
            super().__init__()
            self.calls = itertools.count(1)  # a number or a list would be set back

        def forward(self, x: Tensor) -> Tensor:
            if next(self.calls) > 1:
                thread = threading.Thread(target=other, args=[argument])
                thread.start()
                thread.join()
            return x.sin()

    module = block(Waiting)
    handle = register_module_forward_hook(lambda m, *_: called.update([m is other]))
    try:
        weighted_sum(module(images())).backward()
    finally:
        handle.remove()
    assert called == {True: 2, False: 4}  # wrapper, coupling and two branches, once each
