"""Scores against AlgoPerf's formula, computed independently with pandas, and their laws."""

import dataclasses
import math
from itertools import pairwise, product
from statistics import median

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from dlopt.lab.benchmark import formats
from dlopt.lab.benchmark.results import Cell, Results, TrialRecord, UpdateCost, WorkloadTarget
from dlopt.lab.benchmark.scores import (
    MAX_RATIO,
    Interval,
    Times,
    bootstrap,
    comparisons,
    measured,
    profile,
    profile_scores,
    ranks,
    ratios,
    scores,
    small_sample_factor,
    standings,
    summarize,
    times,
)
from tests.lab.benchmark.synthetic import make

TIMES = st.one_of(st.integers(1, 60), st.just(math.inf))


@st.composite
def tables(draw: st.DrawFn) -> dict[str, dict[str, float]]:
    optimizers, workloads = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    return {f"o{i}": {f"w{j}": float(draw(TIMES)) for j in range(workloads)} for i in range(optimizers)}


def results_of(studies: dict[str, list[list[float]]], costs: dict[str, float] | None = None) -> Results:
    """Optimizer -> workload -> study -> updates of its only trial."""
    count = len(next(iter(studies.values())))
    cells = {}
    for optimizer, rows in studies.items():
        cost = UpdateCost(costs[optimizer], 0.0, 0.0, 2.0) if costs else None
        for i, row in enumerate(rows):
            trials = [TrialRecord(study, 0, {}, time, 2 * time, 1.0, 0.5, 0.5) for study, time in enumerate(row)]
            cells[optimizer, f"w{i}"] = Cell(tuple(trials), cost)
    workloads = {f"w{i}": WorkloadTarget("val_loss", 0.5, 100) for i in range(count)}
    return Results("t", len(next(iter(studies.values()))[0]), 1, workloads, cells, {})


# -- AlgoPerf's formula (Dahl et al. 2023; performance_profile.py): rows are optimizers, columns workloads


def algoperf_ratios(table: Times) -> pd.DataFrame:
    frame = pd.DataFrame(table).T
    return frame.div(frame.min(axis=0), axis=1)  # NaN where no optimizer reaches the target


def algoperf_profile(ratio: pd.DataFrame, tau: float) -> pd.Series:
    return (ratio <= tau).sum(axis=1) / ratio.shape[1]


def algoperf_score_on_grid(ratio: pd.DataFrame, points: int) -> pd.Series:
    taus = np.linspace(1.0, 4.0, points)
    frame = pd.concat([algoperf_profile(ratio, tau) for tau in taus], axis=1)
    return pd.Series(integrate.trapezoid(frame, x=taus) / 3.0, index=frame.index)


def algoperf_score_by_steps(ratio: pd.DataFrame) -> pd.Series:
    inside = [value for value in ratio.to_numpy().ravel() if value <= 4.0]
    edges = sorted({1.0, 4.0, *inside})
    areas = [algoperf_profile(ratio, low) * (high - low) for low, high in pairwise(edges)]
    return pd.concat(areas, axis=1).sum(axis=1) / 3.0


@settings(max_examples=15, deadline=None)
@given(tables())
def test_equal_algoperf(table: dict[str, dict[str, float]]) -> None:
    ratio, own = algoperf_ratios(table), scores(table)
    exact = algoperf_score_by_steps(ratio)
    assert own == pytest.approx(dict(exact), abs=1e-12)
    grid = algoperf_score_on_grid(ratio, 61)  # a step between two points of the grid is off by at most half of 0.05
    assert own == pytest.approx(dict(grid), abs=0.5 * 0.05 / 3 + 1e-9)
    for tau in (1.0, 1.5, 3.999, 4.0):
        expected = algoperf_profile(ratio, tau)
        for optimizer, row in ratios(table).items():
            assert profile(row, [tau]) == pytest.approx([expected[optimizer]])


@settings(max_examples=40, deadline=None)
@given(tables(), st.sampled_from([0.01, 3.0, 7.7]), st.data())
def test_laws(table: dict[str, dict[str, float]], unit: float, data: st.DataObject) -> None:
    workload = data.draw(st.sampled_from([*table["o0"]]))
    fastest = table | {"best": {name: 0.5 for name in table["o0"]}, "never": {name: math.inf for name in table["o0"]}}
    assert scores(fastest)["best"] == 1 and scores(fastest)["never"] == 0
    scaled = {name: row | {workload: unit * row[workload]} for name, row in table.items()}
    assert scores(scaled) == pytest.approx(scores(table), abs=1e-9)
    assume(math.isfinite(table["o0"][workload]))
    faster = table | {"o0": table["o0"] | {workload: 0.5 * table["o0"][workload]}}
    assert scores(faster)["o0"] >= scores(table)["o0"] - 1e-12
    assert all(scores(faster)[name] <= scores(table)[name] + 1e-12 for name in table if name != "o0")


def test_slower_than_four_times_the_fastest_counts_as_not_reached() -> None:
    table = {"a": {"w": 10.0}, "b": {"w": 4 * 10.0}, "c": {"w": 41.0}}
    assert ratios(table) == {"a": {"w": 1.0}, "b": {"w": MAX_RATIO}, "c": {"w": math.inf}}
    assert scores(table) == {"a": 1.0, "b": 0.0, "c": 0.0} and profile({"w": 4.0}, [3.9, 4.0]) == [0.0, 1.0]


def test_a_workload_takes_the_median_over_studies() -> None:
    results = results_of({"a": [[1, 3, math.inf], [5, math.inf, math.inf]]}, {"a": 1.5})
    assert times(results, "updates") == {"a": {"w0": 3, "w1": math.inf}}
    assert times(results, "evaluations")["a"]["w0"] == 6 and times(results, "time")["a"]["w0"] == 4.5
    even = results_of({"a": [[1, 3], [5, math.inf]]})
    assert times(even, "updates") == {"a": {"w0": 2, "w1": math.inf}}
    assert measured(results) == ["updates", "evaluations", "time"] and "time" not in measured(even)
    [standing] = standings(results, "updates", bootstrap(results, "updates"))
    assert (standing.reached, standing.sensitivity, standing.cost, standing.state) == (1, 0.5, pytest.approx(1.5), 2.0)


def test_ranks_share_ties() -> None:
    table = {name: {"w": value} for name, value in zip("abcd", (3.0, 1.0, 3.0, math.inf), strict=True)}
    assert ranks(table, "w") == {"a": 2.5, "b": 1.0, "c": 2.5, "d": None}


# -- bootstrap


def test_bootstrap_draws_studies_for_all_optimizers_together() -> None:
    """Against all 27 equally likely draws of three studies."""
    results = results_of({"a": [[1, 2, 3]], "b": [[2, 4, 6]]})
    replicas = bootstrap(results, "updates", resamples=20_000)
    assert replicas.shape == (20_000, 2, 1) and np.array_equal(replicas[:, 1], 2 * replicas[:, 0])
    draws = [median(draw) for draw in product((1, 2, 3), repeat=3)]
    for value in (1, 2, 3):
        assert np.mean(replicas[:, 0] == value) == pytest.approx(draws.count(value) / 27, abs=0.015)


def test_an_optimizer_with_more_studies_takes_the_median_of_all_of_them() -> None:
    """Against all 3125 equally likely draws of five studies, beside an optimizer with two."""
    few, many = results_of({"a": [[1, 2]]}), results_of({"b": [[1, 2, 3, 4, 5]]})
    results = dataclasses.replace(few, cells=few.cells | many.cells)
    assert times(results, "updates") == {"a": {"w0": 1.5}, "b": {"w0": 3}}
    replicas = bootstrap(results, "updates", resamples=20_000)
    draws = [median(draw) for draw in product((1, 2, 3, 4, 5), repeat=5)]
    for value in (1, 2, 3, 4, 5):
        assert np.mean(replicas[:, 1] == value) == pytest.approx(draws.count(value) / 3125, abs=0.015)
    assert {value: np.mean(replicas[:, 0] == value) for value in (1, 1.5, 2)} == pytest.approx(
        {1: 0.25, 1.5: 0.5, 2: 0.25}, abs=0.015
    )


def test_studies_that_shipped_results_lack_do_not_count_as_missed() -> None:
    shipped, own = results_of({"sgd": [[4, 2, 9]]}), results_of({"mine": [[1, 2, 3, 4, 5]]})
    merged = own.with_reference(shipped)
    assert times(merged, "updates") == {"mine": {"w0": 3}, "sgd": {"w0": 4}}
    replicas = bootstrap(merged, "updates")
    assert replicas.shape == (1000, 2, 1) and set(replicas[:, 1].flat) == {2, 4, 9}
    incomplete = dataclasses.replace(merged, shipped=frozenset())
    assert times(incomplete, "updates")["sgd"] == {"w0": 9}  # own studies that have not ended do


def test_equal_studies_have_no_width_and_one_study_has_no_interval() -> None:
    equal = summarize(results_of({"a": [[10, 10, 10], [30, 30, 30]], "b": [[20, 20, 20], [10, 10, 10]]}))
    for standing in equal.standings["updates"]:
        assert standing.score.low == standing.score.value == standing.score.high
    single = summarize(results_of({"a": [[10]], "b": [[20]]}))
    assert all(math.isnan(each.score.low) for each in single.standings["updates"])
    assert not single.comparisons["updates"]["a", "b"].distinguishable


def test_comparisons_are_differences_of_scores() -> None:
    inf = math.inf
    rows = {"a": [[1] * 3, [5] * 3, [4] * 3, [inf] * 3], "b": [[2] * 3, [5] * 3, [inf] * 3, [inf] * 3]}
    results = results_of({name: [list(map(float, row)) for row in each] for name, each in rows.items()})
    pairs = comparisons(results, "updates", bootstrap(results, "updates"))
    assert pairs["a", "b"].value == pytest.approx(3 / 4 - (2 / 3 + 1) / 4) and pairs["a", "b"].distinguishable
    assert pairs["b", "a"].value == -pairs["a", "b"].value and pairs["b", "a"].distinguishable
    nobody = results_of({"a": [[inf, inf]], "b": [[inf, inf]]})
    pair = comparisons(nobody, "updates", bootstrap(nobody, "updates"))["a", "b"]
    assert pair.value == 0 and not pair.distinguishable


# -- simulations: the fastest of ten trials, log-normal times with a standard deviation of 0.8


def simulated(rng: np.random.Generator, speeds: np.ndarray, studies: int) -> Results:
    """Returns results of optimizers with these median times of a trial, [optimizers, workloads]."""
    drawn = speeds[..., None, None] * np.exp(0.8 * rng.standard_normal((*speeds.shape, studies, 10)))
    return results_of({f"o{i}": table.tolist() for i, table in enumerate(drawn.min(axis=-1))})


@pytest.mark.parametrize("studies", [2, 3, 5])
def test_of_thirty_equal_optimizers_two_are_distinguishable_in_at_most_a_twentieth(studies: int) -> None:
    """Uncorrected intervals of pairs with the leader would exclude 0 in half of the cases."""
    rng, leagues = np.random.default_rng(studies), 25
    wrong = 0
    for _ in range(leagues):
        results = simulated(rng, np.ones((30, 9)), studies)
        pairs = comparisons(results, "updates", bootstrap(results, "updates", resamples=200))
        wrong += any(pair.distinguishable for pair in pairs.values())
    assert wrong <= 0.08 * leagues


def test_a_clear_winner_is_distinguishable() -> None:
    speeds = np.array([[1.0], [3.0], [3.1]]) * np.ones(9)
    for seed in range(10):
        results = simulated(np.random.default_rng(seed), speeds, 3)
        pairs = comparisons(results, "updates", bootstrap(results, "updates", resamples=200))
        assert pairs["o0", "o1"].low > 0 and pairs["o2", "o0"].high < 0
        assert not pairs["o1", "o2"].distinguishable


@pytest.mark.parametrize("studies", [3, 5])
def test_intervals_of_scores_cover_those_of_many_studies(studies: int) -> None:
    """About .91 in this population, whose scores of few studies are biased; 20 leagues give .91 plus or minus .03."""
    rng = np.random.default_rng(studies)
    speeds = np.exp(0.6 * rng.standard_normal((12, 9)))
    # The median over many studies is the median of the smallest of ten draws.
    many = speeds * np.exp(0.8 * stats.norm.ppf(1 - 0.5 ** (1 / 10)))
    truth = profile_scores(many)
    covered = []
    for _ in range(20):
        results = simulated(rng, speeds, studies)
        found = {each.optimizer: each.score for each in standings(results, "updates", bootstrap(results, "updates"))}
        covered += [found[f"o{i}"].low <= value <= found[f"o{i}"].high for i, value in enumerate(truth)]
    assert np.mean(covered) >= 0.85


def test_small_samples_have_the_standard_error_and_quantile_of_student() -> None:
    """Of a mean of one sample, it makes the normal interval of bootstrap deviations Student's t interval."""
    values = np.array([1.0, 2.0, 4.0])
    half = small_sample_factor(1, 3) * stats.norm.isf(0.025) * values.std() / math.sqrt(3)
    expected = stats.t.interval(0.95, 2, values.mean(), stats.sem(values))
    assert half == pytest.approx(expected[1] - values.mean())


def test_noisy_studies_widen_the_interval() -> None:
    summary = summarize(make({"fast": 2.0, "slow": 1.0, "twin": 1.0}, ("mlp", "gpt", "vit")))
    assert summary.order[0] == "fast" and summary.comparisons["updates"]["fast", "slow"].distinguishable
    standing = summary.standing("slow")
    assert (
        standing.score.low <= standing.score.value <= standing.score.high and standing.score.low < standing.score.high
    )


def test_cost_is_a_geometric_mean_over_workloads() -> None:
    results = results_of({"a": [[1.0], [1.0]], "sgd": [[1.0], [1.0]]}, {"a": 1.0, "sgd": 1.0})
    cells = dict(results.cells)
    for workload, time in (("w0", 1.0), ("w1", 4.0)):
        cells["a", workload] = dataclasses.replace(cells["a", workload], cost=UpdateCost(time, 0.0, 0.0, 2.0))
    results = dataclasses.replace(results, cells=cells)
    [standing] = [each for each in standings(results, "updates", bootstrap(results, "updates")) if each.cost != 1.0]
    assert standing.cost == pytest.approx(2.0)


def test_intervals_and_their_texts() -> None:
    for low, high, expected in ((0.1, 0.3, True), (-0.3, -0.1, True), (0.0, 0.3, False), (-0.3, 0.0, False)):
        assert Interval(0.1, low, high).distinguishable is expected
    assert Interval(0.1, -0.25, 0.75).half == 0.5
    assert formats.short_interval(Interval(0.9, 0.5, 0.995)) == "0.90 .50-1.0"
    assert formats.short_interval(Interval(0.9, 0.5, 0.9949)) == "0.90 .50-.99"
    assert formats.short_interval(Interval(0.9, math.nan, math.nan)) == "0.90" and formats.short_interval(None) == "-"
    for name, width, expected in (
        ("abcdef", 6, "abcdef"), ("abcdef", 5, "ab…ef"), ("abcdef", 4, "ab…f"), ("a.b.Cdef", 4, "Cdef"),
        ("a.b.Cdefg", 4, "Cd…g"), ("a-b.cdefg", 5, "a-…fg"), ("a.bcd", 5, "a.bcd"),
    ):  # fmt: skip
        assert formats.abbreviated(name, width) == expected
    assert formats.names(["a"]) == "a" and formats.names("abc") == "a, b and c"
    assert (
        formats.percent(0.126) == "13 %" and formats.drawn_value(0.12345) == "0.123" and formats.drawn_value(7) == "7"
    )
    assert formats.mean_and_std([0.5, 0.7, math.nan]) == "0.6 ± 0.14" and formats.mean_and_std([math.inf]) == "-"


def test_the_best_of_optimizers_that_reach_no_target() -> None:
    results = make({"a": 0.01, "b": 0.01}, ("mlp",), 2, 3)
    summary = summarize(results)
    assert all(score == 0 for score in scores(summary.times["updates"]).values())
    assert not any(summary.is_best(name, "updates") for name in ("a", "b"))


def test_profiles_at_their_steps() -> None:
    assert profile({"a": 1.0, "b": 2.0, "c": math.inf, "d": 4.0}, [1.0, 1.99, 2.0, 4.0]) == [0.25, 0.25, 0.5, 0.75]
    found = ratios({"x": {"w": 10.0, "v": math.inf}, "y": {"w": 40.0, "v": math.inf}, "z": {"w": 40.1, "v": 5.0}})
    assert found == {"x": {"w": 1.0, "v": math.inf}, "y": {"w": 4.0, "v": math.inf}, "z": {"w": math.inf, "v": 1.0}}
