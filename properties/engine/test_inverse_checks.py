"""The options ``check_inverse`` and ``keep_input`` of a block, and ``is_invertible_module``."""

import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import memcnn
from memcnn import AdditiveCoupling, InvertibleModuleWrapper
from properties.devices import rng_state
from properties.support.blocks import net, rows
from properties.support.twin import assert_like_twin, backward, block, conv_branch, images, weighted_sum

pytestmark = pytest.mark.usefixtures("on_device")


def is_invertible_module(*arguments, **options) -> bool:
    return memcnn.is_invertible_module(*arguments, **options, device=torch.get_default_device())


class Halves(nn.Module):
    """x -> 2 x. The inverse multiplies by ``factor``, and is right for 0.5."""

    def __init__(self, factor: float = 0.5):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return 2 * x

    def inverse(self, y):
        return y * self.factor


class LosesOne(nn.Module):
    """Its inverse returns only one of two tensors."""

    def forward(self, a, b):
        return 2 * a, 2 * b

    def inverse(self, a, b):
        return a / 2


class Swap(nn.Module):
    """(x1, x2) -> (2 x2, x1 + tanh(x2))."""

    def forward(self, x1, x2):
        return 2 * x2, x1 + torch.tanh(x2)

    def inverse(self, y1, y2):
        return y2 - torch.tanh(y1 / 2), y1 / 2


class BrokenCoupling(AdditiveCoupling):
    def inverse(self, y):
        return super().inverse(y) * 1.01


def test_a_wrong_inverse_is_reported_with_its_error_and_its_block():
    module = nn.Sequential(block(), InvertibleModuleWrapper(Halves(factor=0.51), check_inverse=1e-4))
    loss = weighted_sum(module(images()))
    with pytest.raises(RuntimeError, match=r"Halves is not inverted: .*\(2, 6, 5, 4\).* error of 2.0e-02.*=1.0e-04"):
        loss.backward()


def test_drift_along_a_chain_is_reported():
    module = nn.Sequential(*(block(check_inverse=1e-6) for _ in range(4)), InvertibleModuleWrapper(Halves(0.5001)))
    loss = weighted_sum(module(images()))
    with pytest.raises(RuntimeError, match="Sequential is not inverted"):
        loss.backward()


def test_a_right_inverse_passes_its_check_and_leaves_everything_as_it_was():
    def branch():
        return nn.Sequential(conv_branch(), nn.Dropout(0.5))

    module = block(branch, check_inverse=1e-10)
    assert_like_twin(module, backward, images())
    assert {b.item() for name, b in module.named_buffers() if name.endswith("num_batches_tracked")} == {1}


def test_an_exact_block_passes_a_check_that_allows_no_error():
    module = nn.Sequential(
        *(InvertibleModuleWrapper(AdditiveCoupling(conv_branch(), exact=True), check_inverse=0.0) for _ in range(2))
    )
    weighted_sum(module(images(dtype=torch.float32))).backward()


def test_an_input_of_two_checked_blocks_is_rebuilt_and_checked_once():
    def program(module, x):
        h = module[0](x)
        y = module[1](h) + module[2](h)
        weighted_sum(y).backward()
        return y

    assert_like_twin(nn.Sequential(*(block(check_inverse=1e-10) for _ in range(3))), program, images())


def test_a_wrong_inverse_does_not_matter_where_the_input_is_kept():
    module = nn.Sequential(block(), InvertibleModuleWrapper(Halves(factor=0.7), keep_input=True))
    assert_like_twin(module, backward, images())


def test_kept_inputs_are_what_backward_recomputes_from():
    module = nn.Sequential(block(keep_input=True), block(keep_input=True))
    assert_like_twin(module, backward, images())

    def inverse(module, y):
        for part in reversed(module):
            y = part.inverse(y)
        weighted_sum(y).backward()

    assert_like_twin(nn.Sequential(block(keep_input_inverse=True), block(keep_input_inverse=True)), inverse, images())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_is_invertible_module_is_true_only_for_invertible_modules(dtype):
    wrapped = block().to(dtype)
    atol = 1e-5
    assert is_invertible_module(wrapped, (2, 6, 5, 4), dtype, atol)
    assert is_invertible_module(wrapped._fn, ((2, 6, 5, 4),), dtype, atol)
    assert is_invertible_module(Swap(), ((2, 3), (2, 3)), dtype, atol)
    assert not is_invertible_module(BrokenCoupling(conv_branch()).to(dtype), (2, 6, 5, 4), dtype, atol)
    assert not is_invertible_module(conv_branch().to(dtype), (2, 3, 5, 4), dtype, atol)
    assert not is_invertible_module(LosesOne(), ((2, 3), (2, 3)), dtype, atol)


def test_a_coupling_with_dropout_is_invertible_under_one_mask():
    coupling = AdditiveCoupling(nn.Sequential(conv_branch(), nn.Dropout(0.5)), conv_branch())
    assert is_invertible_module(coupling, (2, 6, 5, 4), atol=1e-5)


def test_is_invertible_module_changes_neither_generators_nor_buffers():
    module = block()
    state = rng_state()
    buffers = {name: b.clone() for name, b in module.named_buffers()}
    assert is_invertible_module(module, (2, 6, 5, 4), torch.float64)
    assert torch.equal(rng_state(), state)
    assert all(torch.equal(b, buffers[name]) for name, b in module.named_buffers())


def test_is_invertible_module_does_not_change_the_generators_of_python_and_numpy():
    class Drawing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * random.random() + np.random.rand()

    before = random.getstate(), np.random.get_state(legacy=False)
    assert is_invertible_module(AdditiveCoupling(Drawing(), conv_branch()), (2, 6, 5, 4), atol=1e-5)
    assert random.getstate() == before[0]
    np.testing.assert_equal(np.random.get_state(legacy=False), before[1])


class Sharing(nn.Module):
    """Identity whose results share memory with the inputs as ``forward`` and ``inverse`` of the arguments do."""

    def __init__(self, run, undo):
        super().__init__()
        self.run, self.undo = run, undo

    def forward(self, x):
        return self.run(x)

    def inverse(self, y):
        return self.undo(y)


SHARING = {
    "the input": (lambda x: x, torch.clone, ["forward shares"]),
    "a view of the input": (lambda x: x.transpose(0, 1), lambda y: y.transpose(0, 1).clone(), ["forward shares"]),
    "a part of the input": (lambda x: x[0:], torch.clone, ["forward shares"]),
    "the input of inverse": (torch.clone, lambda x: x, ["inverse shares"]),
    "both": (lambda x: x, lambda x: x, ["forward shares", "inverse shares"]),
    "neither": (torch.clone, torch.clone, []),
}


@pytest.mark.parametrize(("run", "undo", "messages"), SHARING.values(), ids=SHARING)
def test_a_result_in_the_memory_of_an_input_is_warned_of(run, undo, messages):
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        assert is_invertible_module(Sharing(run, undo), (2, 2))
    assert [str(w.message).split(" memory")[0].removeprefix("a result of ") for w in warned] == messages
    assert {w.filename for w in warned} <= {__file__}


def test_one_tensor_returned_twice_is_warned_of_and_halves_of_one_tensor_are_not():
    class Twice(nn.Module):
        def forward(self, x):
            return (2 * x,) * 2

        def inverse(self, y, z):
            return torch.minimum(y, z) / 2

    class Halving(nn.Module):
        def forward(self, x):
            return (2 * x).chunk(2, 1)

        def inverse(self, y, z):
            return torch.cat((y, z), 1) / 2

    with pytest.warns(UserWarning, match="two results of forward are the same tensor"):
        assert is_invertible_module(Twice(), (2, 3))
    assert is_invertible_module(Halving(), (2, 4))
    assert is_invertible_module(Halving(), (0, 4))


@pytest.mark.parametrize("shape", [3, (2, "a"), ((2, 3), 4)])
def test_a_malformed_shape_is_refused(shape):
    with pytest.raises(ValueError, match="test_input_shape must be a shape"):
        is_invertible_module(Swap(), shape)


def test_an_empty_batch_passes_a_check():
    module = InvertibleModuleWrapper(AdditiveCoupling(net(), net()), check_inverse=1e-6).double()
    assert_like_twin(module, backward, rows(0, 6))
