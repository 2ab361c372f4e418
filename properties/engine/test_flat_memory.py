"""Cases of memory that the law does not draw: exact blocks by hand, dropout, and tensors held between passes."""

import gc
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from memcnn import AdditiveCoupling, InvertibleModuleWrapper, ReversibleSequential
from memcnn.engine import retained
from memcnn.engine.chain import Value
from properties.support.held import held_bytes, living
from properties.support.memory import step_bytes
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

MAP_BYTES = 4 * 8 * 16 * 16 * 4


def with_dropout() -> nn.Module:
    return nn.Sequential(conv_branch(4), nn.Dropout(0.3))


def plain() -> nn.Module:
    return conv_branch(4)


def wrapped(depth: int, branch=plain, kind=lambda coupling: coupling, **options) -> nn.Module:
    couplings = (kind(AdditiveCoupling(branch(), branch(), **options)) for _ in range(depth))
    return nn.Sequential(*map(InvertibleModuleWrapper, couplings))


def exact_sequence(depth: int) -> nn.Module:
    return ReversibleSequential(*(block._fn for block in wrapped(depth)), exact=True)


@pytest.mark.parametrize(
    "chain",
    [
        partial(wrapped, exact=True),
        exact_sequence,
        partial(wrapped, branch=with_dropout),
        partial(wrapped, kind=OnlyInvertible),
        partial(wrapped, split_dim=-3),
    ],
    ids=["exact", "exact sequence", "dropout", "modules", "negative split_dim"],
)
def test_a_further_block_stores_no_map(chain):
    stored = (step_bytes(plain_twin(chain(6))) - step_bytes(plain_twin(chain(2)))) / 4
    assert stored > 2 * MAP_BYTES
    assert (step_bytes(chain(24)) - step_bytes(chain(4))) / 20 < stored / 100


def test_between_forward_and_backward_a_chain_holds_its_output_alone():
    gc.collect()
    x = torch.randn(4, 8, 16, 16).requires_grad_()
    for chain in (wrapped(6), wrapped(6, exact=True), exact_sequence(6), wrapped(6, kind=OnlyInvertible)):
        y = chain(x)
        held = {cell.tensor.untyped_storage()._cdata for cell in living(Value) if cell.tensor is not None}
        assert held == {y.untyped_storage()._cdata}
        assert held_bytes() == y.untyped_storage().nbytes() == MAP_BYTES
        del y
        assert held_bytes() == 0


def test_couplings_and_other_modules_in_turn_hold_the_output_alone():
    def modules() -> list[nn.Module]:
        return [block(), InvertibleModuleWrapper(OnlyInvertible(block()._fn))]

    chain = nn.Sequential(*modules(), *modules())
    before = held_bytes()
    y = chain(images())
    assert held_bytes() - before == y.untyped_storage().nbytes()


def test_a_retained_graph_holds_as_much_after_a_pass_as_before():
    chain = wrapped(2 * retained.KEPT_LINKS)
    gc.collect()
    loss = weighted_sum(chain(torch.randn(4, 8, 16, 16).requires_grad_()))
    before = held_bytes()
    loss.backward(retain_graph=True)
    assert not retained.passes
    assert held_bytes() == before == MAP_BYTES
    loss.backward()
    assert held_bytes() == 0


@pytest.mark.parametrize(
    "view",
    [lambda x: x.transpose(2, 3)[:, :, ::2], lambda x: x[:, :1].expand(-1, 6, -1, -1)],
    ids=["strided", "expanded"],
)
def test_an_input_with_gaps_or_overlaps_is_given_its_gradient(view):
    def program(module, x: Tensor) -> Tensor:
        y = module(view(x))
        weighted_sum(y).backward()
        return y

    for module in (block(), InvertibleModuleWrapper(OnlyInvertible(block()._fn))):
        assert_like_twin(nn.Sequential(module, block()), program, images(2, 6, 5, 4))


def test_a_pass_that_retains_its_graph_keeps_the_tensors_of_the_last_links_and_no_more():
    chain = wrapped(2 * retained.KEPT_LINKS)
    x = images(2, 8, 5, 4, dtype=torch.float32)
    kept = []
    x.register_hook(lambda _: kept.extend(len(links) for links in retained.passes.values()))
    weighted_sum(chain(x)).backward(retain_graph=True)
    assert kept == [retained.KEPT_LINKS]
