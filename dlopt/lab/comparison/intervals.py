"""Averages over seeds, and confidence intervals of a few paired differences, which need not be normal."""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import Literal

from dlopt.results.intervals import mean_difference

RANKED = 6
"""Fewest pairs with a 95 % interval by ranks: five of one sign have the two-sided probability 2 / 2^5 = 6 %."""

Method = Literal["signed-rank", "t", "range"]
Bounds = tuple[float, float]
"""What is known of a value: the smallest and the largest that it may have; twice the value, if it is not censored."""


@dataclass(frozen=True)
class Interval:
    """A 95 % interval of the location of paired differences.

    Args:
        least, most: bounds of the estimate; equal if no difference is censored.
        low, high: ends of the interval, which may be infinite.
        method: "signed-rank" (the estimate is Hodges and Lehmann's), "t" (the mean), or the "range" over the pairs.
    """

    least: float
    most: float
    low: float
    high: float
    method: Method


def interval(differences: Sequence[Bounds]) -> Interval | None:
    """Computes the interval from six pairs on by ranks, otherwise Student's; None for one pair, or if one is NaN.

    With fewer pairs that are equal, or of which one is infinite or censored, no 95 % interval exists: it is the range
    over the pairs.
    """
    lows, highs = [low for low, _ in differences], [high for _, high in differences]
    if len(differences) < 2 or any(map(math.isnan, (*lows, *highs))):
        return None
    if len(differences) >= RANKED:
        low, high = signed_rank_interval(lows)[0], signed_rank_interval(highs)[1]
        return Interval(pseudomedian(lows, -math.inf), pseudomedian(highs, math.inf), low, high, "signed-rank")
    found = None if lows != highs or any(map(math.isinf, lows)) else mean_difference(lows)
    if found is None or found.low is None or found.high is None:
        return Interval(min(lows), max(highs), min(lows), max(highs), "range")
    return Interval(found.mean, found.mean, found.low, found.high, "t")


@dataclass(frozen=True)
class Average:
    """The average of a metric over seeds that the table, the picture and the sentences of a comparison show.

    `low`, `high`: from six seeds on, its 95 % interval; otherwise the range over the seeds (`is_range`).
    """

    kind: str
    middle: float
    low: float
    high: float
    is_range: bool

    def label(self, seeds: int) -> str:
        """Names it in the legend of a picture."""
        return f"{self.kind} and {'range' if self.is_range else '95 % interval'} over {seeds} seeds"


def average(values: Sequence[float], *, is_ratio: bool, seeds: int | None = None) -> Average:
    """Averages one value per seed; NaN if one is NaN.

    `is_ratio`: on a logarithmic scale, unless a value is negative. `seeds`: with those that have no value.
    """
    seeds, is_ratio = seeds or len(values), is_ratio and min(values) >= 0
    kind, has_interval = kind_of(seeds, is_ratio), len(values) >= RANKED
    if any(map(math.isnan, values)):
        return Average(kind, math.nan, math.nan, math.nan, not has_interval)
    scaled = [math.log(value) if value > 0 else -math.inf for value in values] if is_ratio else values
    middle = pseudomedian(scaled) if seeds >= RANKED else statistics.fmean(scaled)
    low, high = signed_rank_interval(scaled) if has_interval else (min(scaled), max(scaled))
    middle, low, high = (math.exp(each) if is_ratio else each for each in (middle, low, high))
    return Average(kind, middle, low, high, not has_interval)


def kind_of(seeds: int, is_ratio: bool) -> str:
    """Names the average over seeds; `is_ratio`: on a logarithmic scale."""
    return "robust mean" if seeds >= RANKED else "geometric mean" if is_ratio and seeds > 1 else "mean"


def pseudomedian(values: Sequence[float], undefined: float = math.nan) -> float:
    """Computes the median of the means of all pairs, each value with itself included (Hodges and Lehmann, 1963).

    It is less sensitive to outliers than the mean, and more precise than the median. `undefined`: of -inf and inf.
    """
    middle = statistics.median(_walsh_averages(values, undefined))
    return undefined if math.isnan(middle) else middle


def signed_rank_interval(values: Sequence[float]) -> Bounds:
    """Computes the exact 95 % interval of the pseudomedian by Wilcoxon's signed-rank test, for six or more values.

    The values are assumed to be independent and symmetric about it; they need not be normal. Its ends are order
    statistics of the pairs' means (Hollander, Wolfe and Chicken, Nonparametric Statistical Methods, section 3.3).
    Ties widen it. The mean of -inf and inf counts as the one that widens it.
    """
    position = _position(len(values))
    assert position > 0, "no 95 % interval of fewer than six values"
    return _walsh_averages(values, -math.inf)[position - 1], _walsh_averages(values, math.inf)[-position]


def _walsh_averages(values: Sequence[float], undefined: float) -> list[float]:
    """Returns the means of all pairs in increasing order."""

    def averages() -> Iterator[float]:
        for a, b in combinations_with_replacement(values, 2):
            yield undefined if math.isinf(a) and a == -b else a / 2 + b / 2

    return sorted(averages())


def _position(count: int) -> int:
    """Returns the largest k with P(T < k) <= 2.5 %, T: the sum of the ranks 1, ..., `count` with positive signs."""
    ways = [1] + [0] * (count * (count + 1) // 2)  # of the signs to have a sum
    for rank in range(1, count + 1):
        for total in range(len(ways) - 1, rank - 1, -1):
            ways[total] += ways[total - rank]
    position, below = 0, 0
    while 40 * (below := below + ways[position]) <= 2**count:
        position += 1
    return position
