"""Plots of a test: the curves of classes or labels side by side; predictions against targets, and their errors."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from dlopt.basics.formats import format_number
from dlopt.metrics.classes import BINS
from dlopt.results import drawing
from dlopt.results.most_wrong import shortened
from dlopt.results.tested_curves import Curve, Curves

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_POINTS = 5000  # of a scatter plot
_MOST_BINS = 40


def plot_curves(curves: Curves, title: str, *, are_labels: bool) -> "Figure":
    """Plots ROC, precision over recall, and calibration above the number of samples in each bin."""
    figure = drawing.figure(12.6, 4.6, title)
    panels = figure.subplot_mosaic("abc;abd", height_ratios=[4, 1])
    roc, precision, calibration, samples = panels.values()
    _plot(roc, curves.roc, "AUC", "lower right")
    roc.plot([0, 1], [0, 1], ":", color="0.6", linewidth=1)
    roc.set(title="ROC", xlabel="false positive rate", ylabel="true positive rate (recall)")
    _plot(precision, curves.precision_recall, "AP", "lower left")
    precision.set(title="precision-recall", xlabel="recall", ylabel="precision")
    if len(curves.precision_recall) == 1:  # all samples are predicted: the fraction of true ones
        precision.axhline(curves.precision_recall[0].points[-1][1], linestyle=":", color="0.6", linewidth=1)
    confidence, accuracy, counts = zip(*curves.calibration, strict=True) if curves.calibration else ((), (), ())
    calibration.plot([0, 1], [0, 1], ":", color="0.6", linewidth=1)
    calibration.plot(confidence, accuracy, marker="o", markersize=4, **drawing.style(0))
    calibration.set(title="calibration", ylabel="fraction with the label" if are_labels else "accuracy")
    calibration.tick_params(labelbottom=False)
    samples.bar(confidence, counts, width=0.7 / BINS, color=drawing.COLOURS[0])
    samples.set(xlabel="probability" if are_labels else "confidence", ylabel="labels" if are_labels else "samples")
    samples.locator_params("y", nbins=3, integer=True)
    for axes in (roc, precision, calibration):
        axes.set_ylim(-0.02, 1.02)
    for axes in panels.values():
        axes.set_xlim(-0.02, 1.02)
        axes.title.set_fontsize(10)
    drawing.clean_axes(*panels.values())
    return figure


def _plot(axes: "Axes", curves: Sequence[Curve], area: str, place: Literal["lower left", "lower right"]) -> None:
    for i, curve in enumerate(curves):
        label = f"{drawing.literal(shortened(curve.name))} ({area} {format_number(curve.area)})"
        x, y = zip(*curve.points, strict=True)
        axes.plot(x, y, label=label, **drawing.style(i, linewidth=1.6))
    if curves:
        axes.legend(loc=place, fontsize=8, handlelength=3, framealpha=0.8, edgecolor="none")


def plot_values(targets: np.ndarray, predictions: np.ndarray, name: str, title: str) -> "Figure":
    """Plots predictions [N] against targets [N] beside the line of equal ones, and the histogram of their differences.

    `name`: of the target.
    """
    name = drawing.literal(name)
    figure = drawing.figure(8.8, 4.2, title)
    pairs, errors = figure.subplots(1, 2)
    every = -(-len(targets) // _POINTS)
    both = np.concatenate([targets, predictions])
    ends = [both.min(), both.max()]
    pairs.plot(ends, ends, ":", color="0.5", linewidth=1)
    pairs.plot(targets[::every], predictions[::every], "o", color=drawing.COLOURS[0], markersize=3, alpha=0.5)
    pairs.set(xlabel=name, ylabel=f"predicted {name}")
    differences = predictions - targets
    bins = min(max(int(len(differences) ** 0.5), 10), _MOST_BINS)
    errors.hist(differences, bins=bins, color=drawing.COLOURS[0], alpha=0.8)
    errors.axvline(0, linestyle=":", color="0.5", linewidth=1)
    errors.set(xlabel=f"predicted {name} - {name}", ylabel="samples")
    errors.locator_params("y", integer=True)
    drawing.clean_axes(pairs, errors)
    return figure
