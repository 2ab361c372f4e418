"""The rule by which runs reproduce a published accuracy, and the reason for it.

The published accuracies are single numbers without a spread, so each is taken as the outcome of one training run. The
question that fits is then: could that number have been one more run of ours? The answer is the 95 % prediction interval
for one further run, from n runs with mean m and sample standard deviation s,

    m +- t(0.975, n - 1) * s * sqrt(1 + 1 / n),

under the usual assumption that runs with different seeds scatter normally. (A confidence interval of the mean answers
another question, and would reject a perfect reproduction more often the more runs one adds.)

* fewer than `LEAST_RUNS` runs: `not enough runs`, since the spread itself is then hardly known;
* published value outside the interval, allowing for its rounding: `differs`, in whichever direction;
* inside, but the interval reaches further than `WIDEST_POINTS` to each side: `not enough runs`. That is about the
  distance between the weakest and the strongest model on CIFAR-10, so such an interval would welcome almost any value,
  and failing to see a difference must not pass for a reproduction;
* inside, and no wider than that: `reproduced`.

Of twelve perfectly reproduced cells, 0.6 are expected to say `differs` by chance.
"""

import math

REPRODUCED, DIFFERS, NOT_ENOUGH = "reproduced", "differs", "not enough runs"

LEAST_RUNS = 3
WIDEST_POINTS = 2.0  # percentage points, either side of the mean
ROUNDING_POINTS = 0.005  # published accuracies have two decimals

# Student's t, two-sided 95 %, by degrees of freedom; beyond 30 the last value serves, which is at most 4.2 % too wide.
# Source: NIST/SEMATECH e-Handbook of Statistical Methods, section 1.3.6.7.2.
T_975 = {
    2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228,
    11: 2.201, 12: 2.179, 13: 2.160, 14: 2.145, 15: 2.131, 16: 2.120, 17: 2.110, 18: 2.101, 19: 2.093, 20: 2.086,
    21: 2.080, 22: 2.074, 23: 2.069, 24: 2.064, 25: 2.060, 26: 2.056, 27: 2.052, 28: 2.048, 29: 2.045, 30: 2.042,
}  # fmt: skip


def half_width(n: int, sd: float) -> float:
    """Return half the 95 % prediction interval for one further run, in the unit of ``sd``; NaN for too few runs."""
    if n < LEAST_RUNS:
        return math.nan
    return T_975[min(n - 1, 30)] * sd * math.sqrt(1 + 1 / n)


def verdict(n: int, mean: float, sd: float, published: float) -> str:
    """Return "reproduced", "differs" or "not enough runs"; see the module for the rule.

    Args:
        n: number of runs.
        mean: their mean accuracy, in per cent.
        sd: their sample standard deviation, in percentage points.
        published: the published accuracy, in per cent.
    """
    if n < LEAST_RUNS:
        return NOT_ENOUGH
    half = half_width(n, sd)
    if abs(published - mean) > half + ROUNDING_POINTS:
        return DIFFERS
    return REPRODUCED if half <= WIDEST_POINTS else NOT_ENOUGH
