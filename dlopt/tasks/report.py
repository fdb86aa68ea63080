"""The report of a test: metrics, and tables and drawings of classes or labels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dlopt.basics.plain_values import without_nan
from dlopt.metrics.classes import class_accuracies, f1_scores
from dlopt.metrics.declaration import Evaluated
from dlopt.metrics.labels import LabelReport


@dataclass(frozen=True)
class TestReport:
    """Test metrics (`test_...`).

    Attributes:
        confusion: [K, K] with a row per true class; None for other tasks.
        labels: the metrics of each label if a sample has several labels; None for other tasks.
        samples: of each class [K], also those whose outputs have NaN, which count as wrong and are in no cell of the
            confusion matrix.
        part: all samples, on the CPU, in the order of the data; None for tasks that keep no outputs, and on ranks > 0.
    """

    metrics: dict[str, float]
    confusion: Tensor | None = None
    labels: LabelReport | None = None
    samples: Tensor | None = None
    part: Evaluated | None = None

    @property
    def unpredicted(self) -> int:
        """Number of samples whose outputs have NaN."""
        if self.confusion is None or self.samples is None:
            return 0
        return int(self.samples.sum() - self.confusion.sum())

    def per_class(self, classes: Sequence[str]) -> list[dict[str, Any]]:
        """Returns {class, samples, accuracy, f1} of each class; None for a value without samples.

        Of labels: the average precision instead of the accuracy.
        """
        if self.labels is not None:
            return [without_nan(row) for row in self.labels.rows(classes)]
        if self.confusion is None or self.samples is None:
            return []
        confusion, samples = self.confusion, self.samples
        columns = (samples, class_accuracies(confusion, samples), f1_scores(confusion, samples))
        names = ("class", "samples", "accuracy", "f1")
        rows = zip(classes, *(column.tolist() for column in columns), strict=True)
        return [without_nan(dict(zip(names, row, strict=True))) for row in rows]
