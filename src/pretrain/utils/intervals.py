"""Confidence intervals of the mean of a few values (Student, 1908), in plain Python without a numerical library."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable

from pretrain.errors import ConfigError, DataError

__all__ = ["mean_interval", "student_t"]


def mean_interval(values: Iterable[float], level: float = 0.95) -> tuple[float, float, float]:
    """Return the mean and the limits of Student's t confidence interval, (N,) -> (mean, low, high).

    A single value has a mean but no interval: its limits are nan. No values are ignored: if any is not finite, all
    three results are nan.

    Raises:
        DataError: there are no values.
        ConfigError: ``level`` is not between 0 and 1.
    """
    column = [float(value) for value in values]
    if not 0.0 < level < 1.0:
        raise ConfigError(
            f"The level of an interval lies between 0 and 1, not at {level}: try 0.95."
        )
    if not column:
        raise DataError("There is no interval of no values: at least one run must have a score.")
    if not all(map(math.isfinite, column)):
        return math.nan, math.nan, math.nan
    mean = statistics.fmean(column)
    if len(column) < 2:
        return mean, math.nan, math.nan
    half = student_t((1 + level) / 2, len(column) - 1) * statistics.stdev(column)
    half /= math.sqrt(len(column))
    return mean, mean - half, mean + half


def student_t(probability: float, degrees: int) -> float:
    """Return a quantile of Student's t distribution, by bisection of its distribution function.

    That function is a finite sum in sin and cos of theta = atan(t / sqrt(degrees)) (Abramowitz and Stegun, 26.7.3
    and 26.7.4), whose terms are all positive.

    Args:
        probability: strictly between 0 and 1.
        degrees: degrees of freedom, at least 1.

    Raises:
        ConfigError: an argument is out of range.
    """
    if not 0.0 < probability < 1.0 or degrees < 1:
        raise ConfigError(
            f"Student's t has no quantile at {probability} with {degrees} degrees of freedom: the probability lies "
            f"between 0 and 1, and two values are the fewest that have an interval."
        )
    if probability < 0.5:
        return -student_t(1.0 - probability, degrees)
    wanted, low, high = 2.0 * probability - 1.0, 0.0, math.pi / 2
    for _ in range(64):
        middle = (low + high) / 2
        low, high = (middle, high) if _central(middle, degrees) < wanted else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def _central(theta: float, degrees: int) -> float:
    """Return the probability that abs(t) is at most sqrt(degrees) * tan(theta)."""
    sine, cosine = math.sin(theta), math.cos(theta)
    odd = degrees % 2
    term = cosine if odd else 1.0
    total = term if degrees > 1 else 0.0
    for k in range(2 + odd, degrees - 1, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    return (theta + sine * total) * 2 / math.pi if odd else sine * total
