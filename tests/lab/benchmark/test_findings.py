"""Findings: wrong optimizers and narrow searches are named, healthy ones are not."""

import dataclasses
import math

import pytest

from dlopt.lab.benchmark.findings import Observation, findings
from dlopt.lab.benchmark.results import Cell, Results, TrialRecord, WorkloadTarget
from dlopt.lab.benchmark.scores import summarize
from dlopt.lab.benchmark.symptoms import RANGE_HEADS, range_ends, range_rows, search_range, symptoms
from tests.lab.benchmark.synthetic import flipped, ignores_both, ignores_lr, make

WORKLOADS = ("mlp", "vit", "gpt")
HEALTHY = {"muon": 2.2, "adamw": 1.4, "twin": 1.4, "rmsprop": 1.1}


def texts(results: Results, *, warnings: bool) -> str:
    found: list[Observation] = findings(results, summarize(results))
    return "\n".join(each.text for each in found if each.is_warning == warnings)


def sentences(results: Results, optimizer: str) -> list[str]:
    """Returns the sentences about the symptoms of an optimizer, without its name."""
    found = [each.text for each in findings(results, summarize(results)) if each.is_warning]
    count = len(symptoms(results, optimizer))
    assert sum(each.startswith(f"{optimizer} ") for each in found) == count
    return [each.removeprefix(f"{optimizer} ") for each in found if each.startswith(f"{optimizer} ")]


def test_healthy_optimizers_have_no_symptoms() -> None:
    results = make(HEALTHY, WORKLOADS)
    assert all(not symptoms(results, optimizer) for optimizer in HEALTHY)
    assert "muon" not in texts(results, warnings=True)


def test_ends_of_search_ranges_are_named_also_of_a_single_workload() -> None:
    results = make({"narrow": 1.5, "adamw": 1.4}, ("mlp",), ranges={"narrow": (1e-4, 1.5e-3)})
    at_ends = {row["key"]: (row["lowest"], row["highest"]) for row in range_ends(results, "narrow")}
    assert at_ends["optimizer.lr"] == ([], ["mlp"])
    assert "optimizer.lr" not in {row["key"] for row in range_ends(results, "adamw")}
    assert not any("optimizer.lr" in text for text in sentences(results, "narrow"))  # one workload may be luck
    assert RANGE_HEADS == ("Optimizer", "Key", "Range", "In the lowest 10 %", "In the highest 10 %")
    [row] = [each for each in range_rows(results, ["narrow", "adamw"]) if each[1] == "optimizer.lr"]
    assert row == ["narrow", "optimizer.lr", "0.0001 to 0.0015", "-", "mlp"]


def test_wrong_optimizers_are_named() -> None:
    behaviours = {"flip": flipped, "fixed": ignores_both, "decays": ignores_lr}
    ranges = {"narrow": (1e-4, 1.5e-3), "wide": (1e-9, 1e-6)}
    speeds = {"flip": 1.0, "fixed": 1.5, "decays": 1.5, "narrow": 1.5, "wide": 1.0, "adamw": 1.4}
    results = make(speeds, WORKLOADS, behaviours=behaviours, ranges=ranges)
    found = {optimizer: sentences(results, optimizer) for optimizer in speeds}
    assert found["flip"] == [
        "ends worse than it begins, or diverges, in all of its 90 trials: is the sign of the update right?"
    ]
    assert found["fixed"] == [
        "ignores optimizer.lr and optimizer.weight_decay: all pairs of trials with the same seed and different values "
        "end equally."
    ]
    hardly = found["decays"][0]  # weight decay works
    assert hardly.startswith("hardly depends on optimizer.lr: ") and "trials whose values differ 10-fold" in hardly
    [narrow] = found["narrow"]
    assert "in the highest 10 % of the search range of optimizer.lr (0.0001 to 0.0015) on 3 of 3 workloads" in narrow
    assert any(text.startswith("reaches no target in any of its 90 trials") for text in found["wide"])
    assert found["adamw"] == []
    warnings = texts(results, warnings=True)
    assert "flip ends worse" in warnings and "adamw" not in warnings


def accuracy_results(first: float, last: float, failure: str = "") -> Results:
    end = None if failure else last
    records = [
        TrialRecord(
            0, i, {"optimizer.lr": 0.1 * (i + 1)}, math.inf, math.inf, first, max(first, last) - 0.01 * i, end, failure
        )
        for i in range(4)
    ]
    workloads = {"w": WorkloadTarget("val_accuracy", 0.99, 100)}
    return Results("t", 1, 4, workloads, {("mine", "w"): Cell(tuple(records))}, {"mine": {}})


def test_accuracies_are_better_when_higher() -> None:
    assert not any("sign" in text for text in sentences(accuracy_results(0.1, 0.9), "mine"))
    assert any("sign" in text for text in sentences(accuracy_results(0.9, 0.1), "mine"))


def test_failures_are_no_divergence() -> None:
    found = sentences(accuracy_results(0.5, 0.5, "CUDA out of memory"), "mine")
    assert not any("sign" in text for text in found)
    assert found[-1] == "fails in 4 of 4 trials, most often with: CUDA out of memory."
    diverged = accuracy_results(0.5, 0.5, "the loss became nan at update 3")
    assert any("sign" in text for text in sentences(diverged, "mine"))


def test_counts_of_trials_are_stated() -> None:
    def made(trials: list[TrialRecord], studies: int) -> Results:
        spec = {"w": WorkloadTarget("val_loss", 0.5, 100)}
        return Results("t", studies, len(trials) // studies, spec, {("mine", "w"): Cell(tuple(trials))}, {"mine": {}})

    missed = TrialRecord(1, 0, {}, math.inf, math.inf, 2.0, 0.8, 0.8)
    found = sentences(made([TrialRecord(0, 0, {}, 10, 10, 2.0, 0.4, 0.4), missed], 2), "mine")
    assert found == ["reaches no target in half of its studies (1 of 2 trials reach theirs)."]
    rising = [TrialRecord(0, i, {}, math.inf, math.inf, 2.0, 2.0, 1.0 if i == 9 else 3.0) for i in range(10)]
    [text] = sentences(made(rising, 1), "mine")
    assert (
        text == "ends worse than it begins, or diverges, in 9 of 10 trials (w 9/10): is the sign of the update right?"
    )


def test_leaders_and_equals() -> None:
    text = texts(make(HEALTHY, WORKLOADS), warnings=False)
    assert "In updates, muon has the highest score" in text and "In time, muon" in text
    tied = texts(make({"adamw": 1.4, "twin": 1.4}, WORKLOADS), warnings=False)
    assert "Not distinguishable from it" in tied
    assert "is alone" in texts(make({"adamw": 1.4}, WORKLOADS), warnings=False)
    nobody = make({"a": 0.01, "b": 0.01}, WORKLOADS)
    assert texts(nobody, warnings=False) == "No optimizer reaches a target."


def test_own_optimizer_is_compared_with_the_shipped_ones() -> None:
    reference = make({"muon": 2.2, "sgd": 0.75, "bad": 1.0}, WORKLOADS, behaviours={"bad": flipped})
    results = make({"mine": 1.4}, WORKLOADS, studies=3, trials=10).with_reference(reference)
    assert (
        "mine is number 2 of 4 in updates. Its score is higher than that of sgd and bad, and lower than that of muon."
    ) in texts(results, warnings=False)
    assert "bad" not in texts(results, warnings=True)  # nobody can mend shipped results
    smaller = make({"mine": 1.4}, WORKLOADS, studies=2, trials=5).with_reference(reference)
    assert "The budget is 2 studies of 5 trials; the shipped results have 3 studies" in texts(smaller, warnings=True)
    larger = make({"mine": 1.4}, WORKLOADS, studies=3, trials=12).with_reference(reference)
    assert "shipped results have only 3 studies of 10 trials" in texts(larger, warnings=True)


def test_incomplete_results() -> None:
    results = make(HEALTHY, WORKLOADS, costs=False)
    key = ("muon", "mlp")
    results = dataclasses.replace(results, cells=results.cells | {key: results.cells[key].truncated(3, 4, "val_loss")})
    warnings = texts(results, warnings=True)
    assert "18 of 360 trials have not ended" in warnings and "no score in time" in warnings
    assert "The scores come from 3 studies. Scores of two optimizers are distinguishable if they differ by" in warnings
    assert "No optimizer reaches the target of hard" in texts(_with_hard_workload(results), warnings=True)
    assert "One study has no interval" in texts(make(HEALTHY, WORKLOADS, studies=1), warnings=True)


def _with_hard_workload(results: Results) -> Results:
    return dataclasses.replace(results, workloads={**results.workloads, "hard": WorkloadTarget("val_loss", 0.0, 400)})


def test_a_missing_cost_of_a_reached_target_leaves_no_score_in_time() -> None:
    results = make({"muon": 2.2, "sgd": 0.75}, ("mlp", "vit"))
    cell = results.cell("muon", "vit")
    assert any(record.reached for record in cell.records)
    cells = {**results.cells, ("muon", "vit"): dataclasses.replace(cell, cost=None)}
    partial = dataclasses.replace(results, cells=cells)
    assert summarize(partial).standing("muon", "time").cost is None
    warnings = [each.text for each in findings(partial, summarize(partial)) if each.is_warning]
    assert "No time per update was measured for muon: no score in time." in warnings


def test_without_complete_costs_there_is_no_time() -> None:
    """As in the report of a benchmark that is interrupted while it measures the costs."""
    results = make({"muon": 2.2, "adam": 2.0}, ("mlp", "vit"))
    cells = {
        key: dataclasses.replace(cell, cost=cell.cost if key[1] == "mlp" else None)
        for key, cell in results.cells.items()
    }
    partial = dataclasses.replace(results, cells=cells)
    summary = summarize(partial)
    assert summary.measures == ["updates"]
    warnings = [each.text for each in findings(partial, summary) if each.is_warning]
    assert "The time per update was not measured on all workloads: there is no score in time." in warnings


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tag(log, interval(1e-4, 1.0))", (1e-4, 1.0, True)),
        ("tag(log,interval(0.001,0.1))", (0.001, 0.1, True)),
        ("interval(0.8, 0.99)", (0.8, 0.99, False)),
        ("choice(1,2,5)", None),
        ("true", None),
        ("range(1, 5)", None),
        ("tag(log, interval(", None),
    ],
)
def test_search_range(text: str, expected: tuple[float, float, bool] | None) -> None:
    assert search_range(text) == expected
