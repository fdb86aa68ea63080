"""Draws the figures of a ladder; a figure without data is missing."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from dlopt.lab.benchmark.figures import label
from dlopt.lab.benchmark.scores import Interval
from dlopt.lab.ladder.analysis import Analysis
from dlopt.lab.ladder.rates import FITTED
from dlopt.lab.ladder.results import Results
from dlopt.results import drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMNS = 4  # of a legend


def draw(results: Results) -> dict[str, "Figure"]:
    """Returns the figures with data, by the names of their files."""
    found: dict[str, Figure] = {}
    if results.analysis is not None:
        found["loss"] = loss(results, results.analysis)
        if results.stated(results.analysis):
            found["speed_up"] = speed_up(results, results.analysis)
    if any(search.losses for search in results.searches.values()):
        found["rates"] = rates(results)
    return found


def loss(results: Results, analysis: Analysis) -> "Figure":
    """Draws the loss of each run against compute, with the laws."""
    figure, axes = _panel("Loss against compute, with the laws")
    compute = np.asarray(analysis.measured.compute)
    grid = np.geomspace(compute[0] / 1.3, compute[-1] * 1.3, 100)
    for i, (name, table) in enumerate(analysis.measured.losses.items()):
        style = drawing.style(i, linewidth=2.2)
        axes.plot(grid, [analysis.scaling_laws.loss(name, each) for each in grid], label=label(name), **style)
        axes.plot(np.repeat(compute, table.shape[1]), table.ravel(), drawing.MARKERS[i % 7], color=style["color"],
                  markersize=6, alpha=0.7)  # fmt: skip
    axes.set_xscale("log")
    drawing.logarithmic(axes)
    axes.set_xlabel("compute of the training [FLOPs]")
    axes.set_ylabel(f"{drawing.metric_label(results.ladder.metric)} at the end")
    drawing.clean_axes(axes)
    drawing.legend_below(figure, axes, min(_COLUMNS, len(analysis.measured.losses)), fontsize=13)
    return figure


def speed_up(results: Results, analysis: Analysis) -> "Figure":
    """Draws the speed-up over the baseline against the parameters: of the laws (lines), and without them (markers)."""
    figure, axes = _panel(f"Speed-up over {label(analysis.measured.baseline)} by model size")
    sizes = [results.ladder.rungs[rung].parameters for rung in analysis.measured.rungs]
    stated = results.stated(analysis)
    for i, (name, gain) in enumerate(analysis.gains.items(), 1):
        if name not in stated:
            continue
        style = drawing.style(i, linewidth=2.2)
        seen = 0 if gain.contradicted else _last_measured(gain.interpolated)
        axes.plot(sizes[:seen], [each.value for each in gain.speed_up][:seen], **style)
        values, low, high = (_ends(gain.interpolated, end) for end in ("value", "low", "high"))
        axes.plot(sizes, values, drawing.MARKERS[i % 7], color=style["color"], markersize=8)
        axes.vlines(sizes, low, high, color=style["color"], linewidth=2)
        axes.plot([], [], marker=drawing.MARKERS[i % 7], label=label(name), **style)  # for the legend
        if not math.isnan(gain.speed_up[0].low):
            low, high = (_ends(gain.speed_up, end) for end in ("low", "high"))
            axes.fill_between(sizes[:seen], low[:seen], high[:seen], color=style["color"], alpha=0.15, linewidth=0)
    axes.axhline(1, color="0.3", linestyle=(0, (5, 4)), linewidth=1)
    axes.set_xscale("log")
    drawing.logarithmic(axes)
    axes.set_xlabel("parameters")
    axes.set_ylabel(f"speed-up over {label(analysis.measured.baseline)} in compute")
    drawing.clean_axes(axes)
    drawing.legend_below(figure, axes, min(_COLUMNS, len(analysis.gains)), fontsize=13)
    return figure


def _panel(title: str) -> "tuple[Figure, Axes]":
    figure = drawing.figure(9.6, 5.8, title, fontsize=15)
    axes = figure.add_subplot()
    axes.tick_params(which="both", labelsize=12)
    for text in (axes.xaxis.label, axes.yaxis.label):
        text.set_fontsize(13)
    return figure, axes


def _last_measured(points: Sequence[Interval]) -> int:
    """Returns the number of sizes up to the last one with a marker; all, if none has one.

    Beyond it the baseline was not trained to the optimizer's loss: the law extrapolates.
    """
    return max((i for i, each in enumerate(points, 1) if not math.isnan(each.value)), default=len(points))


def _ends(intervals: Sequence[Interval], end: str) -> list[float]:
    return [getattr(each, end) for each in intervals]


def rates(results: Results) -> "Figure":
    """Draws the best learning rates of the searched rungs and their fits against the parameters."""
    figure, axes = _panel("Best learning rates by model size")
    sizes = {name: rung.parameters for name, rung in results.ladder.rungs.items()}
    for i, (name, search) in enumerate(results.searches.items()):
        style = drawing.style(i, linewidth=2.2)
        fit = search.fit
        smallest = min((sizes[rung] for rung in [*search.optima][-FITTED:]), default=0)
        fitted = [each for each in sizes.values() if each >= smallest]
        values = [math.nan if fit is None else fit(each) for each in fitted]
        axes.plot(fitted, values, label=label(name), **style)
        optima = {sizes[rung]: best.lr for rung, best in search.optima.items()}
        axes.plot([*optima], [*optima.values()], drawing.MARKERS[i % 7], color=style["color"], markersize=8)
    axes.set_xscale("log")
    drawing.logarithmic(axes)
    axes.set_xlabel("parameters")
    axes.set_ylabel("learning rate")
    drawing.clean_axes(axes)
    drawing.legend_below(figure, axes, min(_COLUMNS, len(results.searches)), fontsize=13)
    return figure
