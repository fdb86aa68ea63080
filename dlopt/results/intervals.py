"""Means over runs, paired differences and their confidence intervals; the end of what was tried."""

import math
import statistics
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

Edge = Literal["smallest", "largest"]
FEWEST = 3
"""Common seeds without which two rows of a table are not compared."""


@dataclass(frozen=True)
class Statistic:
    """Mean and sample standard deviation (divided by count - 1; None for a single value)."""

    mean: float
    std: float | None
    count: int

    def show(self, form: Callable[[float], str]) -> str:
        """Formats 0.95 ± 0.01."""
        return form(self.mean) if self.std is None else f"{form(self.mean)} ± {form(self.std)}"


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences with its confidence interval (None for a single pair, and for equal differences)."""

    mean: float
    low: float | None
    high: float | None
    count: int

    def show(self, form: Callable[[float], str]) -> str:
        """Formats -0.05 [-0.06, -0.04]."""
        interval = "" if self.low is None or self.high is None else f" [{form(self.low)}, {form(self.high)}]"
        return form(self.mean) + interval


@dataclass(frozen=True)
class Comparison:
    """Differences of rows to the first one.

    Attributes:
        differences: of each other row; None without common seeds. Fewer than `FEWEST` have no interval.
        seen: numbers of seeds at which the table was looked at before some of its rows got more.
        half_width: of the interval of a row (its index in `differences`) with this many seeds, at the next look.
    """

    differences: Sequence[Difference | None] = ()
    seen: Sequence[int] = ()
    half_width: Callable[[int, int], float] = lambda row, seeds: math.nan


def statistic(values: Sequence[float]) -> Statistic | None:
    """Computes mean and sample standard deviation; None for no values."""
    if not values:
        return None
    mean, count = statistics.fmean(values), len(values)
    # A diverged run may have a perplexity of 1e200, whose square is out of range; `hypot` does not compute it.
    deviation = math.hypot(*(value - mean for value in values))
    return Statistic(mean, deviation / math.sqrt(count - 1) if count > 1 else None, count)


def mean_difference(differences: Sequence[float]) -> Difference | None:
    """Computes the mean of paired differences with Student's 95 % confidence interval; None for no pairs.

    One pair has no interval, and neither have equal differences.
    """
    found = statistic(differences)
    if found is None:
        return None
    # Equal differences, of accuracies for example, would have an interval without width. They tell nothing of the
    # spread. Those of equal fractions are equal up to rounding.
    if found.std is None or max(differences) - min(differences) <= 1e-9 * max(map(abs, differences)):
        return Difference(found.mean, None, None, found.count)
    half = half_width(found.count) * found.std
    return Difference(found.mean, found.mean - half, found.mean + half, found.count)


@lru_cache
def half_width(count: int) -> float:
    """Returns the half width of Student's 95 % confidence interval of a mean, in sample standard deviations.

    2.48 for three values. Raises ValueError for fewer than two. All intervals and bands of results are computed by it.
    """
    from scipy.special import stdtrit

    if count < 2:
        raise ValueError(f"no confidence interval of {count} values")
    return float(stdtrit(count - 1, 0.975)) / math.sqrt(count)


def edge(best: Collection[float], tried: Collection[float]) -> Edge | None:
    """Returns at which end of the values `tried` the `best` are, so that a better one may be beyond it.

    None if they are at neither end, or not all at the same one, or if fewer than two values were tried.
    """
    if len(set(best)) != 1 or len(set(tried)) < 2:
        return None
    low, high = min(tried), max(tried)
    [value] = set(best)
    return "smallest" if value == low else "largest" if value == high else None
