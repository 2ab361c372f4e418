"""The rule of the verdict: its interval, and the cases of too few runs, too wide an interval, and rounding."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reports.verdict import DIFFERS, LEAST_RUNS, NOT_ENOUGH, REPRODUCED, WIDEST_POINTS, half_width, verdict

percents = st.floats(0, 100)
spreads = st.floats(0, 30)


def probability_within(t: float, degrees: int) -> float:
    """Return P(|T| < t) for Student's distribution, by Simpson's rule on its density."""
    scale = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(degrees * math.pi)
    x = np.linspace(-t, t, 4001)
    density = scale * (1 + x**2 / degrees) ** (-(degrees + 1) / 2)
    weights = np.ones_like(x)
    weights[1:-1:2], weights[2:-1:2] = 4, 2
    return float((weights * density).sum() * (x[1] - x[0]) / 3)


@pytest.mark.parametrize("n", [*range(LEAST_RUNS, 32), 100])
def test_the_interval_leaves_five_per_cent_of_further_runs_outside(n):
    t = half_width(n, 1.0) / math.sqrt(1 + 1 / n)
    assert probability_within(t, n - 1) == pytest.approx(0.95, abs=1e-6)


def test_the_interval_of_92_93_94_is_as_computed_by_hand():
    # mean 93, sd 1, t(2) = 4.302653: 4.302653 * sqrt(4 / 3) = 4.96828
    assert half_width(3, 1.0) == pytest.approx(4.96828, abs=1e-5)
    # n = 5, sd 0.2, t(4) = 2.776445: 2.776445 * 0.2 * sqrt(1.2) = 0.6082887
    assert half_width(5, 0.2) == pytest.approx(0.6082887, abs=1e-6)


def test_one_reproduction_in_twenty_is_called_different():
    random, draws = np.random.default_rng(0), 20_000
    for n in (3, 5):
        runs = random.normal(70, 0.2, (draws, n))
        published = random.normal(70, 0.2, draws)
        cells = zip(runs.mean(1), runs.std(1, ddof=1), published, strict=True)
        differs = sum(verdict(n, mean, sd, value) == DIFFERS for mean, sd, value in cells)
        assert 0.044 < differs / draws < 0.053


@pytest.mark.parametrize(
    ("published", "said"),
    [(93.0, REPRODUCED), (92.41, REPRODUCED), (93.6, REPRODUCED), (92.3, DIFFERS), (93.7, DIFFERS)],
)
def test_five_runs_of_93_with_sd_02_judge_a_published_value(published, said):
    assert verdict(5, 93.0, 0.2, published) == said


@given(n=st.integers(0, LEAST_RUNS - 1), mean=percents, sd=spreads, published=percents)
def test_fewer_than_three_runs_are_not_enough(n, mean, sd, published):
    assert verdict(n, mean, sd, published) == NOT_ENOUGH
    assert math.isnan(half_width(n, sd))


@given(n=st.integers(LEAST_RUNS, 40), mean=percents, sd=spreads, share=st.floats(-0.99, 0.99))
def test_an_interval_too_wide_to_tell_models_apart_never_reproduces(n, mean, sd, share):
    half = half_width(n, sd)
    said = verdict(n, mean, sd, mean + share * half)
    assert said == (REPRODUCED if half <= WIDEST_POINTS else NOT_ENOUGH)


@given(n=st.integers(LEAST_RUNS, 40), mean=percents, sd=spreads, beyond=st.floats(0.01, 50))
def test_a_published_value_outside_the_interval_differs_in_either_direction(n, mean, sd, beyond):
    for sign in (-1, 1):
        assert verdict(n, mean, sd, mean + sign * (half_width(n, sd) + beyond)) == DIFFERS


def test_a_value_rounded_to_two_decimals_is_not_held_against_equal_runs():
    assert verdict(3, 92.704, 0.0, 92.70) == REPRODUCED
    assert verdict(3, 92.71, 0.0, 92.70) == DIFFERS


@given(n=st.integers(LEAST_RUNS, 60), sd=st.floats(0.01, 5))
def test_more_runs_narrow_the_interval(n, sd):
    assert half_width(n + 1, sd) < half_width(n, sd)
