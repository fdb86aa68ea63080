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
    """The report of a test. For other tasks than of classes or labels, the optional values are None or empty."""

    metrics: dict[str, float]  # by column (test_loss)
    confusion: Tensor | None = None  # [K, K] with a row per true class, without samples whose outputs have NaN
    by_class: ByClass | None = None  # the metrics of each class or label
    part: Evaluated | None = None  # all samples, on the CPU, in the order of the data; None if not kept, on ranks > 0
    split: Split = "test"  # after which the metrics are named
    guessing: str = ""  # compares the metrics with a constant prediction

    def per_class(self, classes: Sequence[str]) -> list[dict[str, Any]]:
        """Returns {class, samples, precision, recall, ...} of each class or label; None for an undefined value.

        `accuracy`, of classes, is the recall: the name that readers of eval.json know.
        """
        rows = [] if self.by_class is None else self.by_class.rows(classes)
        return rows if self.confusion is None else [{**row, "accuracy": row["recall"]} for row in rows]
