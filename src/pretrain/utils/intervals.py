"""The interval of a mean of few values (Student, 1908), in plain Python: a report needs no numerical library for it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable

from pretrain.errors import ConfigError, DataError

__all__ = ["mean_interval", "student_t"]


def mean_interval(values: Iterable[float], level: float = 0.95) -> tuple[float, float, float]:
    """Mean and the limits of Student's t interval of a few values, (N,) -> (mean, low, high).

    One value has a mean and no interval: its limits are nan. Nothing is left out: a value that is not finite makes
    all three nan.

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
    """The quantile of Student's t distribution, by bisection of its distribution function.

    That function is a finite sum in sin and cos of theta = atan(t / sqrt(degrees)) (Abramowitz and Stegun, 26.7.3
    and 26.7.4), whose terms are all positive.

    Args:
        probability: between 0 and 1, ends excluded.
        degrees: of freedom, a whole number of at least 1.

    Raises:
        ConfigError: one of them is out of range.
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
    """Probability that abs(t) is at most sqrt(degrees) * tan(theta)."""
    sine, cosine = math.sin(theta), math.cos(theta)
    odd = degrees % 2
    term = cosine if odd else 1.0
    total = term if degrees > 1 else 0.0
    for k in range(2 + odd, degrees - 1, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    return (theta + sine * total) * 2 / math.pi if odd else sine * total
