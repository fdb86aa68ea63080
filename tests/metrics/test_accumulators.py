"""Tests of accumulated validation metrics against scikit-learn."""

import copy
import math
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as reference
from torch import Tensor, nn

from dlopt.losses import MSE
from dlopt.metrics.accumulators import Sums, Wholes
from dlopt.metrics.classes import calibration_gaps
from dlopt.metrics.declared import named
from dlopt.metrics.labels import label_report
from dlopt.metrics.sums import MetricSum
from dlopt.parallel.ranks import Ranks
from dlopt.tasks.classification import Classification
from dlopt.tasks.labels import MultiLabel
from dlopt.tasks.regression import Regression
from dlopt.tasks.task import Task
from dlopt.training.evaluate import report

CLASSES = ("a", "b", "c", "d", "e", "f", "g")
CROSS_ENTROPY = nn.CrossEntropyLoss()
NAMES = ["top5_accuracy", "macro_f1", "calibration_error", "class_accuracy"]


def sums(
    metrics: Sequence[str], task: Task, names: Sequence[str] = (), *, loss: nn.Module = CROSS_ENTROPY,
    origin: Tensor | None = None,
) -> Sums:  # fmt: skip
    return Sums(named(metrics, task.metrics), partial(task.evaluated, loss=loss, origin=origin), task.outputs, names)


def class_sums() -> Sums:
    return sums(NAMES, Classification(7), CLASSES)


def label_means(outputs: Tensor, targets: Tensor) -> dict[str, float]:
    task = MultiLabel(outputs.shape[1])
    always = [each for each in task.metrics if each.when == "always"]
    counter = Wholes(always, partial(task.evaluated, loss=nn.BCEWithLogitsLoss()), Ranks())
    counter.add(outputs, targets)
    return dict(counter.means())


def softmax(outputs: Tensor) -> Tensor:
    return outputs.softmax(1)


def answers(seed: int, count: int, classes: int = 6) -> tuple[Tensor, Tensor]:
    """The last class of CLASSES never occurs."""
    draws = torch.Generator().manual_seed(seed)
    return torch.randn(count, classes + 1, generator=draws), torch.randint(classes, (count,), generator=draws)


def batches(outputs: Tensor, targets: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    yield from zip(outputs.split(size), targets.split(size), strict=True)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), size=st.integers(1, 70))
def test_class_metrics_equal_scikit_learn(seed: int, size: int) -> None:
    outputs, targets = answers(seed, 60)
    counter = class_sums()
    for batch in batches(outputs, targets, size):
        counter.add(*batch)
    means = counter.means(None)
    predictions = outputs.argmax(1)
    occurring = np.union1d(targets, predictions)
    assert means["macro_f1"] == pytest.approx(
        reference.f1_score(targets, predictions, average="macro", labels=occurring, zero_division=0)
    )
    assert means["top5_accuracy"] == pytest.approx(
        reference.top_k_accuracy_score(targets, outputs, k=5, labels=np.arange(7))
    )
    assert means["calibration_error"] == pytest.approx(
        calibration_gaps(softmax(outputs), targets).abs().sum().item() / 60
    )
    recalls = reference.recall_score(targets, predictions, average=None, labels=targets.unique())
    by_class = {f"class_accuracy/{CLASSES[i]}": r for i, r in zip(targets.unique().tolist(), recalls, strict=True)}
    assert {name: value for name, value in means.items() if "/" in name} == pytest.approx(by_class)
    assert means["worst_class_accuracy"] == pytest.approx(min(recalls))


@pytest.mark.parametrize("columns", [1, 3])
def test_regression_metrics_equal_scikit_learn(columns: int) -> None:
    draws = torch.Generator().manual_seed(1)
    targets = torch.randn(50, columns, generator=draws) + 5
    outputs = targets + 0.3 * torch.randn(50, columns, generator=draws)
    counter = sums(["r2", "mae"], Regression(columns))
    for batch in batches(outputs, targets, 7):
        counter.add(*batch)
    means = counter.means(None)
    assert means["r2"] == pytest.approx(reference.r2_score(targets.double(), outputs.double()), rel=1e-9)
    assert means["mae"] == pytest.approx(reference.mean_absolute_error(targets.double(), outputs.double()), rel=1e-9)


@pytest.mark.parametrize("error", [0.0, 0.1, math.nan])
def test_r2_of_constant_targets(error: float) -> None:
    """Rounding left a variance of either sign: R^2 was 1.4e14 for 100 targets of 0.7; then it was -inf."""
    targets = torch.full((100, 2), 0.7)
    targets[:, 1] = torch.linspace(0, 1, 100)
    outputs = targets + torch.tensor([error, 0.1])
    counter = sums(["r2"], Regression(2), origin=targets[:1])
    for batch in batches(outputs, targets, 64):
        counter.add(*batch)
    expected = math.nan if math.isnan(error) else reference.r2_score(targets - targets[0], outputs - targets[0])
    assert counter.means(None)["r2"] == pytest.approx(expected, rel=1e-6, nan_ok=True)


def test_regression_metrics_of_a_model_that_returns_one_number_per_sample() -> None:
    """Outputs [N], which model._target_ may return, are those of shape [N, 1]."""
    draws = torch.Generator().manual_seed(1)
    targets, outputs = torch.randn(2, 50, generator=draws)
    expected = reference.r2_score(targets, outputs), reference.mean_absolute_error(targets, outputs)
    for shape in ((50,), (50, 1)):
        shaped = outputs.view(shape)
        counter = sums(["r2", "mae"], Regression(1))
        counter.add(shaped, targets)
        assert tuple(counter.means(None).values()) == pytest.approx(expected)


def test_reduces_over_processes() -> None:
    """One of three processes has no samples at all."""
    outputs, targets = answers(3, 40)
    whole = class_sums()
    whole.add(outputs, targets)
    states: list[list[float]] = []
    for part in (slice(0, 13), slice(13, 40), None):
        counter = class_sums()
        if part is not None:
            counter.add(outputs[part], targets[part])
        counter.means(lambda own: states.append(list(own)) or [1.0] * len(own))
    together = class_sums().means(lambda own: [sum(each) for each in zip(*states, strict=True)])
    assert together == pytest.approx(whole.means(None), rel=1e-12)


@pytest.mark.parametrize("size", [7, 60])
def test_outputs_with_nan_count_as_wrong(size: int) -> None:
    """As scikit-learn counts them with a prediction of its own, which is no class."""
    outputs, targets = answers(3, 60)
    outputs[targets == 0] = math.nan
    outputs[5, 3] = math.nan  # one of them is enough
    predictions = outputs.argmax(1).masked_fill(outputs.isnan().any(1), -1).numpy()
    task = Classification(7)
    counter, total = class_sums(), MetricSum(task)
    for batch in batches(outputs, targets, size):
        counter.add(*batch)
        total.add(total.keep(CROSS_ENTROPY(*batch), *batch))
    means, of_sums = counter.means(None), total.means("val")
    assert math.isnan(of_sums["val_loss"])
    assert of_sums["val_accuracy"] == pytest.approx((predictions == targets.numpy()).mean())
    occurring = np.union1d(targets, predictions[predictions >= 0])
    f1 = reference.f1_score(targets, predictions, average="macro", labels=occurring, zero_division=0)
    assert means["macro_f1"] == pytest.approx(f1)
    top = outputs.nan_to_num(nan=-math.inf).topk(5).indices
    hits = (top == targets.unsqueeze(1)).any(1) & ~outputs.isnan().any(1)
    assert means["top5_accuracy"] == pytest.approx(hits.double().mean().item())
    assert means[f"class_accuracy/{CLASSES[0]}"] == 0 == means["worst_class_accuracy"]
    assert math.isnan(means["calibration_error"])
    loss = copy.deepcopy(CROSS_ENTROPY).train()
    tested = report([(outputs, targets)], loss, task, task.computed((), tests=True))
    assert loss.training  # as before: it may train on
    assert tested.confusion is not None and tested.confusion.sum() == (predictions >= 0).sum()
    rows = tested.per_class(CLASSES)
    assert [row["samples"] for row in rows] == torch.bincount(targets, minlength=7).tolist()
    assert rows[0]["recall"] == 0 and tested.metrics["test_macro_f1"] == pytest.approx(f1)


def test_labels_with_nan_outputs_have_no_mean() -> None:
    outputs, targets = torch.randn(20, 3), torch.randint(2, (20, 3)).float()
    outputs[4, 1] = math.nan
    found = label_report(outputs, targets, torch.sigmoid)
    assert all(math.isnan(value) for value in label_means(outputs, targets).values())
    assert [math.isnan(value) for value in found.by_label.average_precision.tolist()] == [False, True, False]
    clean = label_report(outputs[:, [0, 2]], targets[:, [0, 2]], torch.sigmoid)
    assert found.by_label.f1[[0, 2]].tolist() == clean.by_label.f1.tolist() and not any(
        map(math.isnan, label_means(outputs[:, [0, 2]], targets[:, [0, 2]]).values())
    )


def test_classes_of_models_trained_with_mse_are_those_of_the_outputs() -> None:
    """Clamped to 0..1 several outputs are equal: accuracy, calibration and `predict` take the largest output itself."""
    draws = torch.Generator().manual_seed(0)
    targets = torch.randint(4, (200,), generator=draws)
    outputs = 1.2 + 0.1 * torch.randn(200, 4, generator=draws)
    outputs[torch.arange(200), targets] += 0.3
    loss = MSE(classes=4)
    counter = sums(["calibration_error"], Classification(4), loss=loss)
    counter.add(outputs, targets)
    accuracy = (outputs.numpy().argmax(1) == targets.numpy()).mean()
    assert counter.means(None)["calibration_error"] == pytest.approx(1 - accuracy) and accuracy > 0.8
