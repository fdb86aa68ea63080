"""The thresholds from which on a symptom is reported."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import pytest

from dlopt.lab.benchmark import symptoms
from dlopt.lab.benchmark.results import Cell, Results, TrialRecord, WorkloadTarget


def trial(number: int, lr: float, decay: float = 0.1, **changed: Any) -> TrialRecord:
    record = TrialRecord(
        0, number, {"optimizer.lr": lr, "optimizer.weight_decay": decay}, math.inf, math.inf, 2.0, 1.0, 1.0
    )
    return dataclasses.replace(record, **changed)


def results_of(records: Sequence[TrialRecord], metric: str = "val_loss", space: str | None = None) -> Results:
    spaces = {"a": {} if space is None else {"optimizer.lr": space}}
    cells = {("a", name): Cell(tuple(records)) for name in ("w", "x")}
    return Results("t", 1, 10, {name: WorkloadTarget(metric, 0.5, 100) for name in ("w", "x")}, cells, spaces)


def rules(results: Results) -> dict[str, tuple[int, int]]:
    found = symptoms.symptoms(results, "a")
    return {row["rule"]: (row.get("count", 0), row.get("total", 0)) for row in found}


def test_thresholds_of_rising_losses() -> None:
    """Nine of ten trials; those that failed for another reason do not count, and equal values do not rise."""
    rising, falling = {"last": 3.0, "best": 2.0}, {"last": 1.5}
    for worse, is_found in ((9, True), (8, False)):
        trials = [trial(i, 0.01 * i + 0.01, **(rising if i < worse else falling)) for i in range(10)]
        assert ("rising" in rules(results_of(trials))) is is_found
        assert rules(results_of(trials)).get("rising") == ((2 * worse, 20) if is_found else None)
    equal = [trial(i, 0.01 * i + 0.01, last=2.0) for i in range(10)]
    assert "rising" not in rules(results_of(equal)) and "rising" not in rules(results_of(equal, "val_accuracy"))
    higher = [trial(i, 0.01 * i + 0.01, last=3.0) for i in range(10)]
    assert "rising" not in rules(results_of(higher, "val_accuracy")) and "rising" in rules(results_of(higher))
    diverged = [trial(i, 0.01 * i + 0.01, last=None, failure="the loss became nan") for i in range(10)]
    assert rules(results_of(diverged))["rising"] == (20, 20)
    crashed = [trial(i, 0.01 * i + 0.01, last=None, failure="a worker died") for i in range(10)]
    assert "rising" not in rules(results_of(crashed)) and rules(results_of(crashed))["failures"] == (20, 20)


def test_thresholds_of_failures_and_targets() -> None:
    for failed, is_found in ((3, True), (2, False)):
        trials = [
            trial(i, 0.01 * i + 0.01, last=None if i < failed else 1.0 - i / 100, failure="x" * (i < failed))
            for i in range(10)
        ]
        assert ("failures" in rules(results_of(trials))) is is_found
    reached = [trial(i, 0.01 * i + 0.01, updates=50.0 if i < 3 else math.inf, last=1 - i / 100) for i in range(10)]
    assert "no target" not in rules(results_of(reached))
    assert rules(results_of([trial(0, 0.1), trial(1, 0.2, last=0.9)]))["no target"] == (0, 4)


def test_thresholds_of_hyperparameters_without_effect() -> None:
    """Of ten pairs, nine equal ones are suspicious: five trials, of which one differs from the others in one pair."""
    equal = [trial(i, 0.1 + i / 10) for i in range(5)]
    assert rules(results_of(equal))["without effect"] == (20, 20)
    different = [*equal[:4], trial(4, 0.5, last=0.2)]
    assert "without effect" not in rules(results_of(different))
    for factor, is_found in ((10.0, True), (9.9, False)):
        near = [trial(0, 0.1, best=1.0, last=1.0), trial(1, 0.1 * factor, best=1.05, last=1.05)]
        assert ("little effect" in rules(results_of(near))) is is_found
    for last, is_found in ((2.0, True), (2.01, False)):  # a tenth of the progress from 11 to 1
        near = [trial(0, 0.1, first=11.0), trial(1, 1.0, first=11.0, last=last)]
        assert ("little effect" in rules(results_of(near))) is is_found
    for updates, is_found in ((110.0, True), (111.0, False), (math.inf, False)):
        near = [trial(0, 0.1, updates=100.0), trial(1, 1.0, updates=updates, last=1.01)]
        assert ("little effect" in rules(results_of(near))) is is_found


def test_pairs_that_differ_in_one_key_and_ratios() -> None:
    a, b = trial(0, 0.1, 0.1), trial(1, 0.2, 0.3)
    assert symptoms._differ_only_in("optimizer.lr", (a, b)) and not symptoms._differ_only_in(
        "optimizer.lr", (a, b), 2.9
    )
    assert not symptoms._differ_only_in("optimizer.lr", (a, trial(1, 0.2, 0.31)))
    assert symptoms._ratio((a, b), "optimizer.lr") == symptoms._ratio((b, a), "optimizer.lr") == 2.0
    for value in (0.0, -1.0, True, "x", None):
        other = dataclasses.replace(b, values={"optimizer.lr": value})
        assert symptoms._ratio((a, other), "optimizer.lr") == 0.0
        assert symptoms._differ_only_in(
            "optimizer.weight_decay", (a, dataclasses.replace(other, values={"optimizer.lr": 0.1}))
        )
    missing = dataclasses.replace(a, first=None)
    assert (
        not symptoms._are_similar(missing, a) and not symptoms._are_similar(a, missing) and symptoms._are_similar(a, a)
    )


@pytest.mark.parametrize(
    ("space", "expected"),
    [
        ("tag(log, interval(0.001, 1.0))", (0.001, 1.0, True)),
        ("interval(-1, 2)", (-1.0, 2.0, False)),
        ("tag(log, interval(0, 1))", None),
        ("interval(1, 1)", None),
        ("choice(1,2)", None),
        ("0.1", None),
        ("interval(", None),
    ],
)
def test_ranges_of_search_spaces(space: str, expected: object) -> None:
    assert symptoms.search_range(space) == expected


def test_best_trials_at_the_ends_of_a_range() -> None:
    for rate, side in (
        (0.001, "lowest"),
        (0.00199, "lowest"),
        (0.002, None),
        (0.5, None),
        (0.6, "highest"),
        (1.0, "highest"),
    ):
        best = trial(0, rate, updates=10.0, last=0.3)
        rows = list(
            symptoms.range_ends(results_of([best, trial(1, 0.02)], space="tag(log, interval(0.001, 1.0))"), "a")
        )
        assert [key for row in rows for key in symptoms.SIDES if row[key]] == ([] if side is None else [side]), rate
        assert all(row["total"] == 2 and row["range"] == "0.001 to 1" for row in rows)
    for rate, side in ((0.1, "lowest"), (0.11, None), (0.9, "highest"), (0.89, None), (0.0, "lowest")):
        rows = list(symptoms.range_ends(results_of([trial(0, rate)], space="interval(0, 1)"), "a"))
        assert [key for row in rows for key in symptoms.SIDES if row[key]] == ([] if side is None else [side]), rate
