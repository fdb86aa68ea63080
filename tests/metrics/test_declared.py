"""Every declared metric against scikit-learn, or against its definition; all of an evaluation, over batches and ranks.

A new metric needs a reference here, and a case that has it.
"""

import copy
import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from threading import Barrier
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from scipy import special
from sklearn import metrics as reference
from torch import Tensor, nn
from torch.nn import functional as F

from dlopt.data.batches import Batch
from dlopt.losses import MSE, BinaryCrossEntropy, CrossEntropy
from dlopt.metrics import classes, labels, regression, text
from dlopt.metrics.accumulators import accumulators
from dlopt.metrics.declaration import Sum, Whole
from dlopt.metrics.declared import DECLARED, LOSS, REQUESTABLE
from dlopt.metrics.names import Metric
from dlopt.parallel.ranks import Ranks
from dlopt.tasks.classification import Classification
from dlopt.tasks.labels import MultiLabel
from dlopt.tasks.regression import Regression
from dlopt.tasks.task import Task
from dlopt.tasks.text import NextToken
from dlopt.training.evaluate import evaluate

T = TypeVar("T")
ALL = (LOSS, *classes.METRICS, *regression.METRICS, *labels.METRICS, *text.METRICS)
CLASSES = tuple("abcdefgh")
SAMPLES = 60


@dataclass(frozen=True)
class Case:
    """Outputs [N, ...] of a model, their targets, and the metrics of the evaluation by their names without a class."""

    task: Task
    names: set[str]
    outputs: Tensor
    targets: Tensor
    loss: nn.Module

    @property
    def has_nan(self) -> bool:
        return bool(self.outputs.isnan().any())

    @property
    def rows(self) -> np.ndarray:
        """Outputs [N, K]; a row per token of a text."""
        return self.outputs.reshape(-1, self.task.outputs).numpy()

    @property
    def true(self) -> np.ndarray:
        """Classes [N], labels [N, K] or values [N, K]."""
        is_of_columns = isinstance(self.task, MultiLabel | Regression)
        return self.targets.reshape((SAMPLES, -1) if is_of_columns else -1).numpy()

    @property
    def is_nan(self) -> np.ndarray:
        return np.isnan(self.rows).any(1)

    @property
    def predicted(self) -> np.ndarray:
        """Classes [N], of which -1 is that of outputs with NaN, or labels [N, K]."""
        if isinstance(self.task, MultiLabel):
            return self.rows >= 0  # a probability of a half
        return np.where(self.is_nan, -1, self.rows.argmax(1))

    @property
    def chances(self) -> np.ndarray:
        if isinstance(self.task, MultiLabel):
            return special.expit(self.rows)
        # Of torch: probabilities that are equal but for rounding have an order.
        return self.rows.clip(0, 1) if isinstance(self.loss, MSE) else torch.tensor(self.rows).softmax(1).numpy()


# -- references


def loss(case: Case) -> float:
    if case.has_nan:
        return math.nan
    if isinstance(case.task, MultiLabel):
        pairs = zip(case.true.T, case.chances.T, strict=True)
        return float(np.mean([reference.log_loss(true, chance, labels=[0, 1]) for true, chance in pairs]))
    if isinstance(case.task, Regression):
        return reference.mean_squared_error(case.true, case.rows)
    if isinstance(case.loss, MSE):
        return reference.mean_squared_error(np.eye(case.task.outputs)[case.true], case.rows)
    return reference.log_loss(case.true, case.chances, labels=range(case.task.outputs))


def top5_accuracy(case: Case) -> float:
    wrong = -np.eye(case.task.outputs)[case.true]
    scores = np.where(case.is_nan[:, None], wrong, case.rows)
    return reference.top_k_accuracy_score(case.true, scores, k=5, labels=range(case.task.outputs))


def f1(average: str) -> Callable[[Case], float]:
    def score(case: Case) -> float:
        if isinstance(case.task, MultiLabel) and case.has_nan:
            return math.nan
        names = range(case.task.outputs)
        return reference.f1_score(case.true, case.predicted, average=average, labels=names, zero_division=np.nan)

    return score


def calibration_error(case: Case) -> float:
    if case.has_nan:
        return math.nan
    gaps = [0.0] * 15
    for chances, guess, true in zip(case.chances, case.predicted, case.true, strict=True):
        confidence = max(chances)
        inside = [bin for bin in range(15) if bin / 15 < confidence <= (bin + 1) / 15]
        gaps[inside[0] if inside else 0] += float(guess == true) - confidence
    return sum(map(abs, gaps)) / len(case.true)


def class_accuracy(case: Case) -> dict[str, float]:
    return {
        f"class_accuracy/{name}": float((case.predicted[case.true == number] == number).mean())
        for number, name in enumerate(CLASSES)
        if (case.true == number).any()
    }


def mean_average_precision(case: Case) -> float:
    occurs = case.true.any(0)
    if case.has_nan or not occurs.any():
        return math.nan
    return reference.average_precision_score(case.true[:, occurs], case.rows[:, occurs], average="macro")


def bits_per_byte(case: Case) -> float:
    assert isinstance(case.task, NextToken)
    return loss(case) / math.log(2) / (case.task.bytes_per_token or 1)


def of_values(score: Callable[..., float]) -> Callable[[Case], float]:
    return lambda case: math.nan if case.has_nan else float(score(case.true, case.rows))


def by_rank(score: Callable[..., float]) -> Callable[[Case], float]:
    """The score of the second of two classes; else the mean over the classes, or labels, that occur and are not all."""

    def value(case: Case) -> float:
        chances, count = case.chances, case.task.outputs
        if case.has_nan:
            return math.nan
        truth = case.true if isinstance(case.task, MultiLabel) else np.eye(count)[case.true]
        if isinstance(case.task, Classification) and count == 2:
            return float(score(truth[:, 1], chances[:, 1])) if truth[:, 1].mean() > 0 else math.nan
        found = [score(true, of_class) for true, of_class in zip(truth.T, chances.T, strict=True) if true.mean() > 0]
        return float(np.nanmean(found)) if found else math.nan

    return value


def log_loss(case: Case) -> float:
    return loss(case) if isinstance(case.task, MultiLabel) or case.has_nan else reference.log_loss(
        case.true, case.chances, labels=range(case.task.outputs)
    )  # fmt: skip


def brier_score(case: Case) -> float:
    if case.has_nan:
        return math.nan
    if isinstance(case.task, MultiLabel):
        return float(np.mean((case.chances - case.true) ** 2))
    if case.task.outputs == 2:
        return reference.brier_score_loss(case.true, case.chances[:, 1], labels=[0, 1])
    return float(((case.chances - np.eye(case.task.outputs)[case.true]) ** 2).sum(1).mean())


def of_errors(score: Callable[[np.ndarray], np.ndarray]) -> Callable[[Case], float]:
    """The score of prediction - target in each column, mean over the columns."""
    return of_values(lambda true, rows: score(rows - true).mean())


REFERENCES: dict[str, Callable[[Case], float | dict[str, float]]] = {
    "loss": loss,
    "accuracy": lambda case: reference.accuracy_score(case.true, case.predicted),
    "top5_accuracy": top5_accuracy,
    "macro_f1": f1("macro"),
    "balanced_accuracy": lambda case: reference.balanced_accuracy_score(case.true, case.predicted),
    "roc_auc": by_rank(reference.roc_auc_score),
    "average_precision": by_rank(reference.average_precision_score),
    "log_loss": log_loss,
    "brier_score": brier_score,
    "matthews_correlation": lambda case: reference.matthews_corrcoef(case.true, case.predicted),
    "calibration_error": calibration_error,
    "class_accuracy": class_accuracy,
    "worst_class_accuracy": lambda case: min(class_accuracy(case).values()),
    "r2": of_values(reference.r2_score),
    "mae": of_values(reference.mean_absolute_error),
    "median_absolute_error": of_values(reference.median_absolute_error),
    "absolute_error_p90": of_errors(lambda errors: np.quantile(abs(errors), 0.9, axis=0)),
    "error_p05": of_errors(lambda errors: np.quantile(errors, 0.05, axis=0)),
    "error_p95": of_errors(lambda errors: np.quantile(errors, 0.95, axis=0)),
    "mean_average_precision": mean_average_precision,
    "micro_f1": f1("micro"),
    "token_accuracy": lambda case: reference.accuracy_score(case.true, case.predicted),
    "perplexity": lambda case: math.exp(loss(case)),
    "bits_per_byte": bits_per_byte,
}

# -- cases

OF_CLASSES = {
    "loss", "accuracy", "top5_accuracy", "macro_f1", "balanced_accuracy", "roc_auc", "average_precision", "log_loss",
    "brier_score", "matthews_correlation", "calibration_error", "class_accuracy", "worst_class_accuracy",
}  # fmt: skip
OF_FEW_CLASSES = OF_CLASSES - {"top5_accuracy"}
OF_LABELS = {"loss", "mean_average_precision", "macro_f1", "micro_f1", "roc_auc", "log_loss", "brier_score"}
OF_VALUES = {"loss", "r2", "mae", "median_absolute_error", "absolute_error_p90", "error_p05", "error_p95"}


def normal(seed: int, *size: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_nan(values: Tensor) -> Tensor:
    """Two samples have outputs that are NaN: one of them all."""
    values = values.clone()
    values[7], values[31, ..., -1] = math.nan, math.nan
    return values


def of_classes(outputs: Tensor, occurring: int | None = None, **changed: Any) -> Case:
    """`occurring`: the number of classes of the targets."""
    count = outputs.shape[1]
    targets = torch.randint(occurring or count, (SAMPLES,), generator=torch.Generator().manual_seed(1))
    cross_entropy = CrossEntropy(label_smoothing=0.1, class_weights=None, classes=count)
    # The loss of an evaluation is not smoothed.
    values = {"loss": cross_entropy, "names": OF_CLASSES} | changed
    return Case(Classification(count), values["names"], outputs + F.one_hot(targets, count), targets, values["loss"])


def of_labels(outputs: Tensor, occurring: int) -> Case:
    """`occurring`: the number of labels that any sample has."""
    targets = (normal(2, SAMPLES, outputs.shape[1]) > 0.4).double()
    targets[:, occurring:] = 0
    cross_entropy = BinaryCrossEntropy(label_smoothing=0.1, pos_weight=None, labels=outputs.shape[1])
    return Case(MultiLabel(outputs.shape[1]), OF_LABELS, outputs + targets, targets, cross_entropy)


def of_numbers(outputs: Tensor, targets: Tensor | None = None) -> Case:
    count = 1 if outputs.ndim == 1 else outputs.shape[1]
    targets = normal(3, *outputs.shape) + 5 if targets is None else targets
    return Case(Regression(count), OF_VALUES, outputs + targets, targets, MSE(classes=None))


def of_tokens(task: NextToken, *names: str) -> Case:
    targets = torch.randint(task.outputs, (SAMPLES, task.predictions), generator=torch.Generator().manual_seed(4))
    outputs = normal(5, SAMPLES, task.predictions, task.outputs) + 2 * F.one_hot(targets, task.outputs)
    cross_entropy = CrossEntropy(label_smoothing=0.1, class_weights=None, classes=task.outputs)
    return Case(task, {"loss", "token_accuracy", *names}, outputs, targets, cross_entropy)


def constant(chosen: int) -> Tensor:
    """Outputs that always predict the class."""
    return 9.0 * F.one_hot(torch.tensor(chosen), 8) + 0.1 * normal(6, SAMPLES, 8)


RANDOM = normal(0, SAMPLES, 8)
CASES: Mapping[str, Case] = {
    # Ten sets with ties: of two classes, and of five, of which the last ones do not occur.
    **{
        f"{count} classes, set {seed}": of_classes(
            normal(seed, SAMPLES, count).mul(2).round() / 2, min(seed, count), names=OF_FEW_CLASSES
        )
        for seed in range(2, 7)
        for count in (2, 5)
    },
    "the first of two classes": of_classes(normal(0, SAMPLES, 2), 1, names=OF_FEW_CLASSES),
    "classes": of_classes(RANDOM),
    "a class never occurs": of_classes(RANDOM, 7),
    "a class neither occurs nor is predicted": of_classes(RANDOM - 99 * F.one_hot(torch.tensor(7), 8), 7),
    "constant prediction": of_classes(constant(2)),
    "constant prediction of a class that never occurs": of_classes(constant(7), 7),
    "all samples are of one class": of_classes(RANDOM, 1),
    "constant prediction of the only class": of_classes(constant(0), 1),
    "classes, NaN": of_classes(with_nan(RANDOM), 7),
    "all outputs are NaN": of_classes(RANDOM * math.nan),
    "few classes": of_classes(RANDOM[:, :5], names=OF_FEW_CLASSES),
    "classes, MSE": of_classes(RANDOM, 7, loss=MSE(classes=8)),
    "labels": of_labels(RANDOM, 8),
    "ties": of_labels(RANDOM.round(), 7),
    "a label neither occurs nor is predicted": of_labels(RANDOM - 99 * F.one_hot(torch.tensor(7), 8), 7),
    "no label occurs": of_labels(RANDOM, 0),
    "no label occurs or is predicted": of_labels(RANDOM - 9, 0),
    "labels, NaN": of_labels(with_nan(RANDOM), 7),
    "values": of_numbers(normal(0, SAMPLES)),
    "a column": of_numbers(normal(0, SAMPLES, 1)),
    "columns": of_numbers(normal(0, SAMPLES, 3) * torch.tensor([0.1, 1.0, 3.0])),
    "constant outputs": of_numbers(-normal(3, SAMPLES, 3)),
    "constant targets": of_numbers(normal(0, SAMPLES), torch.full((SAMPLES,), 0.75, dtype=torch.float64)),
    "values, NaN": of_numbers(with_nan(normal(0, SAMPLES, 3))),
    "bytes": of_tokens(NextToken(11, predictions=5, unit="byte"), "bits_per_byte"),
    "tokens": of_tokens(NextToken(11, predictions=5), "perplexity"),
    "tokens of known length": of_tokens(NextToken(11, 255.0, 5, "token", 3.7), "perplexity", "bits_per_byte"),
}


class Rank(Ranks):
    """A rank whose process group is threads."""

    def __init__(self, rank: int, slots: list[Any], barrier: Barrier) -> None:
        self.rank, self.processes, self.is_main = rank, len(slots), rank == 0
        self._slots, self.barrier = slots, barrier

    def _all(self, value: T) -> list[T]:
        self._slots[self.rank] = value
        self.barrier.wait()
        found = list(self._slots)
        self.barrier.wait()
        return found

    def sum(self, values: Any) -> Any:
        return [sum(each) for each in zip(*self._all(list(values)), strict=True)]

    def gather(self, values: list[T]) -> list[T]:
        return [each for part in self._all(values) for each in part]

    def broadcast(self, value: T) -> T:
        return self._all(value)[0]


def evaluation(case: Case, size: int, rank: Ranks) -> dict[str, float]:
    """Evaluates a model that returns its inputs on the rank's samples of batches of `size`, with every metric."""
    task, function = case.task, copy.deepcopy(case.loss)
    batches = zip(case.outputs.split(size), case.targets.split(size), strict=True)
    shards = [
        Batch(*(column.tensor_split(rank.processes)[rank.rank] for column in batch), len(batch[0])) for batch in batches
    ]
    part = partial(task.evaluated, loss=function, origin=case.targets[:1])
    requested = [metric for metric in task.metrics if metric.least <= task.outputs]
    extra = accumulators(task.computed(requested), part, task.outputs, CLASSES[: task.outputs], rank)
    reduce = None if rank.processes == 1 else rank.sum
    try:
        found = evaluate(
            nn.Identity(), nn.Identity(), shards, function, task=task, split="val", reduce=reduce, extra=extra
        )
    except Exception:
        if isinstance(rank, Rank):
            rank.barrier.abort()  # the others wait for this one
        raise
    assert found is not None
    return {key.removeprefix("val_"): value for key, value in found.items()}


def check(case: Case, found: Mapping[str, float]) -> None:
    assert {name.partition("/")[0] for name in found} == case.names
    expected: dict[str, float] = {}
    for name in case.names:
        value = REFERENCES[name](case)
        expected |= value if isinstance(value, dict) else {name: float(value)}
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-12, nan_ok=True)


@pytest.mark.filterwarnings("ignore")  # of scikit-learn: undefined metrics
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("size", [1, 7, SAMPLES])
def test_equals_its_reference(name: str, size: int) -> None:
    check(CASES[name], evaluation(CASES[name], size, Ranks()))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("size", [1, 25])
def test_two_ranks_have_the_metrics_of_all_samples(name: str, size: int) -> None:
    """In batches of one, the second rank has no samples at all."""
    slots, barrier = [None, None], Barrier(2)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(partial(evaluation, CASES[name], size), (Rank(r, slots, barrier) for r in range(2)))
    assert repr(first) == repr(second)
    check(CASES[name], first)


def test_every_metric_has_a_reference_and_a_case() -> None:
    assert set(REFERENCES) == set(DECLARED), "add a function of the definition to REFERENCES"
    assert set().union(*(case.names for case in CASES.values())) == set(DECLARED), "add the metric to a case of CASES"
    assert {name for metric in ALL for name in metric.names} == set(DECLARED)


def test_the_names_of_several_tasks_mean_the_same() -> None:
    """Tables show and rank a column without its task."""
    for metric in ALL:
        for name in metric.names:
            assert (metric.direction, metric.unit) == (DECLARED[name].direction, DECLARED[name].unit), name


def test_a_declaration_is_complete() -> None:
    for metric in ALL:
        kinds = {type(need) for need in metric.needs}
        assert kinds in (set(), {Sum}, {Whole}), metric.name
        assert bool(kinds) == (metric.value is not None) == (metric.name in REQUESTABLE), metric.name
        assert kinds or metric.when == "always", metric.name  # nothing else could compute it
        assert metric.by_class or not metric.also, metric.name
        assert metric.about and not metric.about.endswith("."), metric.name
        assert Metric.of(f"val_{metric.name}") == Metric("val", metric.name)


def test_a_metric_is_shown_in_its_unit() -> None:
    assert DECLARED["accuracy"].show(0.625) == "62.50 %" and DECLARED["accuracy"].title("val") == "val acc"
    assert DECLARED["macro_f1"].title("val") == "val macro f1"
    assert DECLARED["mean_average_precision"].title("val") == "val mAP"
    assert DECLARED["worst_class_accuracy"] is DECLARED["class_accuracy"]
