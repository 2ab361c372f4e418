"""Blocks within blocks: the inner blocks rebuild their activations from values that the outer block rebuilds."""

import gc
import itertools
from collections import Counter
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from memcnn import AdditiveCoupling, ChannelPermutation, InvertibleModuleWrapper, ReversibleSequential
from memcnn.engine.retained import KEPT_LINKS
from properties.support.held import held_bytes
from properties.support.twin import (
    Container,
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


def dropping(channels: int) -> nn.Module:
    return nn.Sequential(conv_branch(channels), nn.Dropout(0.4))


def inner(branch=conv_branch, **options) -> InvertibleModuleWrapper:
    return InvertibleModuleWrapper(AdditiveCoupling(branch(2), branch(2)), **options)


def around(*modules: nn.Module) -> nn.Module:
    """Return a branch for three channels; ``inner`` inside it has four."""
    return nn.Sequential(nn.Conv2d(3, 4, 1), *modules, nn.Conv2d(4, 3, 1))


def container(*blocks: nn.Module) -> Container:
    return Container(blocks[0], ChannelPermutation([3, 0, 2, 1]), *blocks[1:])


class TwoWays(nn.Module):
    """Passes one tensor to two blocks."""

    def __init__(self, **options):
        super().__init__()
        self.one, self.other = inner(**options), inner(**options)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) * self.other(x)


class Ignoring(nn.Module):
    """Computes a block and does not use its output."""

    def __init__(self):
        super().__init__()
        self.block = inner()

    def forward(self, x: Tensor) -> Tensor:
        self.block(x)
        return x.tanh()


NESTED = {
    "a block": inner,
    "an inner input kept": partial(inner, keep_input=True),
    "dropout": partial(inner, dropping),
    "a module": lambda: InvertibleModuleWrapper(OnlyInvertible(inner()._fn)),
    "a chain": lambda: ReversibleSequential(*(inner() for _ in range(KEPT_LINKS))),
    "a chain, every third block stored": lambda: ReversibleSequential(*(inner() for _ in range(4)), keep_every=3),
    "blocks, a permutation between": lambda: container(inner(), inner()),
    "a wrapped container": lambda: InvertibleModuleWrapper(container(inner(), inner(keep_input=True))),
    "two levels": lambda: InvertibleModuleWrapper(
        AdditiveCoupling(nn.Sequential(nn.Conv2d(2, 4, 1), inner(), nn.Conv2d(4, 2, 1)), conv_branch(2))
    ),
    "two blocks of one tensor": TwoWays,
    "two blocks of one tensor, inputs kept": partial(TwoWays, keep_input=True),
    "a block ignored": Ignoring,
    "a checked inverse": partial(inner, check_inverse=1e-6),
    "a disabled block": partial(inner, disable=True),
}
OUTER = {
    "in couplings": lambda make: nn.Sequential(*(block(lambda: around(make())) for _ in range(2))),
    "in a sequence": lambda make: ReversibleSequential(
        *(AdditiveCoupling(around(make()), conv_branch()) for _ in range(2))
    ),
    "in modules": lambda make: nn.Sequential(
        *(InvertibleModuleWrapper(OnlyInvertible(AdditiveCoupling(around(make()), conv_branch()))) for _ in range(2))
    ),
    "inputs kept": lambda make: nn.Sequential(*(block(lambda: around(make()), keep_input=True) for _ in range(2))),
}


def retained(module: nn.Module, x: Tensor) -> list[Tensor]:
    y = module(x)
    y.square().sum().backward(retain_graph=True)
    weighted_sum(y).backward()
    return [y]


def one_by_one(module: nn.Module, x: Tensor) -> list[Tensor]:
    """Compute the gradient of one parameter at a time, from the first to the last."""
    loss = weighted_sum(module(x))
    return list(torch.autograd.grad(loss, x, retain_graph=True)) + [
        gradient for p in module.parameters() for gradient in torch.autograd.grad(loss, p, retain_graph=True)
    ]


@pytest.mark.parametrize("outer", OUTER)
@pytest.mark.parametrize("nested", NESTED)
def test_nested_blocks_are_the_twins(nested, outer):
    torch.manual_seed(0)
    assert_like_twin(OUTER[outer](NESTED[nested]).double(), retained, images(2, 6, 5, 4), depth=16)


@pytest.mark.parametrize(
    ("make", "channels"),
    [
        (lambda: block(inner), 8),
        (lambda: block(NESTED["a module"]), 8),
        (lambda: InvertibleModuleWrapper(container(inner(), inner())).double(), 4),
    ],
    ids=["in a coupling", "a module in a coupling", "in a container"],
)
def test_what_is_around_a_nested_block_need_not_save_anything(make, channels):
    torch.manual_seed(0)
    assert_like_twin(nn.Sequential(make(), make()), retained, images(2, channels, 5, 4), depth=16)


@pytest.mark.parametrize("nested", ["a block", "blocks, a permutation between", "two levels"])
def test_gradients_may_be_asked_for_in_any_order(nested):
    torch.manual_seed(0)
    assert_like_twin(OUTER["in couplings"](NESTED[nested]).double(), one_by_one, images(2, 6, 5, 4), depth=16)


@pytest.mark.parametrize(
    "outer", [InvertibleModuleWrapper, partial(InvertibleModuleWrapper, keep_input=True)], ids=["rebuilt", "input kept"]
)
@pytest.mark.parametrize("program", [backward, retained])
@pytest.mark.parametrize(
    "blocks",
    [
        lambda: [inner()],
        lambda: [inner(keep_input=True), inner()],
        lambda: [inner(), inner(), inner()],
        lambda: [InvertibleModuleWrapper(OnlyInvertible(inner()._fn)), inner()],
    ],
    ids=["one", "the first input kept", "three", "a module"],
)
def test_a_container_of_wrapped_blocks_may_be_wrapped_too(blocks, program, outer):
    torch.manual_seed(0)
    chain = nn.Sequential(*(outer(container(*blocks())) for _ in range(3))).double()
    assert_like_twin(chain, program, images(2, 4, 5, 4), depth=16)


@pytest.mark.parametrize("channels", [6, 8])
def test_the_output_of_a_wrapped_container_is_halved_whatever_its_width(channels):
    blocks = [block(partial(conv_branch, channels // 2)) for _ in range(2)]
    assert_like_twin(InvertibleModuleWrapper(Container(*blocks)), backward, images(2, channels, 5, 4), depth=8)


def test_a_wrapped_container_of_one_block_costs_no_further_evaluation():
    wrapped = inner()
    calls = Counter()
    for branch in (wrapped._fn.Fm, wrapped._fn.Gm):
        convolve = branch[0].forward
        branch[0].forward = lambda x, convolve=convolve: calls.update(["convolution"]) or convolve(x)
    chain = nn.Sequential(InvertibleModuleWrapper(Container(wrapped)), inner())
    weighted_sum(chain(torch.randn(2, 4, 5, 4).requires_grad_())).backward()
    assert calls["convolution"] == 2 + 2  # F and G, forward and backward


def test_nested_blocks_hold_nothing_between_forward_and_backward():
    gc.collect()
    before = held_bytes()
    chain = nn.Sequential(*(block(lambda: around(inner())) for _ in range(3)))
    y = chain(images(2, 6, 5, 4))
    assert held_bytes() - before == y.untyped_storage().nbytes()
    weighted_sum(y).backward()
    del y
    assert held_bytes() == before


def test_two_long_chains_behind_one_block_are_differentiated_with_their_graph_kept():
    """Each has more steps than a retained pass keeps values of, and the block needs the ends of both."""

    class Twin(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = InvertibleModuleWrapper(Two())
            self.chains = nn.ModuleList(nn.Sequential(*(inner() for _ in range(KEPT_LINKS))) for _ in range(2))

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            y, z = self.first(a.sin(), b.sin())
            return self.chains[0](y) * self.chains[1](z)

    def program(module, a, b):
        y = module(a, b)
        y.sum().backward(retain_graph=True)
        weighted_sum(y).backward()
        return y

    assert_like_twin(Twin().double(), program, images(2, 4, 5, 4), images(2, 4, 5, 4, seed=1), depth=32)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.branch = conv_branch(4)

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return a + self.branch(b), 2 * b

    def inverse(self, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        return y - self.branch(z / 2), z / 2


@pytest.mark.parametrize(
    "outer",
    [lambda branch: block(lambda: around(branch)), InvertibleModuleWrapper],
    ids=["in a coupling", "in a module"],
)
def test_an_inner_output_modified_in_place_is_noticed(outer):
    class Negated(Container):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).neg_()

        def inverse(self, y: Tensor) -> Tensor:
            return super().inverse(-y)

    module = outer(Negated(inner())).double()
    x = images(2, 6 if outer is not InvertibleModuleWrapper else 4, 5, 4)
    plain_twin(module)(x).sum().backward()
    y = module(x)
    with pytest.raises(RuntimeError, match="modified in place after the forward pass"):
        y.sum().backward()


def test_a_nested_block_that_does_not_run_again_is_an_error():
    class AtFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.calls = inner(), itertools.count(1)  # a flag would be set back

        def forward(self, x: Tensor) -> Tensor:
            return (self.block if next(self.calls) == 1 else nn.Identity())(x).tanh()

    y = block(lambda: around(AtFirst()))(images(2, 6, 5, 4))
    with pytest.raises(RuntimeError, match="something else in the recomputation .* of nested blocks then, 0 now"):
        y.sum().backward()
