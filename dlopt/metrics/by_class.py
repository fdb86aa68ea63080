"""Metrics of each class, one against the rest, or of each label."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dlopt.basics.plain_values import without_nan
from dlopt.metrics.thresholds import Thresholds

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ByClass:
    """Float64 [K] each; NaN where a value is undefined.

    Attributes:
        samples: of the class or with the label; also those without a prediction.
        precision: of the predictions of the class, the fraction that is true.
        recall: of the samples of the class, the fraction that is predicted: the accuracy of the class.
        f1: 2 TP / (2 TP + FP + FN).
        roc_auc: see `Thresholds`.
        average_precision: see `Thresholds`.
    """

    samples: "Tensor"
    precision: "Tensor"
    recall: "Tensor"
    f1: "Tensor"
    roc_auc: "Tensor"
    average_precision: "Tensor"

    @classmethod
    def of(cls, counts: "Sequence[Tensor]", scores: "Tensor", truth: "Iterable[Tensor]") -> "ByClass":
        """Computes the metrics of samples whose `scores` [N, K] rank them for each class.

        `counts`: correct predictions, samples and predictions of each class [K]. `truth`: for each class whether a
        sample has it [N]. Samples without a prediction have NaN among their scores: a class with NaN has no ranking.
        """
        import torch

        correct, samples, predicted = (each.double().cpu() for each in counts)
        ranked = torch.full((2, len(samples)), math.nan, dtype=torch.float64)
        for number, (column, true) in enumerate(zip(scores.unbind(1), truth, strict=True)):
            if not bool(column.isnan().any()):
                found = Thresholds.of(column, true)
                ranked[:, number] = ranked.new_tensor([found.roc_auc, found.average_precision])
        f1 = 2 * correct / (predicted + samples)
        return cls(samples, correct / predicted, correct / samples, f1, *ranked)

    def rows(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """Returns {class, samples, precision, recall, ...} of each class; None for an undefined value."""
        columns = {name: column.tolist() for name, column in vars(self).items()}
        rows = zip(names, *columns.values(), strict=True)
        return [
            without_nan(dict(zip(("class", *columns), (name, int(samples), *others), strict=True)))
            for name, samples, *others in rows
        ]
