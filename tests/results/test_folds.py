"""Cross-validation in a leaderboard: folds are the blocks, seeds are averaged within them, the last epoch counts."""

import csv
import math
import statistics
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from dlopt.results import paper
from dlopt.results.columns import summary_csv
from dlopt.results.ranking import Ranking, band
from dlopt.results.simultaneous import compare
from tests.support.folders import make_run, table

LAST = (
    "folds: the last epoch counts, because the fold would choose the best one; test metrics are those of the best "
    "epoch, which the fold chose"
)
VALUES = {
    1.0: ((0.90, 0.92), (0.80, 0.81), (0.85, 0.84), (0.95, 0.96)),
    2.0: ((0.88, 0.91), (0.79, 0.77), (0.84, 0.84), (0.90, 0.92)),
}
"""By learning rate: the accuracies of four folds, with two seeds each."""


def run(
    folder: Path, lr: float, fold: int, value: float, *, seed: int = 0, folds: int = 4, status: str = "finished"
) -> None:
    config = {"data.folds": folds, "data.fold": fold}
    typed = [f"optimizer.lr={lr}", f"seed={seed}", *(f"{key}={each}" for key, each in config.items())]
    accuracies = (0.1, 0.99, value)  # the best epoch is not the last one
    path = folder / f"{lr}-{folds}-{fold}-{seed}"
    make_run(path, lr=lr, seed=seed, accuracies=accuracies, config=config, overrides=typed, status=status)


def four(folder: Path) -> Ranking:
    for lr, folds in VALUES.items():
        for fold, values in enumerate(folds):
            for seed, value in enumerate(values):
                run(folder, lr, fold, value, seed=seed)
    return table(folder)


def said(ranking: Ranking) -> dict[str, list[int]]:
    return {each.text: list(each.ranks) for each in ranking.remarks}


def test_folds_are_the_blocks_of_one_row(tmp_path: Path) -> None:
    ranking = four(tmp_path)
    first, second = ranking.rows
    means = {lr: [statistics.fmean(values) for values in folds] for lr, folds in VALUES.items()}
    assert (first.label, second.label, first.count("val_accuracy")) == ("lr=1", "lr=2", "4 folds × 2 seeds")
    assert first.value is not None and second.difference is not None and second.difference.high is not None
    assert first.value.count == 4 and second.difference.count == 4
    assert first.value.mean == pytest.approx(statistics.fmean(means[1.0]))
    assert first.value.std == pytest.approx(statistics.stdev(means[1.0]))
    gaps = np.array(means[2.0]) - np.array(means[1.0])
    half = stats.t.isf(0.02, 3) * gaps.std(ddof=1) * math.sqrt(1 / 4 + 1 / 3)
    assert second.difference.mean == pytest.approx(gaps.mean())
    assert second.difference.high - second.difference.mean == pytest.approx(half)
    assert said(ranking)[LAST] == [1, 2] and set(said(ranking)) == {LAST, *ends(ranking)}
    assert "4 folds cannot tell differences below" in ranking.verdict
    assert ranking.verdict.endswith("; more seeds would not shrink the part of the folds")
    assert first.command == "dlopt train -m optimizer.lr=1.0 data.folds=4 seed=0,1 data.fold=0,1,2,3"
    assert "over folds" in paper.markdown(ranking, made="now", test=False, top=9)
    head, *lines = csv.DictReader(summary_csv(ranking, None, test=False).splitlines())
    assert float(head["val_accuracy"]) == pytest.approx(first.value.mean) and [each["pairs"] for each in lines] == ["4"]


def ends(ranking: Ranking) -> set[str]:
    """Returns the remark on the learning rates: only two were tried."""
    return {each.text for each in ranking.remarks if each.text.startswith("best at the end")}


def test_a_row_without_all_folds_is_behind_and_not_compared(tmp_path: Path) -> None:
    four(tmp_path)
    for fold in range(3):
        run(tmp_path, 3.0, fold, 0.98)
    for fold in range(5):
        run(tmp_path, 4.0, fold, 0.7, folds=5)
    make_run(tmp_path / "without", lr=5.0, accuracies=(0.1, 0.6))
    ranking = table(tmp_path)
    labels = {row.label: (row.count("val_accuracy"), row.difference is not None) for row in ranking.rows}
    assert list(labels.values()) == [
        ("4 folds × 2 seeds", False), ("4 folds × 2 seeds", True), ("5 folds", False), ("1", False),
        ("3 of 4 folds", False),
    ]  # fmt: skip
    found = said(ranking)
    assert found["warning: other folds than #1, so not comparable with it"] == [3, 4, 5]
    assert found["a mean over some of the folds: the others may be harder"] == [5]
    assert not any("common seeds" in text for text in found)


def test_other_seeds_in_the_folds_and_an_early_end_are_said(tmp_path: Path) -> None:
    for fold in range(3):
        run(tmp_path, 1.0, fold, 0.9 + fold / 100)
        run(tmp_path, 2.0, fold, 0.7 + fold / 90, seed=fold % 2, status="stopped_early")
    found = said(table(tmp_path))
    assert found["warning: its folds have not the same seeds, or not those of #1"] == [2]
    assert [ranks for text, ranks in found.items() if text.startswith("warning: stopped early")] == [[2]]


@pytest.mark.parametrize(("count", "by"), [(1, "one fold"), (2, "at most two folds")])
def test_few_folds_are_no_evidence(tmp_path: Path, count: int, by: str) -> None:
    for fold in range(count):
        run(tmp_path, 1.0, fold, 0.9 + fold / 100)
        run(tmp_path, 2.0, fold, 0.1)
    advice = "3 to 4 folds tell a gain from luck: data.folds=4 data.fold=0,1,2,3"
    assert table(tmp_path).verdict == f"verdict: lr=1 is first, by {by} each: {advice}"


def test_a_failed_fold_leaves_no_interval(tmp_path: Path) -> None:
    four(tmp_path)
    run(tmp_path, 3.0, 0, 0.5, status="failed")
    for fold in range(1, 4):
        run(tmp_path, 3.0, fold, 0.97)
    row = table(tmp_path).rows[-1]
    assert row.label == "lr=3" and row.difference is None and row.count_with_failed("val_accuracy").endswith("1 failed")


def test_runs_without_folds_are_as_those_that_lack_the_keys(tmp_path: Path) -> None:
    make_run(tmp_path / "older", seed=0, accuracies=(0.99, 0.8))
    make_run(tmp_path / "today", seed=1, accuracies=(0.99, 0.8), config={"data.folds": None, "data.fold": None})
    [row] = table(tmp_path).rows
    assert row.value is not None and row.value.mean == pytest.approx(0.99) and row.count("val_accuracy") == "2"


def test_intervals_of_folds_are_wider_in_both_branches() -> None:
    rng = np.random.default_rng(3)
    quiet = 0.01 * rng.standard_normal((4, 5)) - np.arange(4)[:, None]
    noisy = quiet.copy()
    noisy[3] += 50 * rng.standard_normal(5) - 500
    for values in (quiet, noisy):
        rows = [dict(enumerate(row.tolist())) for row in values]
        found, as_seeds = compare(rows, overlap=1 / 4), compare(rows)
        for i, (each, other) in enumerate(zip(found.differences, as_seeds.differences, strict=True)):
            assert each is not None and other is not None and each.high is not None and other.high is not None
            assert (each.high - each.mean) / (other.high - other.mean) == pytest.approx(1.5)  # sqrt(.45 / .2)
            assert found.half_width(i, 50) / as_seeds.half_width(i, 50) == pytest.approx(math.sqrt(0.27 / 0.02))


def test_a_band_of_folds_is_wider(tmp_path: Path) -> None:
    ranking = four(tmp_path)
    runs = ranking.rows[0].runs
    curve = band(runs, "val_accuracy")
    assert curve is not None
    values = np.array([run.history[-1]["val_accuracy"] for run in runs])
    error = values.std(ddof=1) * math.sqrt(1 / 8 + 1 / 3)
    assert curve.spreads["error"][1][-1] - curve.mean[-1] == pytest.approx(error)
