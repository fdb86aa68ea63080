"""Metrics of samples with several labels each: mean average precision, and F1 at a probability of 0.5."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dlopt.metrics.declaration import Declaration, Whole

if TYPE_CHECKING:
    from torch import Tensor

THRESHOLD = 0.5  # probability from which on a label is predicted


def average_precision(scores: "Tensor", targets: "Tensor") -> "Tensor":
    """Returns sum_n (R_n - R_(n-1)) P_n of each label: float64 [K]; nan for a label that no sample has.

    P_n and R_n are precision and recall of the samples whose score is at least the nth largest distinct one, without
    interpolation, as in scikit-learn. scores: [N, K]; targets: [N, K], 0 or 1.
    """
    import torch

    result = torch.full((scores.shape[1],), torch.nan, dtype=torch.float64)
    for label, (column, truth) in enumerate(zip(scores.unbind(1), targets.double().unbind(1), strict=True)):
        if not bool(truth.any()):
            continue
        column, order = column.sort(descending=True)
        # Samples of equal score enter together: only the last of them is a threshold.
        ends = torch.cat([(column[1:] != column[:-1]).nonzero().squeeze(1), torch.tensor([len(column) - 1])])
        found = truth[order].cumsum(0)[ends]
        precision, recall = found / (ends + 1), found / found[-1]
        result[label] = (recall.diff(prepend=recall.new_zeros(1)) * precision).sum()
    return result


@dataclass(frozen=True)
class LabelReport:
    """Metrics of each label, and their means.

    Attributes:
        positives: samples that have the label: int64 [K].
        precision: average precision: float64 [K]; nan for a label that no sample has.
        f1: 2 TP / (2 TP + FP + FN): float64 [K]; nan for a label that neither occurs nor is predicted.
        micro_f1: the same over all labels.
    """

    positives: "Tensor"
    precision: "Tensor"
    f1: "Tensor"
    micro_f1: float
    has_nan: bool = False  # in the outputs: then the metrics of all labels are NaN, too

    def rows(self, labels: Sequence[str]) -> list[dict[str, Any]]:
        """Returns {class, samples, average_precision, f1} of each label."""
        columns = (labels, self.positives.tolist(), self.precision.tolist(), self.f1.tolist())
        names = ("class", "samples", "average_precision", "f1")
        return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def label_report(outputs: "Tensor", targets: "Tensor", probabilities: "Callable[[Tensor], Tensor]") -> LabelReport:
    """Computes the metrics of outputs [N, K], which rank the samples, and targets [N, K], 0 or 1.

    `probabilities` maps outputs to probabilities, of which `THRESHOLD` and larger ones predict a label.
    """
    outputs, targets = outputs.cpu(), targets.cpu()
    is_nan = outputs.isnan().any(0)
    predicted, true = probabilities(outputs) >= THRESHOLD, targets > 0
    counts = [each.sum(0) for each in (predicted & true, predicted, true)]
    hits, predictions, positives = (count.double() for count in counts)
    micro = 2 * hits.sum() / (predictions.sum() + positives.sum())
    f1 = 2 * hits / (predictions + positives)
    # A NaN has no place in an order, and predicts nothing.
    precision, f1 = (each.masked_fill(is_nan, math.nan) for each in (average_precision(outputs, targets), f1))
    return LabelReport(counts[2], precision, f1, micro.item(), bool(is_nan.any()))


REPORT = Whole(lambda split: label_report(split.outputs, split.targets, split.values))


def _mean(values: "Callable[[LabelReport], float]") -> "Callable[[LabelReport, object], float]":
    return lambda report, _: math.nan if report.has_nan else values(report)


METRICS = (
    Declaration(
        "mean_average_precision", "max", "", "average precision of each label (the area under precision over recall, "
        "without interpolation), mean over the labels that occur", "always", (REPORT,),
        _mean(lambda report: report.precision.nanmean().item()), header="{split} mAP",
    ),
    Declaration(
        "macro_f1", "max", "", "F1 of each label at the probability 0.5, mean over the labels that occur or are "
        "predicted", "always", (REPORT,), _mean(lambda report: report.f1.nanmean().item()),
    ),
    Declaration(
        "micro_f1", "max", "", "F1 over all labels at the probability 0.5", "always", (REPORT,),
        _mean(lambda report: report.micro_f1),
    ),
)  # fmt: skip
