"""Metrics of classification: accuracies by class, F1, Matthews' correlation, calibration."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from dlopt.metrics.declaration import Declaration, Evaluated, Sum, predicted_classes

if TYPE_CHECKING:
    from torch import Tensor

BINS = 15  # confidence bins, as in Guo et al. 2017
TOP = 5


def confusion_matrix(targets: "Tensor", predictions: "Tensor", classes: int) -> "Tensor":
    """Counts samples by true class (row) and predicted class (column): int64 [classes, classes].

    targets, predictions: int64 [N]; samples without a prediction (-1) are left out.
    """
    pairs = (targets * classes + predictions)[predictions >= 0]
    return pairs.bincount(minlength=classes**2).view(classes, classes)


def class_accuracies(confusion: "Tensor", samples: "Tensor | None" = None) -> "Tensor":
    """Returns the accuracy (recall) of each class: float64 [K]; nan for a class without samples.

    `samples`: of each class, if some have no prediction.
    """
    return confusion.diagonal().double() / (confusion.sum(1) if samples is None else samples)


def f1_scores(confusion: "Tensor", samples: "Tensor | None" = None) -> "Tensor":
    """Returns 2 TP / (2 TP + FP + FN) of each class: float64 [K]; nan if it neither occurs nor is predicted."""
    return 2 * confusion.diagonal().double() / (confusion.sum(0) + (confusion.sum(1) if samples is None else samples))


def calibration_gaps(
    probabilities: "Tensor", targets: "Tensor", bins: int = BINS, predictions: "Tensor | None" = None
) -> "Tensor":
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
    return correct.new_zeros(bins).index_add_(0, bin_of, correct - confidence)


# -- accumulated sums


class Counts(NamedTuple):
    """Samples of each class: float64 [K] each."""

    correct: "Tensor"
    true: "Tensor"
    predicted: "Tensor"


def _counts(part: Evaluated) -> "Tensor":
    import torch

    targets, predictions = part.targets, part.predictions
    labels = (targets[predictions == targets], targets, predictions[predictions >= 0])
    return torch.cat([each.bincount(minlength=part.size) for each in labels])


def _top_hits(part: Evaluated) -> "Tensor":
    hits = (part.outputs.topk(TOP, dim=1).indices == part.targets.unsqueeze(1)).any(1)
    return (hits & (part.predictions >= 0)).sum().view(1)


COUNTS = Sum(lambda classes: 3 * classes, _counts)
TOP_HITS = Sum(lambda _: 1, _top_hits)
GAPS = Sum(
    lambda _: BINS,
    lambda part: calibration_gaps(part.probabilities, part.targets, predictions=part.predictions),
)

# -- the metrics


def _by_class(sums: "Tensor") -> Counts:
    return Counts(*sums.view(3, -1))


def _macro_f1(sums: "Tensor", _: object) -> float:
    correct, true, predicted = _by_class(sums)
    return (2 * correct / (true + predicted)).nanmean().item()


def _matthews(sums: "Tensor", _: object) -> float:
    """Gorodkin 2004, equation 8. Samples without a prediction count as predictions of an extra class."""
    correct, true, predicted = _by_class(sums)
    samples = true.sum()
    missing = samples - predicted.sum()
    covariance = correct.sum() * samples - (true * predicted).sum()
    spread = (samples**2 - predicted.square().sum() - missing**2) * (samples**2 - true.square().sum())
    return (covariance / spread.sqrt()).nan_to_num(0.0).item()  # 0 if all targets or all predictions are of one class


def _class_accuracy(sums: "Tensor", classes: Sequence[str]) -> dict[str, float]:
    correct, true, _ = _by_class(sums)
    found = {name: c / n for name, c, n in zip(classes, correct.tolist(), true.tolist(), strict=True) if n}
    return {f"class_accuracy/{name}": each for name, each in found.items()} | {
        "worst_class_accuracy": min(found.values())
    }


METRICS = (
    Declaration(
        "accuracy", "max", "%", "correct predictions, as a fraction of the samples", "always", header="{split} acc"
    ),
    Declaration(
        "top5_accuracy", "max", "%", "samples whose class has one of the five largest outputs", "tested",
        (COUNTS, TOP_HITS), lambda counts, hits, _: (hits[0] / _by_class(counts).true.sum()).item(), least=TOP + 1,
    ),
    Declaration(
        "macro_f1", "max", "", "F1 of each class, mean over the classes that occur or are predicted", "tested",
        (COUNTS,), _macro_f1,
    ),
    Declaration(
        "matthews_correlation", "max", "", "correlation of true and predicted classes, 0 for a constant prediction "
        "(Matthews 1975; for several classes Gorodkin 2004)", "requested", (COUNTS,), _matthews,
    ),
    Declaration(
        "calibration_error", "min", "", "expected difference of confidence and accuracy, in 15 bins (Guo et al. 2017)",
        "tested", (COUNTS, GAPS), lambda counts, gaps, _: (gaps.abs().sum() / _by_class(counts).true.sum()).item(),
    ),
    Declaration(
        "class_accuracy", "max", "%", "accuracy of each class (class_accuracy/NAME), and of the worst one", "requested",
        (COUNTS,), _class_accuracy, by_class=True, also=("worst_class_accuracy",),
    ),
)  # fmt: skip
