"""Tests of accumulated validation metrics against scikit-learn, and of monitoring them."""

import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from dlopt.data.task import Task
from dlopt.training.extra_metrics import _METRICS_OF, _check_names, extra_metrics
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special
from sklearn import metrics as reference
from torch import Tensor, nn

from dlopt.basics.errors import UserError
from dlopt.data.samples import Dataset, InMemory
from dlopt.losses import MSE, probabilities
from dlopt.metrics.classes import ClassMetrics, calibration_gaps
from dlopt.metrics.labels import label_report
from dlopt.metrics.regression import RegressionMetrics
from dlopt.metrics.sums import MetricSum
from dlopt.training.builders.workload import build_workload
from dlopt.training.checkpoint.checkpoints import load
from dlopt.training.evaluate import predict_test_set, report
from dlopt.training.tta import CHOICES
from tests.support.line import dlopt
from tests.support.runs import REGRESSION, metrics, run_config, start
from tests.support.sizes import SMALL

CLASSES = ("a", "b", "c", "d", "e", "f", "g")
CROSS_ENTROPY = nn.CrossEntropyLoss()
NAMES = ["top5_accuracy", "macro_f1", "calibration_error", "class_accuracy"]


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
    counter = ClassMetrics(NAMES, CLASSES, softmax)
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
    counter = RegressionMetrics(["r2", "mae"], columns)
    for batch in batches(outputs, targets, 7):
        counter.add(*batch)
    means = counter.means(None)
    assert means["r2"] == pytest.approx(reference.r2_score(targets.double(), outputs.double()), rel=1e-9)
    assert means["mae"] == pytest.approx(reference.mean_absolute_error(targets.double(), outputs.double()), rel=1e-9)


@pytest.mark.parametrize("monitor", ["auto", "val_accuracy", "val_macro_f1"])
def test_rejects_a_target_in_percent(monitor: str, tmp_path: Path) -> None:
    """Accuracies are displayed in percent: a run with the target 95 would never reach it."""
    keys = ["stopping=target", f"stopping.monitor={monitor}"]
    with pytest.raises(UserError, match=r"stopping\.value=95: val_.* is at most 1; for 95 % set 0\.95"):
        start(tmp_path, *SMALL, *keys, "stopping.value=95")


def test_r2_of_constant_targets_is_never_the_best() -> None:
    """Rounding left a variance of either sign: R^2 was 1.4e14 for 100 targets of 0.7."""
    targets = torch.full((100, 1), 0.7)
    counter = RegressionMetrics(["r2"], 1, targets[:1])
    for batch in batches(targets + 0.1, targets, 64):
        counter.add(*batch)
    assert counter.means(None)["r2"] == -math.inf


def test_regression_metrics_of_a_model_that_returns_one_number_per_sample() -> None:
    """Outputs [N], which model._target_ may return, are those of shape [N, 1]."""
    draws = torch.Generator().manual_seed(1)
    targets, outputs = torch.randn(2, 50, generator=draws)
    expected = reference.r2_score(targets, outputs), reference.mean_absolute_error(targets, outputs)
    for shape in ((50,), (50, 1)):
        shaped = outputs.view(shape)
        counter = RegressionMetrics(["r2", "mae"], 1)
        counter.add(shaped, targets)
        assert tuple(counter.means(None).values()) == pytest.approx(expected)


def test_reduces_over_processes() -> None:
    """One of three processes has no samples at all."""
    outputs, targets = answers(3, 40)
    whole = ClassMetrics(NAMES, CLASSES, softmax)
    whole.add(outputs, targets)
    states: list[list[float]] = []
    for part in (slice(0, 13), slice(13, 40), None):
        counter = ClassMetrics(NAMES, CLASSES, softmax)
        if part is not None:
            counter.add(outputs[part], targets[part])
        counter.means(lambda own: states.append(list(own)) or [1.0] * len(own))
    together = ClassMetrics(NAMES, CLASSES, softmax).means(
        lambda own: [sum(each) for each in zip(*states, strict=True)]
    )
    assert together == pytest.approx(whole.means(None), rel=1e-12)


def test_best_model_follows_the_monitored_metric(tmp_path: Path) -> None:
    keys = ["epochs=4", "schedule=constant", "optimizer.lr=0.3", "monitor=val_calibration_error"]
    summary = start(tmp_path, *SMALL, *keys, "evaluate.metrics=[class_accuracy,macro_f1]")
    lines = metrics(tmp_path)
    errors = [line["val_calibration_error"] for line in lines]
    assert summary["best_epoch"] == 1 + errors.index(min(errors))
    assert summary["best_val_calibration_error"] == min(errors)
    assert all(0 <= line["val_worst_class_accuracy"] <= line["val_accuracy"] for line in lines)
    assert (
        min(v for k, v in lines[0].items() if k.startswith("val_class_accuracy/"))
        == (lines[0]["val_worst_class_accuracy"])
    )


def test_regression_may_monitor_its_metrics(tmp_path: Path) -> None:
    start(tmp_path, *REGRESSION, "monitor=val_r2", "stopping=early", "evaluate.metrics=[mae]", "epochs=2")
    assert {"val_r2", "val_mae"} <= set(metrics(tmp_path)[0])


BAD: dict[str, tuple[list[str], str]] = {
    "unknown class": (["monitor=val_class_accuracy/11"], "no class 11"),
    "regression's": (["evaluate.metrics=[r2]"], "evaluate.metrics=r2: a classification"),
    "early": (["stopping=early", "stopping.monitor=val_mae"], "stopping.monitor=val_mae: a classification"),
    "plateau": (["schedule=plateau", "schedule.monitor=val_r2"], "schedule.monitor=val_r2: a classification"),
    "plateau without validation": (["schedule=plateau", "data.val_split=0"], "schedule=plateau: needs a validation"),
    "monitor without validation": (["monitor=val_loss", "data.val_split=0"], "monitor=val_loss: needs a validation"),
    "metrics without validation": (
        ["evaluate.metrics=[macro_f1,class_accuracy]", "data.val_split=0"],
        r"evaluate\.metrics=\[macro_f1,class_accuracy\]: needs a validation",
    ),
    "target without validation": (
        ["stopping=target", "stopping.value=1", "data.val_split=0"],
        "stopping=target: needs a validation",
    ),
}


@pytest.mark.parametrize("name", sorted(BAD))
def test_rejects_unavailable_metrics(tmp_path: Path, name: str) -> None:
    overrides, message = BAD[name]
    with pytest.raises(UserError, match=message):
        start(tmp_path, *SMALL, *overrides)


def test_rejects_a_class_without_validation_samples() -> None:
    checked = run_config(*SMALL, "monitor=val_class_accuracy/b")
    train, val = (InMemory(torch.zeros(2, 3), torch.tensor(labels)) for labels in ([0, 1], [0, 0]))
    with pytest.raises(UserError, match="monitor=val_class_accuracy/b: the validation set has no sample"):
        extra_metrics(checked, Dataset(train, val, None, ("a", "b")), nn.CrossEntropyLoss())


def test_plateau_rejects_unknown_metrics_of_a_regression(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"schedule\.monitor=val_foo: a regression task has no such metric"):
        start(tmp_path, *REGRESSION, "schedule=plateau", "schedule.monitor=val_foo")


@pytest.mark.parametrize("monitor", ["val_accuracy", "val_macro_f1"])
def test_regression_rejects_class_metrics(tmp_path: Path, monitor: str) -> None:
    with pytest.raises(UserError, match=f"monitor={monitor}.*regression"):
        start(tmp_path, *REGRESSION, f"monitor={monitor}")


def test_top5_needs_more_than_five_classes() -> None:
    with pytest.raises(UserError, match="needs more than 5 classes"):
        _check_names({"top5_accuracy": "monitor=val_top5_accuracy"}, Task("classification", 5))


def test_the_epoch_of_an_early_stop_is_evaluated(tmp_path: Path) -> None:
    stop = ["stopping=tolerance", "stopping.tolerance=1e9", "stopping.iterations=4"]
    summary = start(tmp_path, *SMALL, *stop, "epochs=9", "evaluate.every_epochs=5")
    [line] = metrics(tmp_path)
    assert summary["status"] == "stopped_early" and line["epoch"] == 2 and line["val_loss"] > 0


@pytest.mark.parametrize("size", [7, 60])
def test_outputs_with_nan_count_as_wrong(size: int) -> None:
    """As scikit-learn counts them with a prediction of its own, which is no class."""
    outputs, targets = answers(3, 60)
    outputs[targets == 0] = math.nan
    outputs[5, 3] = math.nan  # one of them is enough
    predictions = outputs.argmax(1).masked_fill(outputs.isnan().any(1), -1).numpy()
    counter, total = ClassMetrics(NAMES, CLASSES, softmax), MetricSum(Task("classification", 7))
    for batch in batches(outputs, targets, size):
        counter.add(*batch)
        total.add(total.measure(CROSS_ENTROPY(*batch), *batch))
    means, sums = counter.means(None), total.means("val")
    assert math.isnan(sums["val_loss"])
    assert sums["val_accuracy"] == pytest.approx((predictions == targets.numpy()).mean())
    occurring = np.union1d(targets, predictions[predictions >= 0])
    f1 = reference.f1_score(targets, predictions, average="macro", labels=occurring, zero_division=0)
    assert means["macro_f1"] == pytest.approx(f1)
    top = outputs.nan_to_num(nan=-math.inf).topk(5).indices
    hits = (top == targets.unsqueeze(1)).any(1) & ~outputs.isnan().any(1)
    assert means["top5_accuracy"] == pytest.approx(hits.double().mean().item())
    assert means[f"class_accuracy/{CLASSES[0]}"] == 0 == means["worst_class_accuracy"]
    assert math.isnan(means["calibration_error"])
    loss = copy.deepcopy(CROSS_ENTROPY).train()
    tested = report([(outputs, targets)], loss, Task("classification", 7))
    assert loss.training  # as before: it may train on
    assert tested.unpredicted == (predictions < 0).sum()
    rows = tested.per_class(CLASSES)
    assert [row["samples"] for row in rows] == torch.bincount(targets, minlength=7).tolist()
    assert rows[0]["accuracy"] == 0 and tested.metrics["test_macro_f1"] == pytest.approx(f1)


def test_labels_with_nan_outputs_have_no_mean() -> None:
    outputs, targets = torch.randn(20, 3), torch.randint(2, (20, 3)).float()
    outputs[4, 1] = math.nan
    found = label_report(outputs, targets, torch.sigmoid)
    assert all(math.isnan(value) for value in found.means.values())
    assert [math.isnan(value) for value in found.precision.tolist()] == [False, True, False]
    clean = label_report(outputs[:, [0, 2]], targets[:, [0, 2]], torch.sigmoid)
    assert found.f1[[0, 2]].tolist() == clean.f1.tolist() and not any(map(math.isnan, clean.means.values()))


def test_classes_of_models_trained_with_mse_are_those_of_the_outputs() -> None:
    """Clamped to 0..1 several outputs are equal: accuracy, calibration and `predict` take the largest output itself."""
    draws = torch.Generator().manual_seed(0)
    targets = torch.randint(4, (200,), generator=draws)
    outputs = 1.2 + 0.1 * torch.randn(200, 4, generator=draws)
    outputs[torch.arange(200), targets] += 0.3
    loss = MSE(classes=4)
    counter = ClassMetrics(["calibration_error"], list("abcd"), lambda values: probabilities(values, loss))
    counter.add(outputs, targets)
    accuracy = (outputs.numpy().argmax(1) == targets.numpy()).mean()
    assert counter.means(None)["calibration_error"] == pytest.approx(1 - accuracy) and accuracy > 0.8


DATA_OF = {
    "classification": (*SMALL, "data.subset=200"),
    "regression": (*SMALL, "data=diabetes", "loss=mse", "data.subset=200"),
    "multi-label": (*SMALL, "data=digit_pairs", "data.train_size=200", "data.val_size=0"),
}


def independent(kind: str, outputs: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """The metrics by scikit-learn, SciPy and their definitions."""
    if kind == "regression":
        outputs, targets = outputs.reshape(len(outputs), -1), targets.reshape(len(targets), -1)
        return {"r2": reference.r2_score(targets, outputs), "mae": float(abs(outputs - targets).mean())}
    if kind == "multi-label":
        predicted = outputs > 0
        return {
            "mean_average_precision": reference.average_precision_score(targets, special.expit(outputs)),
            "macro_f1": reference.f1_score(targets, predicted, average="macro"),
            "micro_f1": reference.f1_score(targets, predicted, average="micro"),
        }
    predicted, chances = outputs.argmax(1), special.softmax(outputs, axis=1)
    of_classes = {k: float((predicted[targets == k] == k).mean()) for k in sorted(set(targets.tolist()))}
    confidence, error = chances.max(1), 0.0
    for low in range(15):
        inside = (confidence > low / 15) & (confidence <= (low + 1) / 15)
        error += abs(float((predicted == targets)[inside].sum() - confidence[inside].sum())) / len(targets)
    return {
        "top5_accuracy": reference.top_k_accuracy_score(targets, outputs, k=5, labels=range(10)),
        "macro_f1": reference.f1_score(targets, predicted, average="macro"),
        "calibration_error": error,
        "worst_class_accuracy": min(of_classes.values()),
        **{f"class_accuracy/{k}": value for k, value in of_classes.items()},
    }


@pytest.mark.parametrize("tta", ["none", "flip"])
@pytest.mark.parametrize("kind", _METRICS_OF)
def test_every_metric_that_is_validated_is_tested(tmp_path: Path, kind: str, tta: str) -> None:
    """With an average of the weights, too; and by `dlopt eval`."""
    if tta != "none" and kind == "regression":
        pytest.skip("its inputs are not images")
    names = list(_METRICS_OF[kind])
    lines = [*DATA_OF[kind], "epochs=2", "ema=0.9", f"evaluate.metrics=[{','.join(names)}]", f"evaluate.tta={tta}"]
    average = ["average=logits"] if tta != "none" else []
    lines += [f"evaluate.{each}" for each in average]
    assert dlopt(tmp_path, "train", *lines, "hydra.run.dir=run").code == 0
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    [*_, line] = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    validated = {key.removeprefix("val_") for key in line if key.startswith("val_")}
    tested = {key.removeprefix("test_"): value for key, value in summary.items() if key.startswith("test_")}
    assert {name.partition("/")[0] for name in validated} >= set(names)
    assert validated <= set(tested)
    checkpoint = load(tmp_path / "run/checkpoints/best.pt")
    workload = build_workload(run_config(*lines), checkpoint)
    workload.load(checkpoint)
    views = CHOICES[tta]() if tta != "none" else None
    outputs, targets = (
        torch.cat(column).numpy() for column in zip(*predict_test_set(workload, views, "logits") or (), strict=True)
    )
    for name, value in independent(kind, outputs, targets).items():
        assert tested[name] == pytest.approx(value, rel=1e-5, abs=2e-5), name
    assert dlopt(tmp_path, "eval", "checkpoint=run", f"tta={tta}", *average).code == 0
    found = json.loads((tmp_path / "run/eval.json").read_text())
    for name in validated:
        assert found[f"test_{name}"] == pytest.approx(tested[name], rel=1e-6), name
