"""Couplings and chains hand keyword arguments to the branches that take them."""

import pytest
import torch
from torch import Tensor, nn

from memcnn import (
    ActNorm,
    AdditiveCoupling,
    AffineAdapterExp,
    AffineAdapterNaive,
    AffineAdapterSigmoid,
    AffineCoupling,
    InvertibleModuleWrapper,
    ReversibleSequential,
)
from properties.support.blocks import net, refused, rows, wrapped
from properties.support.twin import OnlyInvertible, assert_like_twin, block, weighted_sum

pytestmark = pytest.mark.usefixtures("on_device")


class Attention(nn.Module):
    """Takes a mask, and a condition with a gradient."""

    def __init__(self, out: int = 3):
        super().__init__()
        self.linear, self.condition = nn.Linear(3, out), nn.Linear(2, out)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, condition: dict | None = None) -> Tensor:
        h = self.linear(x)
        if condition is not None:
            h = h + self.condition(condition["on"]).tanh()
        return (h if mask is None else h.masked_fill(mask, -3.0)).tanh()


def additive() -> nn.Module:
    return AdditiveCoupling(Attention(), net())


def affine(adapter, out: int):
    return lambda: AffineCoupling(Attention(out), nn.Sequential(nn.Linear(3, out), nn.Tanh()), adapter)


COUPLINGS = {
    "additive": additive,
    "affine, naive": affine(AffineAdapterNaive, 3),
    "affine, sigmoid": affine(AffineAdapterSigmoid, 6),
    "affine, exp": affine(AffineAdapterExp, 6),
}
CHAINS = {
    "blocks": lambda make: [wrapped(make()) for _ in range(3)],
    "keep_input": lambda make: [wrapped(make(), keep_input=True) for _ in range(3)],
    "sequence": lambda make: [ReversibleSequential(*(make() for _ in range(3))).double()],
    "sequence with other modules": lambda make: [
        ReversibleSequential(ActNorm(6), make(), InvertibleModuleWrapper(make()), ReversibleSequential(make())).double()
    ],
    "sequence that keeps some": lambda make: [ReversibleSequential(*(make() for _ in range(3)), keep_every=2).double()],
    "modules": lambda make: [wrapped(OnlyInvertibleWithKeywords(make())) for _ in range(2)],
}


class OnlyInvertibleWithKeywords(OnlyInvertible):
    def forward(self, x, **kwargs):
        return self.coupling(x, **kwargs)

    def inverse(self, y, **kwargs):
        return self.coupling.inverse(y, **kwargs)


def conditioned(run):
    def program(chain: nn.Module, x: Tensor, given: Tensor) -> Tensor:
        condition = {"on": given.sin()}
        for module in chain:
            x = run(module)(x, mask=given[:, :1] > 0, condition=condition)
        weighted_sum(x).backward()
        return x

    return program


@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("kind", COUPLINGS)
@pytest.mark.parametrize("chain", CHAINS)
def test_couplings_hand_keyword_arguments_to_the_branches_that_take_them(chain, kind, direction):
    torch.manual_seed(0)
    module = nn.ModuleList(CHAINS[chain](COUPLINGS[kind]))
    if chain == "sequence with other modules":
        with torch.no_grad():
            module[0](rows())  # initialises the ActNorm
    program = conditioned(lambda m: m if direction == "forward" else m.inverse)
    assert_like_twin(module, program, rows() / 2, rows(4, 2))


@pytest.mark.parametrize("kind", COUPLINGS)
def test_keyword_arguments_are_undone_by_the_inverse_and_reach_the_log_determinant(kind):
    module = ReversibleSequential(*(COUPLINGS[kind]() for _ in range(2))).double()
    x, keywords = rows() / 2, {"condition": {"on": rows(4, 2)}}
    y, log_det = module.forward_log_det(x, **keywords)
    back, inverse_log_det = module.inverse_log_det(y, **keywords)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(inverse_log_det, -log_det)
    torch.testing.assert_close(y, module(x, **keywords))
    assert not torch.allclose(y, module(x))


@pytest.mark.parametrize(
    "make",
    [
        lambda: block(net),
        lambda: ReversibleSequential(block(Attention), block(net)),
        lambda: wrapped(COUPLINGS["affine, exp"]()),
    ],
    ids=["coupling", "sequence", "adapter"],
)
def test_a_keyword_argument_that_no_branch_takes_is_refused(make):
    with refused(TypeError, "has no branch whose forward takes the keyword argument 'masc'", "correct its name"):
        make()(rows(), masc=1)


def test_a_keyword_argument_that_changes_before_backward_is_noticed():
    condition = {"on": rows(4, 2).detach()}
    loss = weighted_sum(block(Attention)(rows(), condition=condition))
    condition["on"].mul_(2)
    with refused(RuntimeError, "an argument of Attention, shape (4, 2), was modified in place between"):
        loss.backward()
