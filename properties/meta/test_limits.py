"""The limits of errors: what the condition number counts, what it excuses, and how drawn networks are judged by it."""

import math
from itertools import islice, repeat
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from memcnn.testing import Report, Result
from memcnn.testing.cases import Block, Branch, Chain, Network, Values
from memcnn.testing.laws.limits import Limit
from memcnn.testing.laws.rounding import Rounding, condition_numbers, named
from memcnn.testing.laws.subject import Subject
from memcnn.testing.laws.twin import NamedTensors
from memcnn.testing.tolerances import describe, tolerance
from properties.support.errors import LARGEST, assert_holds, table


def subject_of(network: Network) -> Subject:
    return Subject(network.build(), (network.input.build(),))


def chain_of(kind: str, **values) -> Network:
    shape = (2, 4, 3)
    branch = Branch((2, 2, 3), ("linear", "tanh"), doubled=1 if "affine" in kind else None)
    return Network(Chain((Block(kind, shape, branch, branch),)), Values(shape, **values), training=False)


def trained(subject: Subject) -> NamedTensors:
    return named(subject.run(subject.trained()))


def trained_by_twin(subject: Subject) -> NamedTensors:
    return named(subject.run(subject.plain()))


def condition_number(*arguments: object, changes: int = 6) -> float:
    """Return the condition number after a number of random changes."""
    return list(islice(condition_numbers(*arguments), changes))[-1]


def amplified(network: Network) -> float:
    return condition_number(subject_of(network), trained, trained_by_twin)


class Scaled(nn.Module):
    """y = (c + x) - c, which loses the digits that c has more than x."""

    def __init__(self, c: float):
        super().__init__()
        self.c = c

    def forward(self, x: Tensor) -> Tensor:
        return (self.c + x) - self.c

    def inverse(self, y: Tensor) -> Tensor:
        return y


@pytest.mark.parametrize("c", [0.0, 1e3, 1e5])
def test_a_condition_number_counts_the_digits_that_an_operation_loses(c: float):
    subject = Subject(Scaled(c), (torch.full((50,), 0.5, dtype=torch.float32),))
    found = condition_number(subject, lambda s: {"y": s.evaluated(s.fresh(), s.inputs)[0]}, changes=3)
    assert max(1, c) <= found <= 4 * max(1, 2 * c)


def test_rounding_leaves_exact_operations_random_numbers_and_generators_alone():
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before = torch.get_rng_state()
    with Rounding(1e-3):
        exact = torch.cat([x, x[1:]]), x.flip(0), x.relu(), x.t()[1], x.clone(), torch.ones(3)
        drawn, product = torch.rand(5), 2 * x
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    assert torch.equal(drawn, torch.rand(5)) and torch.equal(after, torch.get_rng_state())
    wanted = torch.cat([x, x[1:]]), x.flip(0), x.relu(), x.t()[1], x, torch.ones(3)
    assert all(map(torch.equal, exact, wanted))
    changes = (product - 2 * x) / (2 * x)
    assert torch.allclose(changes.abs(), torch.full_like(x, 1e-3)) and changes.sign().unique().numel() == 2


def test_a_condition_number_counts_the_inverses_of_blocks_within_branches():
    def around(kind: str) -> Network:
        inner = Branch((2, 1, 3), ("linear", "tanh"), doubled=1 if "affine" in kind else None)
        outer = Branch((2, 2, 3), (Chain((Block(kind, (2, 2, 3), inner, inner),), "by hand"), "tanh"))
        return Network(Chain((Block("additive", (2, 4, 3), outer, outer),)), Values((2, 4, 3)), training=False)

    assert amplified(around("affine sigmoid")) > 1.5 * amplified(around("additive"))  # it divides by scales below 1


def test_the_condition_number_is_infinite_where_an_intermediate_value_overflows():
    def of(scale: float, dtype: torch.dtype) -> float:
        branch = Branch((2, 2, 3), ("linear",))
        chain = Chain((Block("additive", (2, 4, 3), branch, branch),) * 8)
        return amplified(Network(chain, Values((2, 4, 3), dtype, scale=scale)))

    assert of(1e38, torch.float32) == math.inf
    assert of(1e38, torch.float64) == pytest.approx(of(1.0, torch.float32), rel=0.9)


def test_the_condition_number_is_infinite_where_an_inverse_divides_by_zero():
    branch = Branch((2, 2, 3), ("linear",), doubled=1)
    network = Network(Chain((Block("affine sigmoid", (2, 4, 3), branch, branch),)), Values((2, 4, 3), scale=1000.0))
    assert amplified(network) == math.inf


def test_nan_that_the_twin_does_not_have_does_not_raise_the_condition_number():
    subject = Subject(Scaled(0.0), (torch.randn(2, 3),))
    spoilt = {"gradient": torch.tensor(math.nan)}
    assert condition_number(subject, lambda s: spoilt, trained_by_twin) == 1.0
    assert condition_number(subject, lambda s: spoilt, lambda s: spoilt) == math.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_cast_to_a_lower_precision_is_no_amplification(dtype: torch.dtype):
    class Rounded(Scaled):
        def forward(self, x: Tensor) -> Tensor:
            return x.bfloat16().to(x)

    subject = Subject(Rounded(0.0), (torch.randn(100, dtype=dtype),))
    assert condition_number(subject, lambda s: {"y": s.evaluated(s.fresh(), s.inputs)[0]}) < 100


def judged(error: float, *, depth: int = 1, condition: float = 1.0) -> Result:
    limit = Limit(torch.float32, depth, conditions=repeat(condition))
    return limit.judge("gradients", "a claim", error, "buffer 3")


def test_an_error_beyond_what_rounding_explains_fails_whatever_the_blocks_are():
    limit = tolerance(torch.float32)
    assert judged(2 * limit, condition=21).verdict == "PASS"
    failed = judged(2 * limit, condition=19)
    assert failed.verdict == "FAIL" and failed.explanation == "buffer 3"
    assert judged(2.9 * limit, depth=3).verdict == "PASS"
    assert judged(4 * limit, depth=3).limit == 3 * limit
    assert judged(math.nan).verdict == "FAIL" and judged(math.inf).verdict == "FAIL"
    assert judged(math.nan, condition=math.inf).verdict == "SKIP"


def test_the_table_shows_the_error_closest_to_its_limit():
    network, limit = chain_of("additive"), tolerance(torch.float32)
    with patch.dict(LARGEST):
        assert_holds(Report((judged(0.5 * limit), judged(0.25 * limit))), network, "a law")
        with pytest.raises(AssertionError, match="a claim"):
            assert_holds(Report((judged(math.nan),)), network, "another")
        assert any(line.startswith("a law") and "50.00%" in line for line in table())
        assert any(line.startswith("another") and "nan" in line for line in table())


@given(st.booleans())
def test_an_example_that_cannot_be_decided_does_not_count(hopeless: bool):
    if hopeless:
        assert_holds(Report((judged(0.1, condition=1e9),)), chain_of("additive"), "a law")
        pytest.fail("it counted")


def test_a_limit_says_what_it_consists_of():
    assert describe(torch.float32).endswith(" roundings of float32, 1.2e-07")
    assert describe(torch.float32, depth=3, autocast=torch.bfloat16).endswith("e-07 and 4 of bfloat16, x 3 blocks")
