"""Expected best results against the number of trials: brute force, SciPy, and the shipped results."""

import dataclasses
import math
from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from dlopt.lab.benchmark import table
from dlopt.lab.benchmark.results import Cell, Results, TrialRecord, WorkloadTarget, load_reference
from dlopt.lab.benchmark.tuning import BUDGETS, best_results, expected_best, leaders, tuning, weights
from tests.lab.benchmark.synthetic import make

VALUES = np.array([3.0, -1.0, 2.5, 2.5, 8.0, 0.125, 7.0])


@pytest.mark.parametrize("tries", range(1, len(VALUES) + 1))
def test_equals_the_mean_over_all_subsets(tries: int) -> None:
    best = [min(subset) for subset in combinations(VALUES, tries)]
    assert expected_best(VALUES, tries) == pytest.approx(np.mean(best), rel=1e-12)


@pytest.mark.parametrize("tries", [1, 3, 10, 29, 30])
def test_weights_are_those_of_the_hypergeometric_distribution(tries: int) -> None:
    """The best of n is worse than the i-th best if none of the first i is drawn."""
    none_of_first = stats.hypergeom.pmf(0, 30, np.arange(31), tries)
    assert weights(30, tries) == pytest.approx(none_of_first[:-1] - none_of_first[1:], abs=1e-12)
    assert weights(30, tries).sum() == pytest.approx(1)


def test_agrees_with_drawing() -> None:
    rng = np.random.default_rng(0)
    drawn = [rng.choice(VALUES, 3, replace=False).min() for _ in range(20_000)]
    assert expected_best(VALUES, 3) == pytest.approx(np.mean(drawn), abs=4 * stats.sem(drawn))


def test_ends_are_the_mean_and_the_best() -> None:
    assert expected_best(VALUES, 1) == pytest.approx(VALUES.mean())
    assert expected_best(VALUES, len(VALUES)) == VALUES.min()
    curve = [expected_best(VALUES, tries) for tries in range(1, len(VALUES) + 1)]
    assert curve == sorted(curve, reverse=True)


def results_of(trials: dict[str, list[tuple[float, float | None]]], metric: str = "val_loss") -> Results:
    """Optimizer -> (updates to the target, best metric) of its trials on one workload of 100 updates."""
    cells = {
        (name, "w"): Cell(
            tuple(TrialRecord(0, i, {}, updates, updates, 2.0, best, best) for i, (updates, best) in enumerate(rows)),
            None,
            ((100, 0.5),),
        )
        for name, rows in trials.items()
    }
    return Results("t", 1, 3, {"w": WorkloadTarget(metric, 0.5, 100)}, cells, {})


def test_the_best_optimizer_depends_on_the_number_of_trials() -> None:
    steady = [(20.0, 0.4)] * 3
    risky = [(10.0, 0.1), (math.inf, 1.0), (math.inf, None)]
    found = tuning(results_of({"steady": steady, "risky": risky}))
    assert found.budgets == [1, 3]
    values = {name: [each.value for each in row if each is not None] for name, row in found.scores.items()}
    # A ratio of 2 has the score 2/3 of AlgoPerf's profile up to 4; one of three risky trials has the score 1.
    assert values == {"steady": pytest.approx([2 / 3, 2 / 3]), "risky": pytest.approx([1 / 3, 1.0])}
    assert [found.leader(budget) for budget in (0, 1)] == ["steady", "risky"]
    # A failed trial counts with the median first validation, 2.
    assert found.metrics["risky", "w"] == pytest.approx([3.1 / 3, (0.1 * 2 + 1) / 3, 0.1])
    assert best_results(found, ["w"]) == [["w", "0.4 steady", "0.1 risky"]]
    expected = "Without tuning (one trial), steady has the highest expected score, 0.67. No comparison: "
    assert leaders(found)[0].startswith(expected)


def test_metrics_of_which_higher_is_better_are_maximized() -> None:
    found = tuning(
        results_of({"a": [(10.0, 3.0), (math.inf, 2.5)], "b": [(20.0, 4.0), (math.inf, 1.0)]}, "val_accuracy")
    )
    assert found.metrics["a", "w"] == pytest.approx([2.75, 3.0])
    assert best_results(found, ["w"]) == [["w", "3 b"]]


def test_a_failed_trial_counts_with_the_median_first_validation() -> None:
    results = results_of({"a": [(10.0, 0.1), (math.inf, None), (20.0, 0.4)]})
    cell = results.cells["a", "w"]
    records = [
        dataclasses.replace(record, first=first) for record, first in zip(cell.records, (1.0, 9.0, 2.0), strict=True)
    ]
    cells = {("a", "w"): dataclasses.replace(cell, records=tuple(records))}
    metrics = tuning(dataclasses.replace(results, cells=cells)).metrics["a", "w"]
    assert metrics[0] == pytest.approx((0.1 + 2.0 + 0.4) / 3)


def test_an_optimizer_with_fewer_trials_has_no_score_at_larger_budgets() -> None:
    results = results_of({"a": [(10.0, 0.4)] * 3, "b": [(20.0, 0.4)] * 2})
    found = tuning(results)
    assert found.budgets == [1, 3] and found.scores["b"][1] is None and found.leader(1) == "a"
    assert "-" in next(line for line in table.lines(results) if line.startswith("b") and "0.67" in line).split()


def test_trials_that_stop_at_their_target_have_no_expected_metric() -> None:
    results = make(studies=1, trials=3)
    found = tuning(results)
    assert found.budgets == [1, 3] and found.metrics
    records = [record for key in found.metrics for record in results.cells[key].records]
    assert not any(record.updates < results.workloads["mlp"].updates for record in records)
    unset = {name: dataclasses.replace(spec, target=math.nan) for name, spec in make().workloads.items()}
    assert tuning(dataclasses.replace(make(), workloads=unset)).budgets == []


def test_shipped_results() -> None:
    results = load_reference("small")
    assert results is not None
    found = tuning(results)
    assert found.budgets == list(BUDGETS)
    losses = [record.best for record in results.cell("soap", "gpt").records if record.best is not None]
    assert found.metrics["soap", "gpt"][-1] == pytest.approx(min(losses))
    for row in found.scores.values():
        for tries, each in zip(BUDGETS, row, strict=True):
            assert each is not None and math.isnan(each.low) == (tries > 3)  # of 30 or 50 trials
            assert math.isnan(each.low) or each.low <= each.value <= each.high
    text = "\n".join(table.lines(results))
    assert "Expected score of the best of N trials" in text and "Without tuning (one trial), " in text
    assert max(map(len, text.splitlines())) <= table.WIDTH


# -- simulations: times of 1 to 4, of which the first optimizer's first trial is known to be the fastest


def simulated(rng: np.random.Generator, optimizers: int, trials: int = 30, workloads: int = 9) -> Results:
    """Returns results of equal optimizers with costs, (updates / fastest - 1) / 3, uniform between 0 and 1."""
    cells = {}
    for i in range(optimizers):
        for w in range(workloads):
            drawn = 100 + 300 * rng.random(trials)
            times = [100.0, *drawn] if i == optimizers - 1 else [*drawn]
            records = [TrialRecord(0, n, {}, time, time, 2.0, 0.5, 0.5) for n, time in enumerate(times)]
            cells[f"o{i}", f"w{w}"] = Cell(tuple(records))
    spec = WorkloadTarget("val_loss", 0.5, 1000)
    return Results("t", 1, trials, {f"w{w}": spec for w in range(workloads)}, cells, {})


def test_intervals_cover_the_expected_score_and_the_best_of_all_trials_has_none() -> None:
    rng, covered = np.random.default_rng(0), {1: [], 3: []}  # type: dict[int, list[bool]]
    for _ in range(8):
        found = tuning(simulated(rng, 10, workloads=4))
        for name in [*found.scores][:-1]:
            row = dict(zip(found.budgets, found.scores[name], strict=True))
            for tries, inside in covered.items():
                each = row[tries]
                assert each is not None
                inside.append(each.low <= 1 - 1 / (tries + 1) <= each.high)  # the smallest of n uniform draws
            assert all(each is not None and math.isnan(each.low) for each in (row[10], row[30]))
        assert found.open[2] is None and found.open[3] is None
        assert leaders(found)[-1].endswith("No comparison: that needs 300 trials of each optimizer.")
    assert all(np.mean(inside) >= 0.9 for inside in covered.values())


def test_equal_optimizers_are_not_distinguishable_from_the_first() -> None:
    rng, leagues = np.random.default_rng(1), 10
    wrong = np.zeros(2)
    for _ in range(leagues):
        found = tuning(simulated(rng, 30, workloads=2))
        wrong += [len(found.open[budget] or []) < 29 for budget in (0, 1)]
    assert wrong.max() <= 0.1 * leagues
