"""The curves of a test: ROC, precision over recall, calibration; predictions against targets. Thinned for a page."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from dlopt.metrics.classes import BINS, bin_of

if TYPE_CHECKING:
    from torch import Tensor

    from dlopt.metrics.declaration import Evaluated
    from dlopt.metrics.thresholds import Thresholds

_NAMED = 5  # classes with a curve of their own, if there are more
_POINTS = 200  # of a curve
_INVISIBLE = 1e-4  # distance of a point from the line without it, on axes from 0 to 1
_GRID = np.linspace(0, 1, 1001)  # on which curves are averaged
_PAIRS = 400

Area = tuple[float, np.ndarray]  # below a curve, and its points [n, 2]


@dataclass(frozen=True)
class Curve:
    """A curve of a class against all others, or the mean of such curves: name, area below, points [x, y]."""

    name: str
    area: float
    points: list[tuple[float, float]]


@dataclass(frozen=True)
class Curves:
    """What is drawn of a test; a list is empty where the task has no such thing.

    Attributes:
        roc: recall over false positive rate: of the second of two classes; of more, or of labels, the mean and the
            lowest.
        precision_recall: precision over recall, of the same classes.
        calibration: mean confidence, accuracy and samples of the bins of `metrics.classes.calibration_gaps` that have
            any; of labels: mean probability, and the fraction of true ones.
        predicted: targets and predictions in the unit of the target, evenly spaced in the order of the targets.
    """

    roc: list[Curve] = field(default_factory=list)
    precision_recall: list[Curve] = field(default_factory=list)
    calibration: list[tuple[float, float, int]] = field(default_factory=list)
    predicted: list[tuple[float, float]] = field(default_factory=list)

    @property
    def saved(self) -> dict[str, Any]:
        """Plain values, rounded to what is visible."""
        curves = {name: [vars(each) | {"points": np.round(each.points, 5).tolist()} for each in getattr(self, name)]
                  for name in ("roc", "precision_recall")}  # fmt: skip
        return {**vars(self), **curves}


def of_classes(part: "Evaluated", names: Sequence[str]) -> Curves:
    """Computes the curves of classes, or of several labels per sample; samples whose outputs have NaN are left out."""
    from dlopt.metrics.thresholds import Thresholds

    probabilities = part.exact_probabilities
    known = ~probabilities.isnan().any(1)
    probabilities, targets = probabilities[known], part.targets[known]
    if not len(targets):
        return Curves()
    if targets.ndim == 2:
        truths, shown = [*(targets > 0).unbind(1)], range(len(names))
        calibration = _calibration(probabilities.flatten(), targets.flatten() > 0)
    else:
        truths = [targets == label for label in range(len(names))]
        shown = range(len(names) == 2, len(names))
        calibration = _calibration(probabilities.amax(1), part.predictions[known] == targets)

    def both(label: int) -> tuple[Area, Area]:
        found = Thresholds.of(probabilities[:, label], truths[label])
        return (found.roc_auc, _roc(found)), (found.average_precision, _precision_recall(found))

    # A class that all samples have, or none, has no curves.
    varied = [label for label in shown if 0 < int(truths[label].sum()) < len(targets)]
    # On a grid, because all points of many classes may not fit into memory.
    averaged = {label: [(area, np.interp(_GRID, *points.T)) for area, points in both(label)] for label in varied}
    lowest = sorted(varied, key=lambda label: averaged[label][1][0])[:_NAMED]
    drawn: tuple[list[Curve], list[Curve]] = [], []
    for curves, *found in zip(drawn, *averaged.values(), strict=True):
        if len(found) > 1:
            area, mean = (np.mean(column, 0) for column in zip(*found, strict=True))
            curves.append(Curve(f"mean of {len(found)}", float(area), thinned(np.stack([_GRID, mean], 1), _POINTS)))
    for label in lowest:
        for curves, (area, points) in zip(drawn, both(label), strict=True):
            curves.append(Curve(names[label], area, thinned(points, _POINTS)))
    return Curves(drawn[0], drawn[1], calibration)


def of_values(targets: np.ndarray, predictions: np.ndarray) -> Curves:
    """Returns pairs of targets [N] and predictions [N]."""
    order = np.argsort(targets, kind="stable")
    order = order[np.unique(np.linspace(0, len(order) - 1, min(_PAIRS, len(order))).round().astype(int))]
    return Curves(predicted=list(zip(targets[order].tolist(), predictions[order].tolist(), strict=True)))


def thinned(points: np.ndarray, limit: int) -> list[tuple[float, float]]:
    """Keeps at most `limit` of the points [n, 2] of a line: the corners that one sees (Douglas and Peucker 1973)."""
    kept, waiting = {0, len(points) - 1}, list[tuple[float, int, int, int]]()  # the farthest point of each segment

    def divide(low: int, high: int) -> None:
        if high - low < 2:
            return
        x, y = (points[low + 1 : high] - points[low]).T
        width, height = points[high] - points[low]
        length = np.hypot(width, height)
        distances = np.hypot(x, y) if length == 0 else np.abs(x * height - y * width) / length
        middle = int(distances.argmax())
        heapq.heappush(waiting, (-float(distances[middle]), low, low + 1 + middle, high))

    divide(0, len(points) - 1)
    while waiting and len(kept) < limit and waiting[0][0] < -_INVISIBLE:
        _, low, middle, high = heapq.heappop(waiting)
        kept.add(middle)
        divide(low, middle)
        divide(middle, high)
    return [(x, y) for x, y in points[sorted(kept)].tolist()]


def _roc(found: "Thresholds") -> np.ndarray:
    rates = np.stack([found.false_positive_rate.numpy(), found.recall.numpy()], 1)
    return np.concatenate([np.zeros((1, 2)), rates])


def _precision_recall(found: "Thresholds") -> np.ndarray:
    """Returns steps, from each recall to the next at the precision of the latter: their area is average precision."""
    recall = np.concatenate([[0.0], found.recall.numpy()])
    recalls = np.stack([recall[:-1], recall[1:]], 1).ravel()
    return np.stack([recalls, found.precision.numpy().repeat(2)], 1)


def _calibration(confidence: "Tensor", correct: "Tensor") -> list[tuple[float, float, int]]:
    bins = bin_of(confidence)
    samples, hits, sums = (bins.bincount(weights, minlength=BINS) for weights in (None, correct.double(), confidence))
    rows = zip((sums / samples).tolist(), (hits / samples).tolist(), samples.tolist(), strict=True)
    return [row for row in rows if row[2]]
