"""Differences between the first row of a table and the others, with intervals that hold for the whole table.

The first row is the one that the data put first, so that its differences are the largest of all pairs. The intervals
are therefore those of the range of all rows (Tukey's studentized range; the seeds are blocks), not of one pair that was
named before. Of tables of equal rows, at most `RATE` have an interval without 0, whatever the number of rows is.

- The spread is pooled over all rows. A row pair whose own spread is larger has the larger one.
- Rows are compared from the largest difference to the smallest one. A set of m rows has the range of m rows and the
  level 1 - (1 - rate)^(m/k) (Einot and Gabriel, Biometrika 62, 1975; Welsch, JASA 72, 1977), as long as the larger
  differences exclude 0.
- If a row is noisier than the others (Cochran's test, Annals of Eugenics 11, 1941), each pair has its own spread, and
  Student's interval with Bonferroni's level over all k (k - 1) / 2 pairs.

The blocks may be the folds of a cross-validation. Their training sets share samples, so that the errors of two folds
are correlated. The variance of a mean of n folds is that of a fold times 1/n + n_test/n_train, in place of 1/n. This is
exact for a correlation of 1/folds (Nadeau and Bengio, Machine Learning 52, 2003).

Rows enter from `FEWEST` common seeds or folds on. `scripts/verdict_simulations.py` has the tables on which this was
tried.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dlopt.results.intervals import FEWEST, Comparison, Difference

RATE = 0.05
"""Of tables of equal rows, the fraction that may call any row better than another one, over all looks at a table."""
_FIRST_LOOK = 0.04
_COCHRAN = 0.05
Values = Mapping[Any, float]
"""Of a row, by seed or fold."""


def rate_of(look: int) -> float:
    """Returns the error rate of look 1, 2, 3, ... at a table whose seeds grow: 4 %, 0.5 %, 0.25 %; the sum is 5 %."""
    return _FIRST_LOOK if look == 1 else (RATE - _FIRST_LOOK) / 2 ** (look - 1)


def compare(
    rows: Sequence[Values],
    *,
    enters: Sequence[bool] = (),
    seen: Sequence[int] = (),
    resolution: float = 0.0,
    overlap: float = 0.0,
) -> Comparison:
    """Compares the first row with each other one over common seeds.

    Args:
        rows: the first one has the best mean.
        enters: whether a row gets an interval; by default all do.
        seen: see `Comparison`.
        resolution: the smallest difference between two runs, such as one sample of an accuracy. Intervals extend at
            least as far to each side.
        overlap: validation samples of a fold / its training samples; 0 for seeds.
    """
    first, enters = rows[0], enters or [True] * len(rows)
    pairs = [np.array([row[seed] - first[seed] for seed in row if seed in first]) for row in rows[1:]]
    found = [Difference(float(each.mean()), None, None, len(each)) if len(each) else None for each in pairs]
    # A row that is equal to the first one in every run has no interval: nothing was compared.
    entered = [i for i, each in enumerate(pairs) if enters[1 + i] and len(each) >= FEWEST and np.any(each)]
    if not enters[0] or not entered:
        return Comparison(found, seen)
    table = np.array([[row.get(seed, math.nan) for seed in first] for row in (first, *(rows[1 + i] for i in entered))])
    rates = rate_of(1 + len(seen)), rate_of(2 + len(seen))
    halves, half_width = _half_widths(table, [pairs[i] for i in entered], overlap, *rates)
    for i, half in zip(entered, halves.tolist(), strict=True):
        if half > 0:
            mean, half = float(pairs[i].mean()), max(half, resolution)
            found[i] = Difference(mean, mean - half, mean + half, len(pairs[i]))
    positions = {i: position for position, i in enumerate(entered)}
    return Comparison(found, seen, lambda i, seeds: max(half_width(positions[i], seeds), resolution))


def _half_widths(
    table: NDArray[np.float64], pairs: Sequence[NDArray[np.float64]], overlap: float, rate: float, later: float
) -> tuple[NDArray[np.float64], Callable[[int, int], float]]:
    """Returns the half widths of the intervals of `pairs`, 0 without a spread, and those with more seeds later.

    `table`: [rows, seeds], the first row complete, NaN where another row has no run.
    """
    rows, unit = len(table), float(np.nanmax(np.abs(table))) or 1.0  # squares of 1e200 are out of range
    means = np.array([each.mean() for each in pairs]) / unit
    counts = np.array([len(each) for each in pairs])
    roots = np.sqrt(1 / counts + overlap)  # the error of a mean of this many, in deviations of one of them
    own = np.array([(each / unit).std(ddof=1) for each in pairs])
    pooled, each_row, freedom = _spreads(table / unit, counts)
    smallest = 1e-6 * np.abs(means)  # differences that are equal up to rounding tell nothing of the spread
    if rows > 2 and _is_noisier(each_row, int(counts.max())):
        own[own <= smallest] = 0.0
        all_pairs = rows * (rows - 1) / 2
        quantiles = np.array([_student(n - 1, rate / all_pairs) for n in counts.tolist()])
        return (
            quantiles * own * roots * unit,
            lambda i, seeds: unit * _student(seeds - 1, later / all_pairs) * own[i] * math.sqrt(1 / seeds + overlap),
        )
    spreads = np.sqrt(np.maximum(pooled, (each_row[0] + each_row[1:]) / 2))
    if math.sqrt(pooled) <= smallest.max():
        return np.zeros(len(pairs)), lambda i, seeds: 0.0
    errors = spreads * roots
    factors, factor, is_open = np.zeros(len(pairs)), 0.0, False
    for size, i in zip(range(rows, 1, -1), np.argsort(-np.abs(means) / errors).tolist(), strict=True):
        if not is_open:
            step = max(size // 16, 1)  # of large sets, a slightly larger one: its quantile is known
            size = min(-(-size // step) * step, rows)
            level = rate if size >= rows - 1 else 1 - (1 - rate) ** (size / rows)
            factor = studentized_range(size, freedom, level)
            is_open = bool(abs(means[i]) <= factor * errors[i])
        factors[i] = factor

    def half_width(i: int, seeds: int) -> float:
        error = spreads[i] * math.sqrt(1 / seeds + overlap)
        return unit * studentized_range(rows, (rows - 1) * (seeds - 1), later) * error

    return factors * errors * unit, half_width


def _spreads(table: NDArray[np.float64], counts: NDArray[np.int64]) -> tuple[float, NDArray[np.float64], int]:
    """Returns the pooled variance of a run, that of each row, and the degrees of freedom of the pooled one.

    A run is the sum of its row, its seed and noise. `counts`: of the runs of the rows but the first one.
    """
    rows, seeds = table.shape
    residuals = table.copy()
    for _ in range(1000):  # one pass is exact without missing runs
        residuals -= np.nanmean(residuals, 1, keepdims=True)
        residuals -= np.nanmean(residuals, 0, keepdims=True)
        if np.abs(np.nanmean(residuals, 1)).max() < 1e-12:
            break
    squares, freedom = np.nansum(residuals**2, 1), int(counts.sum()) - rows + 1
    pooled = float(squares.sum()) / freedom
    if rows == 2:
        return pooled, np.full(2, pooled), freedom
    # E[squares / (n - 1)] of row i is (1 - 2 / k) v_i + S / k^2, with S the sum of the variances v of all k rows.
    each = squares / (np.array([seeds, *counts]) - 1)
    total = float(each.sum()) * rows / (rows - 1)
    return pooled, np.maximum((each - total / rows**2) * rows / (rows - 2), 0.0), freedom


def _is_noisier(variances: NDArray[np.float64], seeds: int) -> bool:
    """Tests whether one of the rows has a larger variance than the others (Cochran 1941), with level `_COCHRAN`."""
    from scipy.special import fdtri

    rows, total = len(variances), float(variances.sum())
    ratio = fdtri(seeds - 1, (rows - 1) * (seeds - 1), 1 - _COCHRAN / rows)
    return total > 0 and float(variances.max()) / total > ratio / (ratio + rows - 1)


def _student(freedom: int, level: float) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 1 - level / 2))


@lru_cache(maxsize=4096)
def studentized_range(rows: int, freedom: int, level: float) -> float:
    """Returns the upper quantile of the range of `rows` independent normals, divided by their estimated deviation.

    That of `scipy.stats.studentized_range.isf` to six digits, in a tenth of the time, and without importing all of
    `scipy.stats`.
    """

    def excess(value: float) -> float:
        return math.log(max(_exceeds(value, rows, freedom), 1e-12) / level)

    before, value = 3.0, 4.5
    at_before, at_value = excess(before), excess(value)
    while abs(value - before) > 1e-8 * value and at_value != at_before:  # by secants: the logarithm is almost a line
        step = at_value * (value - before) / (at_before - at_value)
        before, at_before = value, at_value
        value = min(max(value + step, value / 2), 2 * value)
        at_value = excess(value)
    return value


def _exceeds(value: float, rows: int, freedom: int) -> float:
    """Returns the probability that the studentized range is above `value`, by quadrature."""
    from scipy.special import ndtr

    z, weights, deviations, parts = _nodes(freedom)
    inside = ndtr(z[:, None]) - ndtr(z[:, None] - value * deviations)
    return float(parts @ (1 - rows * (weights @ inside ** (rows - 1))))


@lru_cache
def _nodes(freedom: int) -> tuple[NDArray[np.float64], ...]:
    """Returns nodes and weights for the largest normal, and for the deviation, which is sqrt(chi^2 / freedom)."""
    from scipy.special import gammaincinv

    nodes, weights = np.polynomial.legendre.leggauss(128)
    z, uniform = 8.5 * nodes, (nodes + 1) / 2
    # A range far above its mean is that of a small deviation: the nodes are dense there.
    deviations = np.sqrt(2 * gammaincinv(freedom / 2, uniform**6) / freedom)
    return z, 8.5 * weights * np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi), deviations, 3 * weights * uniform**5
