"""Metrics of samples with several labels each, of which a probability of 0.5 predicts one."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dlopt.metrics.by_class import ByClass
from dlopt.metrics.declaration import Declaration, Evaluated, Sum, Whole

if TYPE_CHECKING:
    from torch import Tensor

THRESHOLD = 0.5  # probability from which on a label is predicted


@dataclass(frozen=True)
class LabelReport:
    """Metrics of each label, and F1 over all labels.

    `has_nan`: in the outputs: then the metrics of all labels are NaN.
    """

    by_label: ByClass
    micro_f1: float
    has_nan: bool = False


def label_report(outputs: "Tensor", targets: "Tensor", probabilities: "Callable[[Tensor], Tensor]") -> LabelReport:
    """Computes the metrics of outputs [N, K], which rank the samples, and targets [N, K], 0 or 1.

    `probabilities` maps outputs to probabilities, of which `THRESHOLD` and larger ones predict a label.
    """
    outputs, targets = outputs.cpu(), targets.cpu()
    is_nan = outputs.isnan().any(0)
    predicted, true = probabilities(outputs) >= THRESHOLD, targets > 0
    hits, positives, predictions = (each.sum(0).double() for each in (predicted & true, true, predicted))
    micro = 2 * hits.sum() / (predictions.sum() + positives.sum())
    # A NaN has no place in an order, and predicts nothing.
    counts = (hits.masked_fill(is_nan, math.nan), positives, predictions)
    return LabelReport(ByClass.of(counts, outputs, true.unbind(1)), micro.item(), bool(is_nan.any()))


def _scores(part: Evaluated) -> "Tensor":
    """Returns the number of samples and labels, and the sums of log losses and of Brier scores: float64 [3]."""
    import torch

    probabilities, targets = part.exact_probabilities, part.targets.double()
    eps = torch.finfo(torch.float64).eps  # as in scikit-learn
    true = torch.where(targets > 0, probabilities, 1 - probabilities).clamp(eps, 1 - eps)
    count = probabilities.new_tensor(probabilities.numel())
    return torch.stack([count, -true.log().sum(), (probabilities - targets).square().sum()])


REPORT = Whole(lambda split: label_report(split.outputs, split.targets, split.values))
SCORES = Sum(lambda _: 3, _scores)


def _mean(values: "Callable[[LabelReport], float]") -> "Callable[[LabelReport, object], float]":
    return lambda report, _: math.nan if report.has_nan else values(report)


METRICS = (
    Declaration(
        "mean_average_precision", "max", "", "average precision of each label (the area under precision over recall, "
        "without interpolation), mean over the labels that occur", "always", (REPORT,),
        _mean(lambda report: report.by_label.average_precision.nanmean().item()), header="{split} mAP",
    ),
    Declaration(
        "macro_f1", "max", "", "F1 of each label at the probability 0.5, mean over the labels that occur or are "
        "predicted", "always", (REPORT,), _mean(lambda report: report.by_label.f1.nanmean().item()),
    ),
    Declaration(
        "micro_f1", "max", "", "F1 over all labels at the probability 0.5", "always", (REPORT,),
        _mean(lambda report: report.micro_f1),
    ),
    Declaration(
        "roc_auc", "max", "", "area under the ROC curve of each label: the probability that a sample with the label "
        "ranks above one without it, mean over the labels that occur", "tested", (REPORT,),
        _mean(lambda report: report.by_label.roc_auc.nanmean().item()),
    ),
    Declaration(
        "log_loss", "min", "nats", "-log of the probability of what is true of each label, mean over the labels, "
        "without weights and label smoothing", "tested", (SCORES,), lambda sums, _: (sums[1] / sums[0]).item(),
    ),
    Declaration(
        "brier_score", "min", "", "squared error of the probability of each label, mean over the labels (Brier 1950)",
        "tested", (SCORES,), lambda sums, _: (sums[2] / sums[0]).item(),
    ),
)  # fmt: skip
