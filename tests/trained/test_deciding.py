"""Temperatures and thresholds against SciPy and scikit-learn."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import optimize
from sklearn import metrics

from dlopt.basics.errors import UserError
from dlopt.losses import CrossEntropy
from dlopt.tasks.classification import Classification
from dlopt.trained.deciding import choose, temperature, threshold
from dlopt.trained.decision import MOST_PROBABLE


def drawn(seed: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns outputs [N, K], with ties in every second set, and targets; in one set of three a class is absent."""
    draws = np.random.default_rng(seed)
    targets = draws.integers(0, classes - (seed % 3 == 0 and classes > 2), 60 + seed)
    outputs = draws.normal(size=(len(targets), classes)) * 3 + 2.0 * np.eye(classes)[targets]
    outputs = np.round(outputs) if seed % 2 else outputs
    return torch.from_numpy(outputs), torch.from_numpy(targets)


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("seed", range(10))
def test_the_temperature_minimizes_the_log_loss(seed: int, classes: int) -> None:
    outputs, targets = drawn(seed, classes)

    def loss(logarithm: float) -> float:
        scaled = outputs.numpy() / np.exp(logarithm)
        scaled -= scaled.max(1, keepdims=True)
        return float(np.mean(np.log(np.exp(scaled).sum(1)) - scaled[np.arange(len(targets)), targets.numpy()]))

    found = temperature(outputs, targets)
    assert found is not None
    assert loss(np.log(found)) <= min(map(loss, np.linspace(-5, 5, 2001))) + 1e-15
    expected = optimize.minimize_scalar(loss, bounds=(-5, 5), options={"xatol": 1e-10}).x
    assert np.log(found) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    "outputs",
    [
        [[2.0, 1.0], [-1.0, 3.0]],  # right: the loss falls down to a temperature of 0
        [[0.0, 1.0], [1.0, 0.0]],  # wrong: it falls up to an infinite one
        [[1.0, 1.0], [2.0, 2.0]],  # constant: no temperature changes it
    ],
)
def test_no_temperature_without_a_minimum(outputs: list[list[float]]) -> None:
    assert temperature(torch.tensor(outputs).double(), torch.tensor([0, 1])) is None


@pytest.mark.parametrize("seed", range(10))
def test_the_decision_is_that_of_scikit_learn(seed: int) -> None:
    """Both thresholds, and the metrics of another set with the decision."""
    (outputs, targets), (others, labels) = drawn(seed, 2), drawn(seed + 100, 2)
    task, loss = Classification(2), CrossEntropy(label_smoothing=0.0, class_weights=None, classes=2)
    parts = task.evaluated(outputs, targets, loss), task.evaluated(others, labels, loss)
    precision, recall, _ = metrics.precision_recall_curve(targets == 1, outputs[:, 1] - outputs[:, 0])
    with np.errstate(invalid="ignore"):
        best = np.nanmax(2 * precision * recall / (precision + recall))
    for rule, reached in (("f1", best), ("recall:0.7", 0.7), ("recall:1", 1.0), (MOST_PROBABLE, None)):
        found = choose(rule, Path("best.pt"), "0" * 64, *parts, ("no", "yes"))
        assert (found.positive_class, found.samples) == (None if reached is None else "yes", len(targets))
        scores = ((outputs[:, 1] - outputs[:, 0]) / found.temperature).sigmoid()
        if found.threshold is not None:
            value = metrics.f1_score if rule == "f1" else metrics.recall_score
            # The largest of the scores that do: the threshold is below it, and above the next one.
            least = max(each for each in scores.unique() if value(targets, scores >= each) >= reached - 1e-12)
            assert ((scores >= found.threshold) == (scores >= least)).all() and found.threshold not in scores
            assert found.validation["f1" if rule == "f1" else "recall"] == pytest.approx(
                value(targets, scores >= least)
            )
        for before, shown in ((True, found.test_before), (False, found.test_after)):
            probabilities = (others if before else others / found.temperature).softmax(1)
            predictions = probabilities.argmax(1)
            if found.threshold is not None and not before:
                predictions = (probabilities[:, 1] >= found.threshold).long()
            expected = {"accuracy": metrics.accuracy_score(labels, predictions)}
            if found.threshold is not None:
                expected["precision"] = metrics.precision_score(labels, predictions)
                expected["recall"] = metrics.recall_score(labels, predictions)
                expected["f1"] = metrics.f1_score(labels, predictions)
            expected["log_loss"] = metrics.log_loss(labels, probabilities)
            assert {name: shown[name] for name in expected} == pytest.approx(expected, abs=1e-12)


def test_thresholds_at_the_ends_of_the_scores() -> None:
    truth = torch.tensor([True, False])
    for scores, expected in (([0.5, 0.25], 0.375), ([0.25, 0.5], 0.125), ([0.0, 1.0], 0.0), ([1e-323, 5e-324], 1e-323)):
        found = threshold(torch.tensor(scores, dtype=torch.float64), truth, 1.0)
        assert found == expected


def test_validation_sets_without_a_choice_are_refused() -> None:
    task, loss = Classification(2), CrossEntropy(label_smoothing=0.0, class_weights=None, classes=2)
    for outputs, message in (([[0.0, 1.0]], "no sample of the class yes"), ([[torch.nan, 0.0]], "NaN or infinite")):
        part = task.evaluated(torch.tensor(outputs), torch.tensor([0]), loss)
        with pytest.raises(UserError, match=f"threshold=f1: .*{message}"):
            choose("f1", Path("best.pt"), "", part, part, ("no", "yes"))
