"""Metrics of classification as functions of sums: accuracies by class, F1, calibration."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dlopt.metrics.sums import Reduce, predicted_classes

BINS = 15  # confidence bins, as in Guo et al. 2017


def confusion_matrix(targets: Tensor, predictions: Tensor, classes: int) -> Tensor:
    """Counts samples by true class (row) and predicted class (column): int64 [classes, classes].

    targets, predictions: int64 [N]; samples without a prediction (-1) are left out.
    """
    pairs = (targets * classes + predictions)[predictions >= 0]
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def class_accuracies(confusion: Tensor, samples: Tensor | None = None) -> Tensor:
    """Returns the accuracy (recall) of each class: float64 [K]; nan for a class without samples.

    `samples`: of each class, if some have no prediction.
    """
    return confusion.diagonal().double() / (confusion.sum(1) if samples is None else samples)


def f1_scores(confusion: Tensor, samples: Tensor | None = None) -> Tensor:
    """Returns 2 TP / (2 TP + FP + FN) of each class: float64 [K]; nan if it neither occurs nor is predicted."""
    return 2 * confusion.diagonal().double() / (confusion.sum(0) + (confusion.sum(1) if samples is None else samples))


def calibration_gaps(
    probabilities: Tensor, targets: Tensor, bins: int = BINS, predictions: Tensor | None = None
) -> Tensor:
    """Returns correct predictions minus the sum of confidences in each bin: float64 [bins].

    probabilities: [N, K]; targets: int64 [N]. `predictions`: int64 [N], of outputs whose probabilities are clamped to
    0..1 and may be equal; None: the most probable classes. NaN probabilities make the error NaN.

    The sum of their absolute values, divided by N, is the expected calibration error (Guo et al. 2017, equation 5): the
    sum over `bins` bins of equal width, by confidence (the largest probability), of the bin's fraction of samples times
    |accuracy - mean confidence|. A bin includes its upper edge.
    """
    predictions = predicted_classes(probabilities) if predictions is None else predictions
    confidence = probabilities.double().amax(1)
    correct = (predictions == targets).double()
    bin_of = ((confidence * bins).ceil().long() - 1).clamp(0, bins - 1)
    return torch.zeros(bins, dtype=torch.float64, device=correct.device).index_add_(0, bin_of, correct - confidence)


TOP = 5


@dataclass
class ClassMetrics:
    """Accumulates metrics of a classifier: top5_accuracy, macro_f1, calibration_error and class_accuracy.

    class_accuracy expands to class_accuracy/NAME of every class that occurs, and worst_class_accuracy.
    `probabilities` maps outputs [N, K] to class probabilities.
    """

    names: Sequence[str]
    classes: Sequence[str]
    probabilities: Callable[[Tensor], Tensor]
    _sums: Tensor | None = field(default=None, init=False)

    def add(self, outputs: Tensor, targets: Tensor) -> None:
        """Adds outputs [N, K] and targets int64 [N]."""
        count = len(self.classes)
        predictions = predicted_classes(outputs)
        is_valid = predictions >= 0
        columns = [
            torch.bincount(labels, minlength=count)
            for labels in (targets[predictions == targets], targets, predictions[is_valid])
        ]
        if "top5_accuracy" in self.names:
            hits = (outputs.topk(TOP, dim=1).indices == targets.unsqueeze(1)).any(1) & is_valid
            columns.append(hits.sum().view(1))
        if "calibration_error" in self.names:
            columns.append(calibration_gaps(self.probabilities(outputs), targets, predictions=predictions))
        sums = torch.cat([column.to(columns[-1].dtype) for column in columns])
        self._sums = sums if self._sums is None else self._sums + sums

    def means(self, reduce: Reduce | None) -> dict[str, float]:
        """Returns the metrics of all samples so far, on all ranks, by name; `reduce`: see `MetricSum`."""
        size = 3 * len(self.classes) + ("top5_accuracy" in self.names)
        size += BINS if "calibration_error" in self.names else 0
        # One transfer from the device per evaluation. `reduce` is a collective: a rank without samples calls it, too.
        local = [0.0] * size if self._sums is None else self._sums.tolist()  # zeros: this rank had no samples
        sums = torch.tensor(local if reduce is None else list(reduce(local)), dtype=torch.float64)
        correct, true, predicted, rest = sums.split([*[len(self.classes)] * 3, size - 3 * len(self.classes)])
        result = {}
        if "top5_accuracy" in self.names:
            result["top5_accuracy"] = (rest[0] / true.sum()).item()
        if "calibration_error" in self.names:
            result["calibration_error"] = (rest[-BINS:].abs().sum() / true.sum()).item()
        if "macro_f1" in self.names:
            result["macro_f1"] = (2 * correct / (true + predicted)).nanmean().item()
        if "class_accuracy" in self.names:
            accuracies = {
                name: c / n for name, c, n in zip(self.classes, correct.tolist(), true.tolist(), strict=True) if n
            }
            result |= {f"class_accuracy/{name}": accuracy for name, accuracy in accuracies.items()}
            result["worst_class_accuracy"] = min(accuracies.values())
        return result
