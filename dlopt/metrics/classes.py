"""Metrics of classification: of the predicted classes, of their probabilities, and of each class."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from dlopt.metrics.by_class import ByClass
from dlopt.metrics.declaration import Declaration, Evaluated, Sum, Whole, predicted_classes

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
    return correct.new_zeros(bins).index_add_(0, bin_of(confidence, bins), correct - confidence)


def bin_of(confidence: "Tensor", bins: int = BINS) -> "Tensor":
    """Returns the bin of each confidence, float64 [N]: int64 [N], of `bins` of equal width from 0 to 1."""
    return ((confidence * bins).ceil().long() - 1).clamp(0, bins - 1)


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


def _scores(part: Evaluated) -> "Tensor":
    """Returns the sums of log losses and of Brier scores: float64 [2].

    The log loss is that of a probability of at least 2.2e-16, as in scikit-learn. The Brier score is the squared
    distance of the probabilities from 0 or 1, of the second of two classes, and summed over more (Brier 1950).
    """
    import torch
    from torch.nn import functional

    probabilities, targets = part.exact_probabilities, part.targets
    true = probabilities.gather(1, targets.unsqueeze(1))
    distances = (probabilities - functional.one_hot(targets, part.size)).square()
    brier = distances[:, 1] if part.size == 2 else distances
    return torch.stack([-true.clamp_min(torch.finfo(torch.float64).eps).log().sum(), brier.sum()])


def _by_rank(part: Evaluated) -> ByClass:
    correct, true, predicted = _counts(part).view(3, -1)
    truth = (part.targets == number for number in range(part.size))
    return ByClass.of((correct, true, predicted), part.exact_probabilities, truth)


COUNTS = Sum(lambda classes: 3 * classes, _counts)
TOP_HITS = Sum(lambda _: 1, _top_hits)
GAPS = Sum(
    lambda _: BINS,
    lambda part: calibration_gaps(part.probabilities, part.targets, predictions=part.predictions),
)
SCORES = Sum(lambda _: 2, _scores)
BY_CLASS = Whole(_by_rank)

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


def _balanced_accuracy(sums: "Tensor", _: object) -> float:
    correct, true, _predicted = _by_class(sums)
    return (correct / true).nanmean().item()


def _second_or_mean(values: "Tensor") -> float:
    return (values[1] if len(values) == 2 else values.nanmean()).item()


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
        "balanced_accuracy", "max", "%", "recall of each class, mean over the classes that occur", "tested",
        (COUNTS,), _balanced_accuracy,
    ),
    Declaration(
        "roc_auc", "max", "", "area under the ROC curve (AUC): the probability that a sample of the class ranks above "
        "another, of the second of two classes; of more, each against the rest, mean over those that occur",
        "tested", (BY_CLASS,), lambda found, _: _second_or_mean(found.roc_auc),
    ),
    Declaration(
        "average_precision", "max", "", "area under precision over recall, without interpolation (PR AUC), of the "
        "second of two classes; of more, each against the rest, mean over those that occur", "tested", (BY_CLASS,),
        lambda found, _: _second_or_mean(found.average_precision),
    ),
    Declaration(
        "log_loss", "min", "nats", "-log of the probability of the true class, without weights and label smoothing",
        "tested", (COUNTS, SCORES), lambda counts, scores, _: (scores[0] / _by_class(counts).true.sum()).item(),
    ),
    Declaration(
        "brier_score", "min", "", "squared error of the probability of the second of two classes; of more, summed over "
        "the classes (Brier 1950)", "tested", (COUNTS, SCORES),
        lambda counts, scores, _: (scores[1] / _by_class(counts).true.sum()).item(),
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
