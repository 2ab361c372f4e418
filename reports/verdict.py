"""The rule that decides whether runs reproduce a published accuracy.

A published accuracy is a single number without a spread, so we take it as the result of one training run, and ask
whether it could have been one more run of ours. The answer is the 95 % prediction interval for one further run, from n
runs with mean m and sample standard deviation s,

    m +- t(0.975, n - 1) * s * sqrt(1 + 1 / n),

under the usual assumption that the accuracies of different seeds are normally distributed. (A confidence interval of
the mean answers another question. It would reject a perfect reproduction more often with every further run.)

* Fewer than ``LEAST_RUNS`` runs: "not enough runs", because their spread is hardly known.
* The published value lies outside the interval, allowing for its rounding: "differs", in either direction.
* It lies inside, but the interval extends further than ``WIDEST_POINTS`` to each side: "not enough runs". That is about
  the distance between the weakest and the strongest model on CIFAR-10. Such an interval would contain almost any value,
  and a difference that cannot be seen is no reproduction.
* It lies inside, and the interval is no wider: "reproduced".

Of twelve perfectly reproduced cells, 0.6 are expected to be called "differs" by chance.
"""

import math

from scipy.special import stdtrit  # scipy.stats.t.ppf is the same, but takes a second to import

REPRODUCED, DIFFERS, NOT_ENOUGH = "reproduced", "differs", "not enough runs"

LEAST_RUNS = 3
WIDEST_POINTS = 2.0  # percentage points, either side of the mean
ROUNDING_POINTS = 0.005  # published accuracies have two decimals


def half_width(n: int, sd: float) -> float:
    """Return half the 95 % prediction interval for one further run, in the unit of ``sd``; NaN for too few runs."""
    if n < LEAST_RUNS:
        return math.nan
    return float(stdtrit(n - 1, 0.975)) * sd * math.sqrt(1 + 1 / n)


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
