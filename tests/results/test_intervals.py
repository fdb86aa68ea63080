"""Confidence intervals of paired differences: against scipy, and how often they cover the true mean."""

import math
import random
from collections.abc import Sequence

import numpy as np
import pytest
from scipy import stats

from dlopt.results.intervals import Difference, edge, half_width, mean_difference, statistic
from dlopt.results.simultaneous import compare

TRIALS = 4000  # the standard error of a coverage of 95 % is 0.34 %


def test_statistics_of_diverged_runs_do_not_overflow() -> None:
    result = statistic([1e200, 3e200])  # a perplexity, whose square is out of range
    assert result is not None and result.mean == 2e200 and result.std == pytest.approx(math.sqrt(2) * 1e200)
    difference = mean_difference([1e200, 3e200])
    assert difference is not None and difference.low == pytest.approx(2e200 - 12.7062047 * 1e200)


@pytest.mark.parametrize("count", [2, 3, 5, 31, 300])
def test_the_half_width_matches_scipy(count: int) -> None:
    assert half_width(count) == pytest.approx(stats.t.ppf(0.975, count - 1) / math.sqrt(count), rel=1e-12)


@pytest.mark.parametrize("count", [-1, 0, 1])
def test_one_value_has_no_half_width(count: int) -> None:
    with pytest.raises(ValueError, match=f"no confidence interval of {count} values"):
        half_width(count)


@pytest.mark.parametrize("count", [2, 3, 4, 5, 10, 30, 31, 40])
def test_the_interval_of_a_mean_difference_matches_scipy(count: int) -> None:
    draw = random.Random(count)
    values = [draw.gauss(0.3, 1) for _ in range(count)]
    interval = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    found = mean_difference(values)
    assert found is not None and (found.low, found.high) == pytest.approx((interval.low, interval.high))
    ties = mean_difference([(i + 1) / 144 - i / 144 for i in range(count)])  # rounded differently
    assert ties is not None and ties.mean == pytest.approx(1 / 144) and (ties.low, ties.high) == (None, None)
    assert mean_difference([0.0] * count) == Difference(0.0, None, None, count)


def of_two_rows(differences: Sequence[float], resolution: float) -> Difference | None:
    """Compares a row with one that is the first in a table of two."""
    values = dict(enumerate(differences))
    return compare([dict.fromkeys(values, 0.0), values], resolution=resolution).differences[0]


def test_an_interval_extends_by_the_resolution_at_least() -> None:
    one_of_twenty = [1 / 144, *[0.0] * 19]
    found = of_two_rows(one_of_twenty, 1 / 144)
    assert found is not None and (found.low, found.high) == pytest.approx((-0.95 / 144, 1.05 / 144))


@pytest.mark.parametrize("count", [3, 5, 10])
def test_intervals_of_normal_differences_cover_the_mean_in_95_percent(count: int) -> None:
    samples = np.random.default_rng(count).normal(0.3, 1, (TRIALS, count))
    covered = [_covers(mean_difference(values), 0.3) for values in samples.tolist()]
    assert 0.93 <= np.mean(covered) <= 0.97


@pytest.mark.parametrize(
    ("count", "gained", "lost"), [(3, 0.05, 0.03), (5, 0.01, 0.0), (10, 0.005, 0.0025), (3, 0.001, 0.0005)]
)
def test_intervals_of_accuracies_cover_the_mean_in_95_percent(count: int, gained: float, lost: float) -> None:
    """Each of 144 samples is `gained` or `lost` with these probabilities: from 7 samples per run to one in 7 runs.

    Equal differences have no interval: that less than one sample cannot be seen is right in 93 %.
    """
    true = gained - lost
    covered, right = [], []
    for values in _accuracies(count, gained, lost):
        found = of_two_rows(values, 1 / 144)
        assert found is not None
        if found.low is None:
            right.append(abs(found.mean - true) <= 1 / 144)
        else:
            covered.append(_covers(found, true))
    assert np.mean(covered) >= 0.93 and np.mean([*covered, *right]) >= 0.93


def test_without_the_resolution_intervals_of_accuracies_are_too_narrow() -> None:
    differences = _accuracies(15, 0.003, 0.0)  # the worst of those that were tried
    plain = [mean_difference(values) for values in differences]
    found = [of_two_rows(values, 1 / 144) for values in differences]
    assert np.mean([_covers(each, 0.003) for each in plain]) < 0.91
    assert np.mean([_covers(each, 0.003) for each in found]) >= 0.94


@pytest.mark.parametrize(
    ("best", "tried", "expected"),
    [
        ([0.1], [0.1, 0.2, 0.3], "smallest"),
        ([0.3], [0.1, 0.2, 0.3], "largest"),
        ([0.2], [0.1, 0.2, 0.3], None),
        ([0.1, 0.3], [0.1, 0.2, 0.3], None),
        ([0.3, 0.3], [0.1, 0.3], "largest"),
        ([0.1], [0.1, 0.1], None),
        ([], [0.1, 0.2], None),
        ([], [], None),
    ],
)
def test_ends_of_what_was_tried(best: list[float], tried: list[float], expected: str | None) -> None:
    assert edge(best, tried) == expected


def _accuracies(count: int, gained: float, lost: float) -> list[list[float]]:
    """Draws paired differences of accuracies on 144 samples, of `TRIALS` comparisons with `count` seeds."""
    draws = np.random.default_rng(count).multinomial(144, [gained, lost, 1 - gained - lost], (TRIALS, count))
    differences: list[list[float]] = ((draws[..., 0] - draws[..., 1]) / 144).tolist()
    return differences


def _covers(difference: Difference | None, mean: float) -> bool:
    assert difference is not None
    return difference.low is not None and difference.high is not None and difference.low <= mean <= difference.high
