"""Student's t and the normal distribution, and the tests that records stand on.

    p, name = below_target([3.3791, 3.3799, 3.3785], target=3.3821, sigma=0.0019)

Only the standard library, so that anyone can check a record without installing anything.
"""

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import NamedTuple


def _beta_fraction(a: float, b: float, x: float) -> float:
    """The continued fraction of the incomplete beta function, by Lentz's method."""
    tiny = 1e-300
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1) or tiny)
    value = d
    for m in range(1, 100_000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for numerator in (even, odd):
            d = 1 / (1 + numerator * d or tiny)
            c = 1 + numerator / c or tiny
            value *= c * d
        if abs(c * d - 1) < 1e-16:
            break
    return value


def incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularised incomplete beta function I_x(a, b), for a, b > 0 and 0 <= x <= 1."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # there the fraction of the other tail converges
        return 1 - incomplete_beta(b, a, 1 - x)
    log_front = (math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
                 + a * math.log(x) + b * math.log1p(-x))
    return math.exp(log_front) * _beta_fraction(a, b, x) / a


def student_t_sf(t: float, df: float) -> float:
    """P(T > t) of Student's t distribution with `df` > 0 degrees of freedom."""
    if math.isinf(t):
        return float(t < 0)
    if t * t < 3:  # keeps the digits of small t, where the other x would be close to 1
        tail = 0.5 - incomplete_beta(0.5, df / 2, t * t / (df + t * t)) / 2
    else:
        tail = incomplete_beta(df / 2, 0.5, df / (df + t * t)) / 2
    return tail if t >= 0 else 1 - tail


def student_t_quantile(p: float, df: float) -> float:
    """The t with P(T > t) = p, for 0 < p < 1."""
    if p > 0.5:
        return -student_t_quantile(1 - p, df)
    low, high = 0.0, 1.0
    while student_t_sf(high, df) > p:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        if student_t_sf(middle, df) > p:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def normal_sf(z: float) -> float:
    """P(Z > z) of the standard normal distribution."""
    return math.erfc(z / math.sqrt(2)) / 2


def sample_std(values: Sequence[float]) -> float:
    """Sample standard deviation; NaN for fewer than two values, or where one is no number."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return math.nan
    return stdev(values)


def below_target(losses: Sequence[float], target: float, sigma: float) -> tuple[float, str]:
    """One-sided p that a mean this low comes from runs whose true mean is the target; the test.

    From 3 losses on, Student's one-sample t-test, which learns the scatter from the losses; for 1
    or 2 a z-test, which takes the standard deviation of single runs to be `sigma`. p is NaN where
    a loss is no number.
    """
    n, mean = len(losses), fmean(losses)
    if n < 3 or math.isnan(sample_std(losses)):
        return normal_sf((target - mean) * math.sqrt(n) / sigma), f"z-test with sigma {sigma}"
    error = sample_std(losses) / math.sqrt(n)
    if error == 0:
        return float(mean >= target), "t-test"
    return student_t_sf((target - mean) / error, n - 1), "t-test"


class Welch(NamedTuple):
    """How much smaller the second sample's mean is, with the 95% interval of that difference."""

    difference: float
    low: float
    high: float
    p: float  # one-sided: that the second is not smaller


def welch(first: Sequence[float], second: Sequence[float]) -> Welch | None:
    """Welch's test of mean(second) < mean(first); None where a sample has fewer than 2 values."""
    if min(len(first), len(second)) < 2:
        return None
    difference = fmean(first) - fmean(second)
    parts = [stdev(sample) ** 2 / len(sample) for sample in (first, second)]
    error = math.sqrt(sum(parts))
    if error == 0:
        return Welch(difference, difference, difference, float(difference <= 0))
    df = sum(parts) ** 2 / sum(part**2 / (len(sample) - 1)
                               for part, sample in zip(parts, (first, second), strict=True))
    reach = student_t_quantile(0.025, df) * error
    return Welch(difference, difference - reach, difference + reach,
                 student_t_sf(difference / error, df))
