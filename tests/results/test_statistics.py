import itertools
import json
import math
import sys
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import scipy.stats

from dlopt.results.ranking import (
    Spread,
    band,
    default_spread,
    default_target,
    fastest,
    importance,
    sensitivities,
    targets,
    time_to_target,
)
from tests.support.folders import make_run, table


def test_band_is_students_t_interval(tmp_path: Path) -> None:
    curves = [(0.1, 0.5, 0.8), (0.2, 0.4, 0.9), (0.3, 0.7, 0.6)]
    for seed, curve in enumerate(curves):
        make_run(tmp_path / str(seed), seed=seed, accuracies=curve)
    [row] = table(tmp_path).rows
    result = band(row.runs, "val_accuracy")
    assert result is not None
    values = np.array(curves)
    mean, error = values.mean(0), scipy.stats.sem(values, axis=0)
    np.testing.assert_allclose(result.mean, mean, rtol=1e-12)
    expected: dict[Spread, Any] = {
        "confidence": scipy.stats.t.interval(0.95, 2, mean, error),
        "std": (mean - scipy.stats.tstd(values), mean + scipy.stats.tstd(values)),
        "error": (mean - error, mean + error),
    }
    for spread, bounds in expected.items():
        np.testing.assert_allclose(result.spreads[spread], bounds, rtol=1e-12)
    low, high = result.spreads["range"]
    assert (low.tolist(), high.tolist()) == (values.min(0).tolist(), values.max(0).tolist())
    assert {name: x.tolist() for name, x in result.x.items()} == {
        "epoch": [1, 2, 3], "step": [10, 20, 30], "seconds": [1, 2, 3]
    }  # fmt: skip


def test_repetitions_of_runs_do_not_narrow_the_band(tmp_path: Path) -> None:
    for i in range(6):
        seed = i // 2
        make_run(tmp_path / str(i), seed=seed, accuracies=(0.5, 0.5 + 0.1 * seed), seconds=1 + i)
    result = table(tmp_path)
    [row] = result.rows
    assert [len(row.runs), len(row.distinct)] == [6, 3] and default_spread(result) == "range"
    assert time_to_target(row, "val_accuracy", 0.6).runs == 3


def test_default_band_is_the_range_of_few_seeds(tmp_path: Path) -> None:
    for seed in range(4):
        make_run(tmp_path / str(seed), seed=seed)
    assert default_spread(table(tmp_path)) == "range"
    make_run(tmp_path / "4", seed=4)
    assert default_spread(table(tmp_path)) == "confidence"


def test_band_requires_half_of_the_runs(tmp_path: Path) -> None:
    make_run(tmp_path / "0", seed=0, accuracies=(0.1, 0.2), config={"epochs": 4})
    make_run(tmp_path / "1", seed=1, accuracies=(0.3, 0.4, 0.5), config={"epochs": 4})
    make_run(tmp_path / "2", seed=2, accuracies=(0.2, 0.3, 0.7, 0.8), config={"epochs": 4})
    [row] = table(tmp_path).rows
    result = band(row.runs, "val_accuracy")
    assert result is not None
    assert (
        result.x["epoch"].tolist() == [1, 2, 3]
        and result.count.tolist() == [3, 3, 2]
        and result.mean[2] == pytest.approx(0.6)
    )
    assert band(row.runs, "nothing") is None


def test_band_against_seconds_averages_equal_epochs(tmp_path: Path) -> None:
    """A slower run neither begins nor ends within the curve: the mean of rising curves never falls."""
    make_run(tmp_path / "0", seed=0, accuracies=(0.1, 0.3, 0.5, 0.7), seconds=1.0, config={"epochs": 4})
    make_run(tmp_path / "1", seed=1, accuracies=(0.0, 0.2, 0.4), seconds=2.0, config={"epochs": 4})
    make_run(tmp_path / "2", seed=2, accuracies=(0.2, 0.4, 0.6, 0.8), seconds=6.0, config={"epochs": 4})
    [row] = table(tmp_path).rows
    result = band(row.runs, "val_accuracy")
    assert result is not None and result.x["seconds"].tolist() == [3, 6, 9, 12.5]  # the last epoch: 1 s and 6 s
    assert result.mean.tolist() == pytest.approx([0.1, 0.3, 0.5, 0.75])


def test_importance_of_keys(tmp_path: Path) -> None:
    """The metric is additive in the learning rate (variance 0.02) and the optimizer (0.0025), without weight decay."""
    rates, decays = [0.01, 0.1, 1.0], [0.0, 0.1]
    for i, (optimizer, lr, decay) in enumerate(itertools.product(("sgd", "adamw"), rates, decays)):
        accuracy = 0.5 + 0.1 * (optimizer == "sgd") + 0.1 * math.sqrt(3) * math.log10(lr * 10)
        make_run(
            tmp_path / str(i), optimizer=optimizer, lr=lr, accuracies=(accuracy,),
            config={"optimizer.weight_decay": decay},
        )  # fmt: skip
    result = importance(table(tmp_path))
    assert result is not None
    expected = {"optimizer.lr": 0.02 / 0.0225, "optimizer": 0.0025 / 0.0225, "optimizer.weight_decay": 0.0}
    assert result.fractions == pytest.approx(expected, abs=0.12) and not result.missing
    assert result.explained > 0.8
    assert importance(table(tmp_path)) == result  # no draw of chance


def test_noise_has_no_importance(tmp_path: Path) -> None:
    """Key importance is left out if the keys do not predict held-out configurations."""
    random = Random(0)
    for i, (optimizer, lr, decay) in enumerate(itertools.product(("sgd", "adamw"), (0.01, 0.1, 1.0), (0.0, 0.1))):
        accuracies = (random.uniform(0.5, 0.9),)
        config = {"optimizer.weight_decay": decay}
        make_run(tmp_path / str(i), optimizer=optimizer, lr=lr, accuracies=accuracies, config=config)
    assert importance(table(tmp_path)) is None


def test_importance_of_a_key_that_some_configurations_lack(tmp_path: Path) -> None:
    for i, (a, b) in enumerate(itertools.product((0.1, 0.2, 0.3), repeat=2)):
        make_run(tmp_path / str(i), accuracies=(0.5 + a,), config={"a": a, "b": b, "c": "x" if i else None})
    result = importance(table(tmp_path))
    assert result is not None and set(result.fractions) == {"a", "b", "c"} and result.fractions["a"] > 0.8


def test_importance_without_optuna_reports_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(6):
        make_run(tmp_path / str(i), lr=0.1 * (i + 1), accuracies=(0.1 * i,))
    monkeypatch.setitem(sys.modules, "optuna", None)
    result = importance(table(tmp_path))
    assert result is not None and not result.fractions and "[sweep]" in result.missing


def test_importance_requires_enough_configurations(tmp_path: Path) -> None:
    for i in range(5):
        make_run(tmp_path / str(i), lr=0.1 * (i + 1), accuracies=(0.1 * i,))
    assert importance(table(tmp_path)) is None


def test_good_learning_rates_are_adjacent_to_the_best(tmp_path: Path) -> None:
    figures = {0.001: 0.5, 0.01: 0.895, 0.1: 0.9, 0.3: 0.892, 1.0: 0.6, 3.0: 0.899}
    for i, (lr, accuracy) in enumerate(figures.items()):
        make_run(tmp_path / str(i), lr=lr, accuracies=(accuracy,))
    make_run(tmp_path / "worse", lr=0.1, accuracies=(0.7,), config={"optimizer.weight_decay": 0.1})
    make_run(tmp_path / "failed", lr=10.0, accuracies=(0.1,), status="failed")
    make_run(tmp_path / "other", optimizer="adamw", lr=0.1, accuracies=(0.1,))  # one rate is no curve
    [result] = sensitivities(table(tmp_path))
    assert result.optimizer == "sgd" and result.good == (0.01, 0.3) and result.tolerance == 0.01
    assert {lr: value.mean for lr, value in result.best} == figures
    assert len(result.points) == 7 and result.failed == [10.0]


def test_variance_over_seeds_widens_the_tolerance(tmp_path: Path) -> None:
    for i, (lr, accuracies) in enumerate([(0.01, (0.6, 0.8)), (0.1, (0.7, 0.9)), (1.0, (0.2, 0.4))]):
        for seed, accuracy in enumerate(accuracies):
            make_run(tmp_path / f"{i}-{seed}", lr=lr, seed=seed, accuracies=(accuracy,))
    [result] = sensitivities(table(tmp_path))
    assert result.tolerance == pytest.approx(math.sqrt(0.02)) and result.good == (0.01, 0.1)


def test_a_rate_that_diverges_for_some_seeds_does_not_widen_the_tolerance(tmp_path: Path) -> None:
    for lr, losses in {0.01: (2.3, 2.31), 0.1: (0.24, 0.26), 1.0: (0.31, 0.33), 10.0: (2.0, 145.0)}.items():
        for seed, loss in enumerate(losses):
            make_run(tmp_path / f"{lr}-{seed}", lr=lr, seed=seed, accuracies=(0.5,), losses=(loss,))
    [result] = sensitivities(table(tmp_path, "val_loss"))
    assert result.good == (0.1, 0.1) and result.tolerance == pytest.approx(math.sqrt(2) * 0.01)


def test_time_to_a_generalization_gap(tmp_path: Path) -> None:
    path = make_run(tmp_path / "0", accuracies=(0.5, 0.6, 0.7))
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    changed = [{**line, "train_loss": line["val_loss"] - 0.3 + 0.1 * i} for i, line in enumerate(lines)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in changed))
    [row] = table(tmp_path, "gap").rows
    result, curve = time_to_target(row, "gap", 0.25), band(row.runs, "gap")
    assert result.count == 1 and result.steps is not None and result.steps.mean == 20
    assert curve is not None and curve.mean.tolist() == pytest.approx([0.3, 0.2, 0.1])


def test_time_to_target(tmp_path: Path) -> None:
    make_run(tmp_path / "0", seed=0, accuracies=(0.5, 0.8, 0.7, 0.9))
    make_run(tmp_path / "1", seed=1, accuracies=(0.5, 0.6, 0.7, 0.9), seconds=2.0)
    make_run(tmp_path / "2", seed=2, accuracies=(0.5, 0.6, 0.65, 0.6))
    make_run(tmp_path / "3", seed=3, accuracies=(0.5,) * 4, status="failed")
    make_run(tmp_path / "4", seed=4, accuracies=(0.5,) * 4, status="interrupted")  # may still reach it
    [row] = table(tmp_path).rows
    result = time_to_target(row, "val_accuracy", 0.7)
    assert (result.count, result.runs) == (2, 4) and result.steps is not None and result.seconds is not None
    assert result.steps.mean == 25 and result.seconds.mean == (2 + 6) / 2
    assert time_to_target(row, "val_accuracy", 0.95).steps is None
    loss = time_to_target(row, "val_loss", 0.31)
    assert loss.steps is not None and loss.steps.mean == 25


def test_configurations_whose_runs_all_reach_the_target_come_first(tmp_path: Path) -> None:
    for lr, late in ((0.1, (0.5, 0.5)), (0.2, (0.8, 0.5)), (0.3, (0.8, 0.8))):  # 1, 2 and 3 of 3 runs
        for seed, top in enumerate((0.9, *late)):
            slow = (0.5,) * round(20 * lr)
            make_run(tmp_path / f"{lr}-{seed}", lr=lr, seed=seed, accuracies=(*slow, top), config={"epochs": 9})
    make_run(tmp_path / "never", lr=0.4, accuracies=(0.5,))
    result = fastest(table(tmp_path), 0.8)
    assert [(row.values["optimizer.lr"], each.count) for row, each in result] == [(0.3, 3), (0.2, 2), (0.1, 1)]
    steps = [each.steps.mean for _, each in result if each.steps is not None]
    assert steps == sorted(steps, reverse=True)


@pytest.mark.parametrize(
    ("by", "expected"), [(None, 0.712), ("val_loss", 0.288)]  # of 0.5, 0.7129, 0.9 and of one minus these
)  # fmt: skip
def test_half_of_the_configurations_reach_the_default_target(tmp_path: Path, by: str | None, expected: float) -> None:
    for i, accuracy in enumerate((0.5, 0.7129, 0.9)):
        make_run(tmp_path / str(i), lr=0.1 * (i + 1), accuracies=(accuracy,))
    result = table(tmp_path, by)
    target = default_target(result)
    assert target == expected  # three digits, rounded to the easier side
    assert target is not None and sum(time_to_target(row, result.by, target).count for row in result.rows) == 2


@pytest.mark.parametrize(("loss", "expected"), [(123.4, 124.0), (1.2341, 1.24), (0.0012341, 0.00124), (1e-301, 1e-301)])
def test_targets_have_three_digits_at_every_scale(tmp_path: Path, loss: float, expected: float) -> None:
    make_run(tmp_path / "0", accuracies=(0.5,), losses=(loss,))
    assert default_target(table(tmp_path, "val_loss")) == pytest.approx(expected, rel=1e-12, abs=0)


@pytest.mark.parametrize("by", ["val_accuracy", "val_loss"])
@pytest.mark.parametrize("count", [1, 4, 20])
def test_the_given_fractions_of_the_configurations_reach_the_targets(tmp_path: Path, by: str, count: int) -> None:
    for i in range(count):
        make_run(tmp_path / str(i), lr=0.1 * (i + 1), accuracies=(0.5 + 0.02 * i,))
    result = table(tmp_path, by)
    reached = [sum(time_to_target(row, by, target).count for row in result.rows) for target in targets(result)]
    assert reached == [int(fraction * count) + 1 for fraction in (0.1, 0.25, 0.5, 0.75, 0.9)]  # at least the fraction
