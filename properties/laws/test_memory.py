"""The law of memory: a chain of reversible blocks needs the same activations at any depth, however it is composed."""

from collections.abc import Callable
from functools import partial

import pytest
from torch import nn

from memcnn import AdditiveCoupling, ChannelPermutation, InvertibleModuleWrapper, ReversibleSequential
from memcnn.testing import Inverted, check_memory
from memcnn.testing.laws.memory import SHARE
from properties.support.memory import maps
from properties.support.twin import Container, OnlyInvertible, conv_branch, plain_twin

pytestmark = pytest.mark.usefixtures("on_device")


def with_a_block_inside(branch: nn.Module) -> nn.Module:
    return nn.Sequential(branch, InvertibleModuleWrapper(AdditiveCoupling(conv_branch(2))), nn.Tanh())


COMPOSITIONS = {
    "ReversibleSequential of couplings": lambda couplings: ReversibleSequential(*couplings),
    "nn.Sequential of wrapped blocks": lambda couplings: nn.Sequential(*map(InvertibleModuleWrapper, couplings)),
    "wrapped blocks with an inverse": lambda couplings: Container(*map(InvertibleModuleWrapper, couplings)),
    "modules with forward and inverse": lambda couplings: ReversibleSequential(*map(OnlyInvertible, couplings)),
    "blocks nested in branches": lambda couplings: ReversibleSequential(
        *(AdditiveCoupling(with_a_block_inside(c.Fm), with_a_block_inside(c.Gm)) for c in couplings)
    ),
    "wrapped containers of wrapped blocks": lambda couplings: nn.Sequential(
        *(
            InvertibleModuleWrapper(
                Container(
                    InvertibleModuleWrapper(c),
                    ChannelPermutation([7, 2, 1, 0, 6, 3, 5, 4]),
                    InvertibleModuleWrapper(AdditiveCoupling(conv_branch(4))),
                )
            )
            for c in couplings
        )
    ),
    "couplings that split by turns": lambda couplings: ReversibleSequential(
        *(
            AdditiveCoupling(c.Fm, c.Gm, split_dim=2 if i % 2 else 1)
            if i % 2 == 0
            else AdditiveCoupling(conv_branch(8), split_dim=2)
            for i, c in enumerate(couplings)
        )
    ),
}


def chain_of(composition: str, depth: int) -> nn.Module:
    return COMPOSITIONS[composition]([AdditiveCoupling(conv_branch(4), conv_branch(4)) for _ in range(depth)])


def assert_holds(make: Callable[[int], nn.Module], **options) -> None:
    """Assert the law without any allowance, and that its limit comes from a twin that stores two whole maps a block."""
    chain = make(1)
    block = chain if hasattr(chain, "inverse") else chain[0]
    report = check_memory(block, maps(), chain=make, allowance=0, **options)
    assert report.passed, report
    (result,) = report
    assert not result.skipped and result.limit > SHARE * 2 * maps().nbytes, report


@pytest.mark.parametrize("composition", COMPOSITIONS)
def test_a_further_block_costs_less_than_a_hundredth_of_its_activations(composition):
    assert_holds(partial(chain_of, composition), depths=(4, 64))


def test_a_retained_graph_is_flat_in_depth_too():
    assert_holds(partial(chain_of, "nn.Sequential of wrapped blocks"), depths=(8, 24), passes=2)


def test_training_through_the_inverse_is_as_flat():
    assert_holds(lambda depth: Inverted(chain_of("wrapped blocks with an inverse", depth)), depths=(4, 32))


def test_disabled_blocks_break_the_law():
    """The plain twin is no reversible block in disguise, and the meter sees what is stored."""

    def plain(depth: int) -> nn.Module:
        return plain_twin(chain_of("ReversibleSequential of couplings", depth))

    report = check_memory(plain(1), maps(), chain=plain, depths=(4, 16))
    assert report.failed_laws == {"memory"} and report.results[0].error > 2 * maps().nbytes, report
