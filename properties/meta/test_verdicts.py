"""The checks call no correct block wrong, however badly conditioned it is: here they judge drawn networks, whose
gradients ``properties/laws`` compares with those of their twins."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, example, given
from torch import Tensor, nn

from memcnn import AffineAdapterNaive, AffineCoupling
from memcnn.testing import Report, check_gradients, check_inverse, check_log_det, check_state
from memcnn.testing.cases import Block, Branch, Chain, Network, Values
from memcnn.testing.strategies import networks


def naive(*last: str, seed: int = 7711) -> Network:
    """Return two blocks that scale by exponentials of a hundred and more."""
    half, G = (2, 2), ("linear", *last)
    block = Block("affine naive", (2, 4), Branch(half, ("linear",)), Branch(half, G), split_dim=-1)
    return Network(Chain((block, block), "only invertible"), Values((2, 4), torch.float64, seed), training=False)


def nested() -> Network:
    """Return nested blocks, in which a learned factor has a gradient of 1.4e-5 while the largest gradient is 1."""
    one, F, G = (1, 1, 1), ("conv 1",), ("conv 3", "sigmoid")
    inner = Chain(
        (
            Block("affine sigmoid", (2, 1, 1), Branch(one, F, 0), Branch(one, G, 0), 0),
            Block("additive", (2, 1, 1), Branch(one, ("conv 1", "gelu")), Branch(one, F), 0),
        ),
        "by hand",
    )
    outer = Block(
        "affine sigmoid",
        (2, 2, 1),
        Branch((2, 1, 1), ("conv 1", "gelu"), 1),
        Branch((2, 1, 1), ("conv 1", "elu in place", inner), 1),
    )
    return Network(Chain((outer,), "only invertible"), Values((2, 2, 1), seed=2))


@given(networks(autocast=(False,)))
@example(nested())  # two finite differences agreed by chance, in rounding, and were preferred to better ones
@example(naive("relu"))  # forward(inverse(y)) was wrong where the inverse had divided by a scale that is infinite
@example(naive())  # the condition number was 1 where a small change in y has no finite inverse
def test_no_drawn_network_is_called_wrong(network: Network):
    """Networks whose inverse overflows are left out: they do not invert, and the checks rightly fail them."""
    module, x = network.build(), network.input.build().contiguous()
    with torch.no_grad():
        y = module(x)
        assume(y.isfinite().all() and module.inverse(y).isfinite().all())
    module = network.build()  # a new one, whose layers have not initialised themselves yet
    report = check_inverse(module, x) + check_gradients(module, x)
    assert report.passed, report


def scaled_by(log_scale: float) -> nn.Module:
    """Return an affine coupling whose branches return almost exactly ``log_scale`` for every input."""

    def branch() -> nn.Module:
        linear = nn.Linear(2, 2)
        nn.init.constant_(linear.bias, log_scale)
        nn.init.normal_(linear.weight, std=1e-3)
        return linear

    return AffineCoupling(branch(), branch(), AffineAdapterNaive).double()


def checked(log_scale: float, check: Callable[..., Report]) -> Report:
    torch.manual_seed(0)
    return check(scaled_by(log_scale), torch.randn(3, 4, dtype=torch.float64))


@pytest.mark.parametrize("check", [check_inverse, check_gradients, check_log_det])
def test_a_claim_is_undecided_where_rounding_may_be_as_large_as_the_values(check):
    assert not any(result.skipped for result in checked(-3.0, check))
    hopeless = checked(-40.0, check)
    assert hopeless.passed
    undecided = [r for r in hopeless if r.skipped.startswith("rounding may be as large as the values: the condition")]
    assert undecided, hopeless
    summary = (hopeless + checked(-40.0, check_state)).summary()
    holds, rest = summary.split("; undecided: ")
    assert holds.startswith("everything that could be checked holds: ") and holds.endswith("state"), summary
    assert undecided[0].claim in rest, summary


def test_a_wrong_inverse_is_reported_in_a_badly_conditioned_block_too():
    class Wrong(nn.Module):
        def __init__(self):
            super().__init__()
            self.coupling = scaled_by(-6.0)

        def forward(self, x):
            return self.coupling(x)

        def inverse(self, y):
            return 1.0001 * self.coupling.inverse(y)

    assert not check_inverse(Wrong(), torch.randn(3, 4, dtype=torch.float64)).passed


class Identity(nn.Module):
    """The identity. Its inverse returns ``undone(y, x)``, where x is the last input of forward."""

    def __init__(self, undone: Callable[[Tensor, Tensor], Tensor]):
        super().__init__()
        self.undone = undone

    def forward(self, x: Tensor) -> Tensor:
        self.x = x.detach().clone()
        return x

    def inverse(self, y: Tensor) -> Tensor:
        return self.undone(y, self.x)


def refused(y: Tensor, x: Tensor) -> Tensor:
    if not torch.equal(y, x):
        raise ValueError("another y")
    return 1.1 * y


def finite_within(distance: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Return an inverse that is off by 1e-9, and infinite for a y further than ``distance`` from x."""
    return lambda y, x: (1 + 1e-9) * y if (y - x).abs().max() <= distance else torch.full_like(y, torch.inf)


@pytest.mark.parametrize(
    "undone",
    [lambda y, x: y / 0, refused, finite_within(1e-9)],
    ids=["not finite", "refuses all other values", "not finite far off"],
)
def test_an_inverse_whose_conditioning_cannot_be_measured_is_not_excused(undone):
    result = check_inverse(Identity(undone), torch.randn(3, 4, dtype=torch.float64)).results[0]
    assert result.failed, result


def test_where_every_other_value_has_no_finite_inverse_the_condition_number_is_infinite():
    result = check_inverse(Identity(finite_within(0.0)), torch.randn(3, 4, dtype=torch.float64)).results[0]
    assert result.skipped.endswith("are not finite once they are rounded"), result
