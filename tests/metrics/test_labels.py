"""Samples with several labels: metrics against scikit-learn, whole runs, and their evaluation."""

import csv
import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn import metrics as reference

from dlopt.basics.errors import UserError
from dlopt.data.images.digits import digit_pairs
from dlopt.metrics.accumulators import Wholes
from dlopt.metrics.declaration import Evaluated
from dlopt.metrics.labels import METRICS, label_report
from dlopt.parallel.ranks import Ranks
from dlopt.python.model import load
from dlopt.training.builders.batches import training_batches
from dlopt.training.builders.workload import build_workload
from tests.support.equality import compare
from tests.support.line import dlopt
from tests.support.modes import SYNC_DDP, SYNC_FSDP
from tests.support.runs import assert_same_run, at_update, metrics, resume, run_config, start, terminate

LABEL_METRICS = ("mean_average_precision", "macro_f1", "micro_f1")
ALWAYS = [each for each in METRICS if each.when == "always"]
LABELS = 6
PAIRS = [
    "data=digit_pairs", "data.train_size=90", "data.val_size=31", "data.test_size=29", "data.batch_size=25",
    "data.workers=0", "model=mlp", "model.widths=[12]", "tracking=[]", "threads=1", "device=cpu", "epochs=3",
]  # fmt: skip


def drawn(seed: int, count: int = 120, *, ties: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs that favour the true labels. Label 4 does not occur, label 5 neither occurs nor is predicted."""
    draws = torch.Generator().manual_seed(seed)
    targets = (torch.rand(count, LABELS, generator=draws) < 0.3).double()
    targets[:, 4:] = 0
    outputs = torch.randn(count, LABELS, generator=draws, dtype=torch.float64) + 1.5 * (targets - 0.5)
    outputs[:, 5] = -9
    return (outputs.mul(2).round() / 2 if ties else outputs), targets


def label_means(outputs: torch.Tensor, targets: torch.Tensor, size: int = 999) -> dict[str, float]:
    """The metrics of an evaluation whose batches have `size` samples."""
    accumulated = Wholes(ALWAYS, partial(Evaluated, size=0, values=torch.sigmoid), Ranks())
    for chunk in torch.arange(len(targets)).split(size):
        accumulated.add(outputs[chunk], targets[chunk])
    return dict(accumulated.means())


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_equal_scikit_learn(seed: int, ties: bool) -> None:
    outputs, targets = drawn(seed, ties=ties)
    report = label_report(outputs, targets, torch.sigmoid)
    occurs = targets.any(0).numpy()
    assert occurs.tolist() == [True] * 4 + [False] * 2
    by_label = report.by_label
    predicted, nan = (outputs.sigmoid() >= 0.5).numpy(), [math.nan] * 2
    precision, recall, f1, _ = reference.precision_recall_fscore_support(targets, predicted, zero_division=np.nan)
    expected = {
        "samples": targets.sum(0),
        "precision": precision,
        "recall": recall,
        "f1": f1,
        "roc_auc": [*reference.roc_auc_score(targets[:, :4], outputs[:, :4], average=None), *nan],
        "average_precision": [*reference.average_precision_score(targets[:, :4], outputs[:, :4], average=None), *nan],
    }
    assert by_label.f1[4] == 0 and math.isnan(by_label.f1[5])
    for name, values in expected.items():
        np.testing.assert_allclose(getattr(by_label, name), values, rtol=0, atol=1e-12, err_msg=name)
    means = label_means(outputs, targets)
    assert means == pytest.approx({
        "mean_average_precision": np.nanmean(expected["average_precision"]),
        "macro_f1": reference.f1_score(targets, predicted, average="macro", zero_division=np.nan),
        "micro_f1": reference.f1_score(targets, predicted, average="micro"),
    }, abs=1e-12)  # fmt: skip
    assert label_means(outputs, targets, 50) == means


def test_without_any_label_there_are_no_metrics() -> None:
    means = label_means(torch.full((3, 2), -9.0), torch.zeros(3, 2))
    assert all(map(math.isnan, means.values()))


def test_a_run_is_evaluated_by_every_command(tmp_path: Path) -> None:
    line = [*PAIRS, "monitor=val_mean_average_precision", "stopping=early", "stopping.monitor=val_macro_f1"]
    trained = dlopt(tmp_path, "train", *line, "hydra.run.dir=out/run")
    assert trained.code == 0 and "1x8x16, 10 labels" in trained.out and "val mAP val macro f1" in trained.out
    summary, lines = json.loads((tmp_path / "out/run/summary.json").read_text()), metrics(tmp_path / "out/run")
    assert all(f"val_{name}" in each for name in LABEL_METRICS for each in lines)
    assert summary["best_val_mean_average_precision"] == max(each["val_mean_average_precision"] for each in lines)
    assert not any("accuracy" in key for key in summary)

    tested = dlopt(tmp_path, "eval", "checkpoint=out/run")
    assert tested.code == 0 and "average precision" in tested.out
    report = json.loads((tmp_path / "out/run/eval.json").read_text())
    for name in ("test_loss", *(f"test_{name}" for name in LABEL_METRICS)):
        assert report[name] == pytest.approx(summary[name], rel=1e-6)
    assert [row["class"] for row in report["classes"]] == [str(digit) for digit in range(10)]
    mean = np.mean([row["average_precision"] for row in report["classes"]])
    assert mean == pytest.approx(report["test_mean_average_precision"])

    data = digit_pairs(train_size=1, val_size=0, test_size=4)
    assert data.test is not None
    images = data.test.fetch(torch.arange(4))
    (tmp_path / "images").mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image[0].numpy()).save(tmp_path / f"images/{number}.png")
    assert dlopt(tmp_path, "predict", "checkpoint=out/run", "images=images").code == 0
    with (tmp_path / "predictions.csv").open(newline="") as file:
        head, *rows = csv.reader(file)
    assert head == ["image", "labels", *(f"p({digit})" for digit in range(10))]
    model = load(tmp_path / "out/run")
    expected = model(images).sigmoid()
    for row, values, prediction in zip(rows, expected.tolist(), model.predict(tmp_path / "images"), strict=True):
        assert [float(cell) for cell in row[2:]] == pytest.approx(values, rel=1e-4)
        labels = [str(digit) for digit, value in enumerate(values) if value >= 0.5]
        assert row[1] == ";".join(labels) and prediction.labels == tuple(labels)
        assert prediction.label is None and prediction.probability is None

    listed = dlopt(tmp_path, "report", "out", "by=val_mean_average_precision")
    assert listed.code == 0 and "test mean average precision" in listed.out
    with (tmp_path / "out/report/summary.csv").open(newline="") as file:
        [row] = csv.DictReader(file)
    assert float(row["test_micro_f1"]) == pytest.approx(summary["test_micro_f1"]) and row["val_macro_f1"]


def test_crops_are_averaged_as_logits(tmp_path: Path) -> None:
    summary = start(tmp_path / "flipped", *PAIRS, "evaluate.tta=flip")
    assert all(f"test_{name}" in summary for name in LABEL_METRICS)
    refused = dlopt(tmp_path, "eval", "checkpoint=flipped", "tta=flip", "average=probabilities")
    assert refused.code == 2 and "use average=logits" in refused.err


def test_mixed_labels_are_means_of_labels() -> None:
    line = [*PAIRS, "augmentation=mixup", "augmentation.operations=[{_target_:dlopt.augment.Mixup,alpha:1.0,p:1.0}]"]
    workload = build_workload(run_config(*line))
    batch = next(iter(training_batches(workload).epoch(0)))
    assert batch.targets.shape == (25, 10)
    # Two pairs of digits: weights w and 1 - w, which a common digit adds up.
    assert ((batch.targets > 0) & (batch.targets < 1)).any() and batch.targets.max() <= 1
    assert ((batch.targets.sum(1) >= 1 - 1e-6) & (batch.targets.sum(1) <= 2 + 1e-6)).all()


def test_balanced_weights_count_the_training_split() -> None:
    workload = build_workload(run_config(*PAIRS, "loss.pos_weight=balanced"))
    positives = workload.dataset.train.targets.sum(0).double()
    torch.testing.assert_close(workload.loss.pos_weight, ((90 - positives) / positives).float())


def test_an_interrupted_run_is_the_same(tmp_path: Path) -> None:
    line = [*PAIRS, "monitor=val_micro_f1", "loss.label_smoothing=0.1", "loss.pos_weight=balanced"]
    start(tmp_path / "whole", *line)
    with at_update(6, terminate):
        start(tmp_path / "resumed", *line)
    resume(tmp_path / "resumed", *line)
    assert_same_run(tmp_path / "whole", tmp_path / "resumed")


def test_equal_over_ranks(tmp_path: Path) -> None:
    """Metrics are of all samples, not means of those of the ranks. 31 validation samples are not shared evenly."""
    line = [*PAIRS, "precision=fp64", "schedule=constant", "optimizer.lr=0.05", "monitor=val_mean_average_precision"]
    compare(tmp_path, 2, {"ddp": (line, SYNC_DDP), "fsdp": (line, SYNC_FSDP)})


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["loss=cross_entropy"], "loss=cross_entropy: a sample may have several labels; use loss=binary_cross_entropy"),
        (["data=digits", "loss=binary_cross_entropy"], "loss=binary_cross_entropy: a sample has no labels of its own"),
        (["loss.pos_weight=[1.0]"], "loss.pos_weight=[1.0]: 1 weights for 10 labels"),
        (["data.train_size=3", "loss.pos_weight=balanced"], "loss.pos_weight=balanced: no training sample has label"),
        (["data.label_noise=0.1"], "data.label_noise=0.1: the targets are not classes, one per sample"),
        (["sampler=class_balanced"], "sampler=class_balanced: the targets are numbers"),
        (["monitor=val_accuracy"], "monitor=val_accuracy: a multi-label task allows auto, val_loss, val_mean_average"),
        (["evaluate.metrics=[r2]"], "evaluate.metrics=r2: a multi-label task has no such metric"),
        (["stopping=target", "stopping.monitor=val_micro_f1", "stopping.value=90"], "val_micro_f1 is at most 1"),
    ],
)
def test_refused(more: list[str], message: str, tmp_path: Path) -> None:
    line = [each for each in PAIRS if not ("data=digits" in more and each.startswith("data."))]
    with pytest.raises(UserError) as error:
        start(tmp_path, *line, *more)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_other_tasks_have_no_such_metrics(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="monitor=val_micro_f1: a classification task has no such metric"):
        start(tmp_path, "data.subset=100", "model=mlp", "monitor=val_micro_f1", "tracking=[]")
