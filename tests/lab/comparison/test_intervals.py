"""Intervals of paired differences, against SciPy's tests and all patterns of signs."""

import math
from itertools import product

import numpy as np
import pytest
from scipy import stats

from dlopt.lab.comparison.intervals import RANKED, Average, average, interval, pseudomedian, signed_rank_interval


def draw(count: int, seed: int = 0) -> list[float]:
    return list(np.random.default_rng(seed).exponential(size=count))


@pytest.mark.parametrize("count", [6, 7, 10, 20])
def test_the_interval_has_the_centers_that_the_signed_rank_test_does_not_reject(count: int) -> None:
    values = np.array(draw(count))
    low, high = signed_rank_interval(list(values))
    for end, inwards in ((low, 1e-6), (high, -1e-6)):
        inside, outside = (stats.wilcoxon(values - end - x, method="exact").pvalue for x in (inwards, -inwards))
        assert outside <= 0.05 < inside


def test_the_interval_misses_as_many_patterns_of_signs_as_it_may() -> None:
    """Of symmetric differences all signs are equally likely; the interval is as narrow as 5 % of them permit."""
    sizes = np.array(draw(8))
    missed = sum(not low <= 0 <= high for low, high in map(signed_rank_interval, _signed(sizes)))
    sums = np.array([sum(rank for rank, sign in enumerate(signs, 1) if sign) for signs in product((0, 1), repeat=8)])
    allowed = max(k for k in range(36) if np.mean(sums < k) <= 0.025)
    assert missed / 2**8 == 2 * np.mean(sums < allowed) <= 0.05


def _signed(sizes: np.ndarray) -> list[list[float]]:
    return [list(sizes * signs) for signs in product((-1, 1), repeat=len(sizes))]


def test_pseudomedian_halves_the_sum_of_signed_ranks() -> None:
    values = np.array(draw(9, seed=1))
    center = pseudomedian(list(values))
    above, below = (stats.wilcoxon(values - center - x, alternative="greater").statistic for x in (-1e-9, 1e-9))
    assert below <= 9 * 10 / 4 <= above
    assert pseudomedian([1.0, 2.0, 30.0]) == 8.75  # of 1, 1.5, 2, 15.5, 16, 30
    # The outlier moves it less than the mean.
    assert pseudomedian([*range(9), 1000]) < np.mean([*range(9), 1000]) / 10


@pytest.mark.parametrize("count", [6, 10, 20])
def test_coverage_of_skewed_differences(count: int) -> None:
    """400 samples of differences of squared normals: symmetric about 0, with heavy tails, and of skewed parts."""
    generator = np.random.default_rng(0)
    samples = generator.normal(size=(400, count)) ** 2 - generator.normal(size=(400, count)) ** 2
    found = [interval([(value, value) for value in sample]) for sample in samples.tolist()]
    covered = np.mean([each is not None and each.low <= 0 <= each.high for each in found])
    assert covered >= 0.93


def test_coverage_of_a_skewed_sample() -> None:
    """400 samples of ten exponential values; the pseudomedian of their distribution is half the median of Gamma(2)."""
    center = stats.gamma(2).median() / 2
    samples = np.random.default_rng(0).exponential(size=(400, 10)).tolist()
    covered = np.mean([low <= center <= high for low, high in map(signed_rank_interval, samples)])
    assert covered >= 0.92


def test_fewer_than_six_pairs_have_students_interval() -> None:
    values = draw(5)
    found = interval([(value, value) for value in values])
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert found is not None and found.method == "t" and found.least == found.most == pytest.approx(np.mean(values))
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert interval([(1.0, 1.0)]) is interval([(1.0, 1.0), (math.nan, math.nan)]) is None


def test_a_censored_difference_widens_the_interval_by_what_is_not_known() -> None:
    exact = [(value, value) for value in range(9)]
    found = interval([*exact, (9, math.inf)])
    whole = interval([*exact, (9, 9)])
    assert found is not None and whole is not None and found.method == "signed-rank" == whole.method
    assert (found.low, found.least) == (whole.low, whole.least) and found.high == math.inf > whole.high
    few = interval([(1.0, 1.0), (2.0, math.inf), (3.0, 3.0)])
    assert few is not None and (few.low, few.high, few.method) == (1.0, math.inf, "range")


def test_infinite_differences_have_ranks() -> None:
    """One of ten seeds may diverge without deciding the verdict; opposite infinities tell nothing."""
    found = interval([(-math.inf, -math.inf), *[(1.0, 1.0)] * (RANKED + 3)])
    assert found is not None and (found.least, found.high) == (1.0, 1.0) and found.low == -math.inf
    found = interval([(-math.inf, -math.inf), *[(1.0, 1.0)] * 19])
    assert found is not None and found.low == 1.0
    found = interval([(sign * math.inf,) * 2 for sign in (-1, 1) for _ in range(3)])
    assert found is not None and (found.low, found.high) == (-math.inf, math.inf)
    assert not math.isnan(found.least) and not math.isnan(found.most)


def test_an_average_has_an_interval_from_six_seeds_on_and_the_range_below() -> None:
    exponents = [40.0, 0.0, 8.0, 2.0, 6.0, 4.0]  # 11 of the 21 means of pairs are at most 5
    assert average(exponents, is_ratio=False) == Average("robust mean", 5.0, 0.0, 40.0, False)
    found = average([2.0**each for each in exponents], is_ratio=True)
    assert (found.middle, found.low, found.high) == pytest.approx((32.0, 1.0, 2.0**40))
    assert found.label(6) == "robust mean and 95 % interval over 6 seeds"
    two = average([2.0, 18.0], is_ratio=True)
    assert (two.kind, two.middle, two.is_range) == ("geometric mean", pytest.approx(6.0), True)
    assert (two.low, two.high) == pytest.approx((2.0, 18.0))
    assert average([2.0, 18.0], is_ratio=False) == Average("mean", 10.0, 2.0, 18.0, True)
    assert average([-2.0, 18.0], is_ratio=True) == Average("mean", 8.0, -2.0, 18.0, True), (
        "no ratios of negative values"
    )
    assert math.isnan(average([*exponents, math.nan], is_ratio=False).middle)
    assert average([2.0, 18.0], is_ratio=False, seeds=6).kind == "robust mean", "four seeds have diverged"


def test_the_interval_of_an_average_covers_the_center() -> None:
    rng = np.random.default_rng(7)
    covered = [0.0] * 600
    for i in range(len(covered)):
        found = average([math.exp(each) for each in rng.standard_t(2, size=9)], is_ratio=True)
        covered[i] = found.low <= 1.0 <= found.high
    assert 0.93 < sum(covered) / len(covered) < 0.99
