"""Rank correlation with published leagues, against SciPy and orders that are known."""

import dataclasses
import math
from itertools import permutations

import numpy as np
import pytest
import yaml
from scipy.stats import kendalltau

from dlopt.lab.benchmark import agreement, page
from dlopt.lab.benchmark.agreement import Agreement, League, chance, kendall_tau
from dlopt.lab.benchmark.figures import FIGURES
from dlopt.lab.benchmark.results import Results, load_reference
from dlopt.lab.benchmark.scores import Interval, summarize
from tests.lab.benchmark.synthetic import make

FIVE = {"soap": 2.9, "muon": 2.4, "nadam": 1.9, "adamw": 1.4, "lion": 0.9}


def league(**results: float) -> League:
    return League("L", "a league", "2025-09", "somewhere", "score", results)


def use(monkeypatch: pytest.MonkeyPatch, *leagues: League) -> None:
    kinds = {"text": ["gpt", "lstm"], "images": ["mlp", "vit"]}
    monkeypatch.setattr(agreement, "published", lambda: (list(leagues), kinds))


@pytest.mark.parametrize("size", [2, 3, 5, 10])
def test_tau_is_that_of_scipy_with_and_without_ties(size: int) -> None:
    rng = np.random.default_rng(size)
    for values in (3, 100):
        own, other = rng.integers(values, size=(2, 40, size)).astype(float)
        expected = [kendalltau(a, b).statistic for a, b in zip(own, other, strict=True)]
        np.testing.assert_allclose(kendall_tau(own, other), expected, atol=1e-12)


def test_targets_that_are_not_reached_are_ties() -> None:
    own = np.array([-100.0, -math.inf, -200.0, -math.inf])
    other = np.array([4.0, 3.0, 2.0, 1.0])
    assert kendall_tau(own, other) == pytest.approx(kendalltau([3, 1, 2, 1], other).statistic)
    assert np.isnan(kendall_tau(np.full(4, -math.inf), other))


@pytest.mark.parametrize("size", [2, 3, 4, 5, 6])
def test_chance_is_the_exact_one_sided_probability(size: int) -> None:
    other = np.arange(size, dtype=float)
    for own in list(permutations(other))[:: max(1, math.factorial(size) // 10)]:
        expected = kendalltau(own, other, method="exact", alternative="greater").pvalue
        assert chance(np.array(own), other) == pytest.approx(expected)


def test_chance_of_many_is_estimated_and_without_tau_there_is_none() -> None:
    rng = np.random.default_rng(0)
    own, other = rng.normal(size=(2, 9))
    expected = kendalltau(own, other, method="exact", alternative="greater").pvalue
    assert chance(own, other) == pytest.approx(expected, abs=0.03)
    assert math.isnan(chance(np.ones(4), other[:4]))


def test_equal_and_reversed_orders_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    same, reversed_ = league(**FIVE), league(**{name: -value for name, value in FIVE.items()})
    use(monkeypatch, same, dataclasses.replace(reversed_, name="R"))
    results = make({name: 10 * value for name, value in FIVE.items()}, ("mlp", "vit", "gpt", "lstm"))
    found = {(each.league.name, each.kind): each for each in agreement.agreements(results)}
    assert [*found] == [(name, kind) for name in "LR" for kind in ("all", "text", "images")]
    assert found["L", "all"].tau.value > 0.5 and found["L", "all"].verdict == "agrees"
    assert found["R", "all"].tau.value < -0.5 and found["R", "all"].verdict == "disagrees"
    assert found["R", "all"].tau.value == -found["L", "all"].tau.value
    assert found["L", "text"].workloads == ["gpt", "lstm"] and found["L", "all"].optimizers == [*FIVE]
    texts = agreement.texts(results, [*found.values()], "findings")
    text = page.page(results, summarize(results), {each: {"source": "data:,", "width": "1"} for each in FIGURES})
    assert "Does small predict large?" in text and all(each in text for each in texts)
    assert len(texts) == 2 and "predict" in texts[0] and "reverse" in texts[1] and "disagree" in texts[1]


def test_the_interval_contains_tau_and_draws_workloads(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, league(**FIVE))
    [tau] = [each.tau for each in agreement.agreements(make(FIVE)) if each.kind == "all"]
    assert -1 <= tau.low <= tau.value <= tau.high <= 1 and tau.low < tau.high


def test_three_optimizers_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    three = dict(list(FIVE.items())[:3])
    use(monkeypatch, league(**three, shampoo=9.0), league(soap=1.0))
    results = make({name: 10 * value for name, value in three.items()}, ("mlp", "gpt"))
    found = agreement.agreements(results)
    assert {each.league.name for each in found} == {"L"} and len(found) == 3  # one shared optimizer is no ranking
    assert all((each.tau.low, each.tau.high, each.verdict) == (-1, 1, "too few") for each in found)
    [text] = agreement.texts(results, found, "findings")
    assert "one of 6 cases" in text and "interval is everything" in text


def test_one_study_has_no_interval_and_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, league(**FIVE))
    found = agreement.agreements(make(FIVE, studies=1))
    assert all(math.isnan(each.tau.low) and each.verdict == "inconclusive" for each in found)
    assert agreement.rows(found)[0][5] == "-"


@pytest.mark.parametrize(
    ("optimizers", "low", "high", "chance", "verdict"),
    [
        (3, 0.1, 1.0, 0.01, "too few"),
        (4, 0.1, 1.0, 0.01, "agrees"),
        (5, 0.1, 1.0, 0.05, "agrees"),  # at most 0.05, as the page says
        (5, 0.1, 1.0, 0.06, "inconclusive"),
        (5, 0.0, 1.0, 0.01, "inconclusive"),
        (5, -1.0, 0.0, 0.99, "inconclusive"),
        (5, -1.0, -0.1, 0.99, "disagrees"),
        (3, -1.0, -0.1, 0.99, "too few"),
    ],
)
def test_verdicts(optimizers: int, low: float, high: float, chance: float, verdict: str) -> None:
    interval, names = Interval((low + high) / 2, low, high), [*FIVE][:optimizers]
    assert Agreement(league(**FIVE), "all", ["mlp"], names, interval, chance).verdict == verdict


def test_self_tuning_and_results_without_targets_are_not_compared() -> None:
    results = make(FIVE)
    without = {name: dataclasses.replace(each, target=math.nan) for name, each in results.workloads.items()}
    for changed in (dataclasses.replace(results, track="self_tuning"), dataclasses.replace(results, workloads=without)):
        assert agreement.agreements(changed) == []


def test_the_published_leagues_are_well_formed() -> None:
    leagues, kinds = agreement.published()
    results = load_reference("small")
    assert isinstance(results, Results)
    assert {name for names in kinds.values() for name in names} < {*results.workloads}
    written = yaml.safe_load(agreement.PUBLISHED.read_text(encoding="utf-8"))["leagues"]
    for each, entry in zip(leagues, written, strict=True):
        assert each.source.startswith("https://") and "commit" in each.source
        values = [value for _, value in entry["scores"].values()]
        assert len(values) >= len(each.results) >= 2
        assert values == sorted(values, reverse=each.measure == "score")
