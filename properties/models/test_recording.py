"""The record of a block's ``forward`` keeps its gradients, and refuses what it cannot keep."""

import copy
import pickle
from collections import deque

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import memcnn
from memcnn.models.residual import RecordedFunction
from memcnn.testing.tolerances import relative_error, tolerance
from properties.support.residual import Residual, convert, residual_block


class StraightThrough(torch.autograd.Function):
    """The sign, with the gradient of the identity."""

    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Quantised(Residual):
    """A residual block with a straight-through estimator."""

    def function(self, x):
        return self.gain * StraightThrough.apply(self.norm(self.linear(x)) + self.shift)


@torch.no_grad()
def scale_of(y):
    return y.abs().max(-1, keepdim=True).values


def without_gradients(self, x):
    with torch.set_grad_enabled(False):
        h = self.norm(self.linear(x)).tanh()
        with torch.enable_grad():
            y = self.gain * self.norm(self.linear(x))
    return x + y * h / (1 + scale_of(self.linear(x)))


def checkpointed(self, x):
    return x + checkpoint(lambda h: self.gain * self.norm(self.linear(h)), x, use_reentrant=True)


BLOCKS = {
    "a custom function": lambda: Quantised(p=0.0),
    "no gradients": lambda: residual_block(forward=without_gradients),
    "a reentrant checkpoint": lambda: residual_block(forward=checkpointed),
}


def gradients(function, x, parameters):
    inputs = [x.clone().requires_grad_(), *parameters]
    for tensor in inputs:
        tensor.grad = None
    function(inputs[0]).square().sum().backward()
    return [tensor.grad for tensor in inputs]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("make", BLOCKS.values(), ids=BLOCKS)
def test_gradients_of_converted_blocks_equal_those_of_the_blocks(make):
    blocks, x = nn.Sequential(make(), make()).double(), torch.randn(4, 6).double()
    stack, _ = memcnn.to_reversible(blocks, x, measure=False)
    names = ["x", *(name for name, _ in blocks.named_parameters())]
    both = [gradients(function, x, list(blocks.parameters())) for function in (stack, blocks)]
    for name, got, wanted in zip(names, *both, strict=True):
        assert relative_error(got, wanted) <= tolerance(x.dtype, depth=8), name


def test_a_custom_function_is_copied_and_pickled_with_its_stack():
    stack, x = convert(Quantised(p=0.0)), torch.randn(4, 6)
    for other in (copy.deepcopy(stack), pickle.loads(pickle.dumps(stack))):
        pairs = zip(*(gradients(s, x, list(s.parameters())) for s in (stack, other)), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def under_autocast(self, x):
    with torch.autocast("cpu", enabled=False):
        return x + self.function(x)


def appending(self, x):
    y = self.function(x)
    self.history["outputs"].append(y.detach())
    return x + y


def counting(self, x):
    self.shift += 1
    return x + self.function(x)


def counting_in_place(self, x):
    self.shift.add_(1)
    return x + self.function(x)


REFUSED = {
    "autocast": (under_autocast, "its forward enters torch.autocast, which .* the forward of a child module"),
    "a container": (appending, "its forward changes its attribute 'history', which the residual functions would not"),
    "a buffer": (counting, "its forward changes its buffer 'shift', which the residual functions would not"),
    "a buffer in place": (counting_in_place, r"do not change its buffers as it does \(shift"),
}


@pytest.mark.parametrize(("forward", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_a_record_would_lose_is_refused_and_leaves_no_trace(forward, reason):
    block = residual_block(forward=forward)
    block.history = {"outputs": deque(), "names": {"a"}, "others": []}
    block.history["others"].append(block.history)
    buffers = [(name, buffer, buffer.clone()) for name, buffer in block.named_buffers()]
    with pytest.raises(ValueError, match=reason):
        convert(block)
    assert not block.history["outputs"] and len(block.history) == 3
    assert all(block.get_buffer(name) is b and torch.equal(b, value) for name, b, value in buffers)
    assert isinstance(block, Residual) and type(block).__name__ == "Block"
    memcnn.to_reversible([Residual(), block], torch.randn(4, 6), keep_others=True)
    assert not block.history["outputs"], "blocks that are kept, too"
    with torch.autocast("cpu", torch.bfloat16):
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype is torch.bfloat16
    assert StraightThrough.apply(torch.ones(1, requires_grad=True)).grad_fn is not None


def test_an_attribute_that_a_block_sets_in_its_first_call_is_allowed():
    def forward(self, x):
        if not hasattr(self, "factor"):
            self.factor = 0.5
        return x + self.factor * self.function(x)

    block, x = residual_block(forward=forward), torch.randn(4, 6)
    stack = convert(block)
    assert not hasattr(block, "factor")
    assert relative_error(stack.eval()(x), block.eval()(x)) <= tolerance(x.dtype, depth=2)


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_a_lazy_module_that_is_kept_stays_initialised():
    lazy, x = nn.LazyLinear(6), torch.randn(4, 6)
    stack, _ = memcnn.to_reversible([lazy, Residual()], x, keep_others=True, measure=False)
    assert stack(x).shape == lazy(x).shape and lazy.weight.shape == (6, 6)


def test_the_report_names_the_attributes_that_are_constants_now():
    block = residual_block(forward=lambda self, x: x + self.alpha * self.function(x))
    block.alpha, block.unread = 0.5, 1.0
    _, report = memcnn.to_reversible([block], torch.randn(4, 6), measure=False)
    assert "constants now, so that later changes of them have no effect: Block.alpha, Block.p." in str(report)


def switched(self, x, mask=None):
    y = self.function(x)
    return x + (y if mask is None else 2 * y)


def by_default(self, x, mask=None):
    if mask is None:
        mask = self.shift
    return x + self.function(x) * mask


@pytest.mark.parametrize("forward", [switched, by_default])
def test_a_keyword_argument_that_changes_between_none_and_a_value_is_refused(forward):
    block, x, mask = residual_block(forward=forward).eval(), torch.randn(4, 6), torch.ones(6)
    with_mask, without, left_out = (
        memcnn.to_reversible([block], x, kwargs, measure=False)[0] for kwargs in ({"mask": mask}, {"mask": None}, {})
    )
    for stack, kwargs in ((with_mask, {"mask": mask}), (without, {"mask": None}), (without, {}), (left_out, {})):
        assert relative_error(stack(x, **kwargs), block(x, **kwargs)) <= tolerance(x.dtype, depth=2)
    for kwargs in ({"mask": None}, {}):
        with pytest.raises(TypeError, match="'mask' is None or missing in this call, but Block was made .* a value"):
            with_mask(x, **kwargs)
    with pytest.raises(TypeError, match="'mask' is not None in this call, but Block was made reversible with None"):
        without(x, mask=mask)
    assert torch.equal(left_out(x, mask=None), left_out(x)), "the default"
    with pytest.raises(TypeError, match="has the keyword argument 'mask', but Block was made reversible without it"):
        left_out(x, mask=mask)


def test_a_keyword_argument_that_one_mode_uses_is_taken_in_both():
    def forward(self, x, mask):
        return x + self.function(x * mask if self.training else x)

    block, x, mask = residual_block(forward=forward), torch.randn(4, 6), torch.arange(6.0)
    stack, _ = memcnn.to_reversible([block], x, {"mask": mask}, measure=False)
    assert relative_error(stack.eval()(x, mask=mask), block.eval()(x, mask)) <= tolerance(x.dtype, depth=2)


def test_a_pickle_of_an_earlier_commit_is_read():
    stack, x = convert(Residual(p=0.0)).eval(), torch.randn(4, 6)
    other = copy.deepcopy(stack)
    del other.parts[0].calls, other.positional
    coupling = other.parts[0].chain[0]._fn
    state = coupling.Fm.__getstate__() | {"keywords": frozenset()}
    del state["recorded_call"]
    coupling.Fm = RecordedFunction.__new__(RecordedFunction)
    coupling.Fm.__setstate__(state)
    assert coupling.Fm.keywords_taken(["mask"]) == set()
    assert torch.equal(pickle.loads(pickle.dumps(other))(x), stack(x))
