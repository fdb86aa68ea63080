"""Counts of hits and false alarms at every threshold of a score: the base of ROC and precision-recall curves."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Thresholds:
    """Samples whose score is at least a threshold, for each distinct score as the threshold, the largest first.

    Attributes:
        scores: the thresholds: [T], of the dtype of the scores.
        hits: samples that are true: float64 [T].
        false_alarms: samples that are not: float64 [T].
    """

    scores: "Tensor"
    hits: "Tensor"
    false_alarms: "Tensor"

    @classmethod
    def of(cls, scores: "Tensor", truth: "Tensor") -> "Thresholds":
        """Counts samples by scores [N], without NaN, and truth [N], bool or 0 and 1; N >= 1."""
        import torch

        scores, order = scores.sort(descending=True)
        # Samples of equal score enter together: only the last of them is a threshold.
        ends = torch.cat([(scores[1:] != scores[:-1]).nonzero().squeeze(1), order.new_tensor([len(scores) - 1])])
        hits = truth[order].double().cumsum(0)[ends]
        return cls(scores[ends], hits, ends + 1 - hits)

    @property
    def precision(self) -> "Tensor":
        return self.hits / (self.hits + self.false_alarms)

    @property
    def recall(self) -> "Tensor":
        """Also called true positive rate; NaN if no sample is true."""
        return self.hits / self.hits[-1]

    @property
    def false_positive_rate(self) -> "Tensor":
        """NaN if all samples are true."""
        return self.false_alarms / self.false_alarms[-1]

    @property
    def f1(self) -> "Tensor":
        """2 TP / (2 TP + FP + FN)."""
        return 2 * self.hits / (self.hits + self.false_alarms + self.hits[-1])

    @property
    def average_precision(self) -> float:
        """Returns sum_n (R_n - R_(n-1)) P_n, without interpolation, as in scikit-learn; NaN if no sample is true."""
        return (self.recall.diff(prepend=self.recall.new_zeros(1)) * self.precision).sum().item()

    @property
    def roc_auc(self) -> float:
        """Returns the area under recall over false positive rate: the probability that a true sample has a larger score
        than another, ties counted by half (Hanley and McNeil 1982). NaN if all samples are true, or none is."""
        import torch

        zero = self.hits.new_zeros(1)
        return torch.trapezoid(torch.cat([zero, self.recall]), torch.cat([zero, self.false_positive_rate])).item()
