"""The sequential test keeps its error rate at every stopping time, and decides within ten pairs on large changes."""

import itertools
import math
import random
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest

from dlopt.lab.judge.sequential import SIZE, evidence, fewest_pairs, interval, looks, rate_of
from dlopt.lab.judge.wording import interval_text, pair_line

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


# -- ends of intervals, against exact fractions

NEXT = Fraction(1, 10**40)  # beside a jump of the evidence


def exact_evidence(gains: list[Fraction], center: Fraction) -> float:
    """log M_n of the module's docstring, with exact differences and squares."""
    gain = loss = 0.0
    squares = Fraction(0)
    for number, each in enumerate(gains, 1):
        x = each - center
        squares += x * x
        z = math.copysign(math.sqrt(x * x * number / squares), x) if x else 0.0
        k = SIZE * math.sqrt(1 + SIZE**2)
        gain += math.log(2) - float(np.logaddexp(0, -2 * k * z))
        loss += math.log(2) - float(np.logaddexp(0, 2 * k * z))
    return float(np.logaddexp(gain, loss)) - math.log(2)


def exact_end(gains: list[Fraction], rate: float, sign: int) -> Fraction | float:
    """Returns an end of the interval: from far outside to the first center that is kept, then by bisection."""
    jumps = sorted({*gains, Fraction(0)})
    reach = max(jumps[-1] - jumps[0], Fraction(1, 144))
    low, high = jumps[0] - 2 * reach, jumps[-1] + 2 * reach
    centers = [each + beside for each in jumps for beside in (-NEXT, 0, NEXT)]
    centers += [low + (high - low) * Fraction(i, 63) for i in range(64)]
    centers = sorted({*centers, low - 10**6 * reach, high + 10**6 * reach}, reverse=sign > 0)
    rejected = None
    for center in centers:
        if exact_evidence(gains, center) < math.log(1 / rate):
            break
        rejected = center
    if rejected is None:
        return sign * math.inf
    for jump in (center, rejected):
        if jump in jumps and abs(center - rejected) <= NEXT:
            return jump
    for _ in range(50):
        middle = (rejected + center) / 2
        if exact_evidence(gains, middle) < math.log(1 / rate):
            center = middle
        else:
            rejected = middle
    return center


def test_no_end_of_an_interval_is_rounding_noise() -> None:
    """Accuracies of 144 samples, many of them equal. The numbers are those of two runs, whose difference is rounded."""
    draw = random.Random(11)
    decided = at_a_jump = 0
    for _ in range(50):
        middle, spread = draw.choice([0, 0, 1, 2, -2, -3]), draw.choice([1, 2, 3, 6])
        counts = [round(draw.gauss(middle, spread)) for _ in range(draw.randint(4, 20))]
        base = [draw.randint(100, 130) for _ in counts]
        rate, exact = draw.choice([0.05, 0.0304, 0.0076]), [Fraction(each, 144) for each in counts]
        gains = [(number + each) / 144 - number / 144 for number, each in zip(base, counts, strict=True)]
        ends = interval(gains, rate, 0.0)
        for end, sign in zip(ends, (-1, 1), strict=True):
            expected = exact_end(exact, rate, sign)
            assert end == expected or end == pytest.approx(float(expected), rel=1e-4, abs=1e-12), counts
            is_jump = expected in (*exact, 0)
            at_a_jump += is_jump
            if expected == 0:
                assert end == 0, counts
        shown = interval_text("val_accuracy", *ends) + pair_line("val_accuracy", 1, gains[-1], *ends)
        assert "e-" not in shown, (counts, shown)
        *_, look = looks(gains, rate, first=len(gains))
        assert (look.verdict != "undecided") == (exact_evidence(exact, Fraction(0)) >= math.log(1 / rate)), counts
        assert look.verdict == "undecided" or (look.verdict == "better") == (sum(ends) > 0)
        decided += look.verdict != "undecided"
    assert decided > 6 and at_a_jump > 6


def test_an_open_end_at_zero_is_zero() -> None:
    """The example of an audit: it was printed as "4.936e-12 to 4.98"."""
    gains = [each / 144 for each in (0, -7, -2, -2, -5, -4, -1, -7, -5)]
    *_, look = looks(gains, rate_of(1, 0.05))
    assert look.verdict == "worse" and look.high == 0 and look.low == pytest.approx(-0.0498, abs=1e-4)
