"""The curves of a test, against scikit-learn."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from sklearn import metrics
from sklearn.calibration import calibration_curve

from dlopt.metrics.classes import BINS
from dlopt.metrics.declaration import Evaluated
from dlopt.results.tested_curves import Curves, of_classes, of_values, thinned


def part_of(seed: int, classes: int, count: int = 60) -> tuple[Evaluated, np.ndarray, np.ndarray]:
    """Returns samples whose outputs have ties, and their probabilities and targets; the last class may be absent."""
    draw = torch.Generator().manual_seed(seed)
    outputs = torch.randn(count, classes, generator=draw).mul(2).round() / 2
    targets = torch.randint(0, max(classes - 1, 2), (count,), generator=draw)
    outputs[range(count), targets] += 1
    part = Evaluated(outputs, targets, classes, lambda outputs: outputs.softmax(1))
    return part, part.exact_probabilities.numpy(), targets.numpy()


def distances(points: np.ndarray, line: Any) -> np.ndarray:
    """Returns the distance of each point [n, 2] from the line through points [m, 2]."""
    line = np.array(line)
    start, chord = line[:-1], np.diff(line, axis=0)
    offsets = points[:, None] - start
    along = (offsets * chord).sum(2) / np.maximum((chord**2).sum(1), 1e-300)
    nearest = offsets - along.clip(0, 1)[..., None] * chord
    found: np.ndarray = np.hypot(*np.moveaxis(nearest, 2, 0)).min(1)
    return found


@pytest.mark.parametrize("seed", range(10))
def test_curves_and_areas_are_those_of_scikit_learn(seed: int) -> None:
    classes = 2 + seed % 4
    part, probabilities, targets = part_of(seed, classes)
    curves = of_classes(part, [*map(str, range(classes))])
    shown = {1} if classes == 2 else {int(label) for label in np.unique(targets)}
    named = [curve for curve in curves.roc if not curve.name.startswith("mean")]
    assert {int(curve.name) for curve in named} == shown
    for roc in named:
        truth, scores = targets == int(roc.name), probabilities[:, int(roc.name)]
        assert roc.area == pytest.approx(metrics.roc_auc_score(truth, scores), abs=1e-12)
        rates = np.stack(metrics.roc_curve(truth, scores)[:2], 1)
        assert distances(rates, roc.points).max() < 1e-12 and distances(np.array(roc.points), rates).max() < 1e-12
        precision = next(curve for curve in curves.precision_recall if curve.name == roc.name)
        assert precision.area == pytest.approx(metrics.average_precision_score(truth, scores), abs=1e-12)
        values, recalls, _ = metrics.precision_recall_curve(truth, scores)
        assert distances(np.stack([recalls, values], 1)[:-1], precision.points).max() < 1e-12
        x, y = np.array(precision.points).T
        assert np.trapezoid(y, x) == pytest.approx(precision.area, abs=1e-12)
    if classes > 2:
        mean = curves.roc[0]
        assert mean.area == pytest.approx(np.mean([curve.area for curve in named]), abs=1e-12)
        assert np.trapezoid(*np.array(mean.points).T[::-1]) == pytest.approx(mean.area, abs=2e-3)
    best = part.predictions.numpy()
    correct, confidence = best == targets, probabilities.max(1)
    accuracy, mean_confidence = calibration_curve(correct, confidence, n_bins=BINS)
    assert np.allclose([row[:2] for row in curves.calibration], np.stack([mean_confidence, accuracy], 1), atol=1e-12)
    assert sum(row[2] for row in curves.calibration) == len(targets)


def test_labels_nan_and_classes_without_a_curve() -> None:
    outputs = torch.tensor([[2.0, -1, 0], [1, -2, 0], [torch.nan, 0, 0], [-1, 3, 0]])
    targets = torch.tensor([[1.0, 0, 1], [0, 0, 1], [1, 1, 1], [0, 1, 1]])
    curves = of_classes(Evaluated(outputs, targets, 3, torch.sigmoid), ["a", "b", "always"])
    assert [curve.name for curve in curves.roc] == ["mean of 2", "a", "b"] and curves.roc[1].area == 1.0
    assert sum(row[2] for row in curves.calibration) == 9
    classes = Evaluated(outputs[2:3], torch.tensor([1]), 3, lambda outputs: outputs.softmax(1))
    assert of_classes(classes, ["a", "b", "c"]) == Curves()


def test_at_most_five_classes_and_the_mean() -> None:
    part, *_ = part_of(0, 12, 300)
    curves = of_classes(part, [*map(str, range(12))])
    areas = [curve.area for curve in curves.precision_recall]
    assert len(areas) == 6 and areas[1:] == sorted(areas[1:]) and areas[0] > areas[1]


def test_thinning_keeps_corners() -> None:
    x = np.linspace(0, 1, 20_001)
    stairs = np.stack([np.repeat(x[::4000], 2)[1:], np.repeat(x[::4000], 2)[:-1]], 1)
    dense = np.concatenate([np.linspace(a, b, 50) for a, b in itertools.pairwise(stairs)])
    assert np.allclose(thinned(dense, 200), stairs, atol=1e-12)
    noisy = np.stack([x, np.random.default_rng(0).normal(size=len(x)).cumsum() / 150], 1)
    kept = thinned(noisy, 200)
    assert len(kept) == 200 and kept[0] == tuple(noisy[0]) and kept[-1] == tuple(noisy[-1])
    assert distances(noisy[::50], kept).max() < 0.02
    values = of_values(np.arange(1000.0)[::-1], np.arange(1000.0)[::-1] + 1).predicted
    assert len(values) <= 400 and values[0] == (0, 1) and values[-1] == (999, 1000)
