"""The sequential test keeps its error rate at every stopping time, and decides within ten pairs on large changes."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest

from dlopt.lab.judge.sequential import evidence, fewest_pairs, interval, looks, rate_of

RATE = 0.05
RUNS, PAIRS = 4000, 40
Draws = Callable[[np.random.Generator], np.ndarray]
SYMMETRIC: dict[str, Draws] = {
    "normal": lambda rng: rng.standard_normal((RUNS, PAIRS)),
    "two values": lambda rng: rng.choice([-1.0, 1.0], (RUNS, PAIRS)),
    "accuracies with ties": lambda rng: np.round(rng.standard_normal((RUNS, PAIRS))) / 144,
    "outliers": lambda rng: rng.standard_cauchy((RUNS, PAIRS)),
    "growing": lambda rng: rng.standard_normal((RUNS, PAIRS)) * np.arange(1, PAIRS + 1) ** 2,
    "some diverge": lambda rng: rng.normal(size=(RUNS, PAIRS)) * np.where(rng.random((RUNS, PAIRS)) < 0.2, np.inf, 1),
}


@pytest.mark.parametrize("name", SYMMETRIC)
def test_a_change_that_does_nothing_is_decided_at_most_at_the_rate_whenever_one_stops(name: str) -> None:
    differences = SYMMETRIC[name](np.random.default_rng(7))
    wrong = (evidence(differences) >= math.log(1 / RATE)).any(axis=1).mean()
    assert wrong <= RATE + 3 * math.sqrt(RATE * (1 - RATE) / RUNS)
    assert wrong > RATE / 10  # nor is it idle


def test_a_center_is_in_all_intervals_with_the_promised_probability() -> None:
    """A margin is judged by these intervals."""
    differences = 0.3 + np.random.default_rng(3).laplace(size=(RUNS, PAIRS))
    assert (evidence(differences, 0.3) >= math.log(1 / RATE)).any(axis=1).mean() <= RATE + 0.01
    for row in differences[:5].tolist():
        low, high = interval(row, RATE)
        assert low < 0.3 < high
        inside, outside = evidence(row, low + 1e-6)[-1], evidence(row, low - 1e-6)[-1]
        assert inside < math.log(1 / RATE) <= outside


def test_skewed_differences_of_a_change_with_an_effect_exceed_the_rate_up_to_about_twice() -> None:
    """What the page states. A change without effect has symmetric differences, however skewed its metric is."""
    rng = np.random.default_rng(5)
    skewed = rng.exponential(size=(RUNS, PAIRS)) - 1  # the mean is 0, the median is not
    wrong = (evidence(skewed) >= math.log(1 / RATE)).any(axis=1).mean()
    assert RATE < wrong < 0.15
    exchanged = rng.exponential(size=(RUNS, PAIRS)) - rng.exponential(size=(RUNS, PAIRS))
    assert (evidence(exchanged) >= math.log(1 / RATE)).any(axis=1).mean() <= RATE + 0.01


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1, 1, 1), (3, 1, 0.2, 5, 0, 2, 2), (1, math.inf, 2, 0.1, 3, 1, 9)])
def test_it_is_a_martingale_under_random_signs(sizes: tuple[float, ...]) -> None:
    signs = np.array(list(itertools.product([-1.0, 1.0], repeat=len(sizes))))
    np.testing.assert_allclose(np.exp(evidence(signs * np.array(sizes))).mean(axis=0), 1, rtol=1e-9)


def test_large_changes_are_decided_within_ten_pairs() -> None:
    first = math.log(1 / rate_of(1, RATE))
    for size, pairs, power in ((2.0, 10, 0.9), (1.0, 20, 0.8)):
        differences = size + np.random.default_rng(1).standard_normal((RUNS, pairs))
        assert (evidence(differences) >= first).any(axis=1).mean() > power


def test_the_unit_of_the_metric_does_not_matter() -> None:
    differences = 0.5 + np.random.default_rng(2).standard_normal(12)
    for unit in (1e-200, 1e-9, 1e9):
        np.testing.assert_allclose(evidence(differences * unit), evidence(differences), rtol=1e-9)


def test_verdicts() -> None:
    noise = [0.02, -0.01, 0.0, 0.03, -0.02, 0.01, 0.02, -0.03, 0.01, 0.0, 0.02, -0.01]

    def last(gains: list[float], margin: float = 0.0) -> tuple[str, int]:
        look = [*looks(gains, RATE, margin)][-1]
        assert look.low <= look.estimate <= look.high or look.verdict == "undecided"
        return look.verdict, look.pairs

    gains = [0.1 + each for each in noise]
    assert last(gains) == ("better", 6)
    assert last([-each for each in gains]) == ("worse", 6)
    assert last(noise) == ("undecided", 12)
    assert last(gains, margin=0.2)[0] == last(noise, margin=0.2)[0] == "equal"
    assert last(gains, margin=0.08)[0] != "worse"
    assert last([0.1] * 9) == ("better", 6)
    assert last([0.0] * 9)[0] == "undecided"  # equal accuracies of different runs
    assert last([0.0] * 9, margin=0.01) == ("equal", 6)
    assert last([-math.inf] * 9) == ("worse", 6)
    assert last([math.inf, *gains])[0] == "better"
    # Many equal runs: 0 itself is not rejected, although the centers next to it are.
    ties = [0.0] * 14 + [0.1] * 5
    assert interval(ties, RATE)[0] == 0 and last(ties)[0] == "undecided"
    assert interval([], RATE) == interval([0.1], RATE) == (-math.inf, math.inf)


def test_the_rates_of_all_proposals_sum_to_that_of_the_ledger() -> None:
    rates = [rate_of(number, RATE) for number in range(1, 100_000)]
    assert 0.0499 < math.fsum(rates) <= RATE
    assert [fewest_pairs(rate_of(number, RATE)) for number in (1, 10, 100)] == [7, 14, 22]
