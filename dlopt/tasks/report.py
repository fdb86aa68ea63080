"""The report of a test: metrics, and tables and drawings of classes or labels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dlopt.metrics.by_class import ByClass
from dlopt.metrics.declaration import Evaluated
from dlopt.metrics.names import Split


@dataclass(frozen=True)
class TestReport:
    """Metrics of a split by column (test_loss).

    Attributes:
        confusion: [K, K] with a row per true class; None for other tasks. Samples whose outputs have NaN count as wrong
            and are in no cell.
        by_class: the metrics of each class or label; None for other tasks.
        part: all samples, on the CPU, in the order of the data; None for tasks that keep no outputs, and on ranks > 0.
        split: of the samples, after which the metrics are named.
        guessing: compares the metrics with a constant prediction; "" for other tasks.
    """

    metrics: dict[str, float]
    confusion: Tensor | None = None
    by_class: ByClass | None = None
    part: Evaluated | None = None
    split: Split = "test"
    guessing: str = ""

    @property
    def unpredicted(self) -> int:
        """Number of samples whose outputs have NaN."""
        if self.confusion is None or self.by_class is None:
            return 0
        return int(self.by_class.samples.sum() - self.confusion.sum())

    def per_class(self, classes: Sequence[str]) -> list[dict[str, Any]]:
        """Returns {class, samples, precision, recall, ...} of each class or label; None for an undefined value.

        Of classes also their accuracy, which is the recall: the name that readers of eval.json know.
        """
        rows = [] if self.by_class is None else self.by_class.rows(classes)
        return rows if self.confusion is None else [{**row, "accuracy": row["recall"]} for row in rows]
