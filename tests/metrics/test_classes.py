"""Tests of metrics against scikit-learn and manual results."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as reference

from dlopt.metrics import classes
from dlopt.metrics.accumulators import Sums
from dlopt.metrics.declaration import Evaluated
from dlopt.metrics.declared import named

CLASSES = 7


def drawn(seed: int, count: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs that favour the true class, and targets; the last class neither occurs nor is predicted."""
    draws = torch.Generator().manual_seed(seed)
    targets = torch.randint(CLASSES - 1, (count,), generator=draws)
    outputs = torch.randn(count, CLASSES, generator=draws, dtype=torch.float64)
    outputs[torch.arange(count), targets] += 1.5
    outputs[:, -1] = -9
    return outputs, targets


@given(st.integers(0, 10**6))
def test_confusion_matrix_equals_scikit_learn(seed: int) -> None:
    outputs, targets = drawn(seed)
    predictions = outputs.argmax(1)
    confusion = classes.confusion_matrix(targets, predictions, CLASSES)
    assert confusion.tolist() == reference.confusion_matrix(targets, predictions, labels=range(CLASSES)).tolist()


def calibration_error(probabilities: torch.Tensor, targets: torch.Tensor, bins: int = classes.BINS) -> float:
    return classes.calibration_gaps(probabilities, targets, bins).abs().sum().item() / len(targets)


def test_calibration_error_equals_manual_result() -> None:
    # bins of a fifth: (0.8, 1] holds 0.9 and 1.0, of which one is right; (0.6, 0.8] holds 0.7 and 0.8, both right
    confidence = torch.tensor([0.9, 1.0, 0.7, 0.8], dtype=torch.float64)
    probabilities = torch.stack([confidence, 1 - confidence], 1)
    targets = torch.tensor([0, 1, 0, 0])
    expected = 2 / 4 * abs(1 / 2 - 0.95) + 2 / 4 * abs(1 - 0.75)
    assert calibration_error(probabilities, targets, bins=5) == pytest.approx(expected, rel=1e-12)


def test_calibration_error_equals_numpy() -> None:
    outputs, targets = drawn(3, count=500)
    probabilities = outputs.softmax(1)
    confidence = probabilities.max(1).values.numpy()
    right = (probabilities.argmax(1) == targets).numpy()
    bins = np.digitize(confidence, np.linspace(0, 1, 16), right=True)
    expected = sum(
        (bins == b).mean() * abs(right[bins == b].mean() - confidence[bins == b].mean()) for b in np.unique(bins)
    )
    assert expected > 0.01
    assert calibration_error(probabilities, targets) == pytest.approx(expected, rel=1e-9)


def test_calibration_error_of_certain_predictions() -> None:
    sure = torch.eye(4)
    assert calibration_error(sure, torch.arange(4)) == 0
    assert calibration_error(sure, torch.tensor([1, 2, 3, 0])) == 1


@pytest.mark.parametrize("seed", range(3))
def test_a_class_that_neither_occurs_nor_is_predicted_is_left_out_of_macro_f1(seed: int) -> None:
    outputs, targets = drawn(seed)
    part = partial(Evaluated, size=CLASSES, values=lambda out: out.softmax(1))
    accumulated = Sums(named(["macro_f1"], classes.METRICS), part, CLASSES)
    for chunk in torch.arange(len(targets)).split(64):
        accumulated.add(outputs[chunk], targets[chunk])
    expected = reference.f1_score(targets, outputs.argmax(1), average="macro")
    assert accumulated.means(None)["macro_f1"] == pytest.approx(expected, rel=1e-12)
