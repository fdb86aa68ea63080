"""Plots of the report as image files; each function returns a figure, or None without data."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dlopt.analysis import drawing
from dlopt.analysis.drawing import COLOURS, metric_label, style
from dlopt.analysis.report.reading import is_number, text
from dlopt.analysis.report.table import (
    Configuration,
    Importance,
    Sensitivity,
    Table,
    band,
    importance,
    sensitivities,
    time_to_target,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWN = 6  # configurations in a plot of curves
_AGAINST = {"epoch": "epoch", "step": "update", "seconds": "seconds of training"}
_MARKERS = "osD^vPX"


def plots(table: Table, target: float | None) -> dict[str, "Figure"]:
    """Returns file name -> figure of all plots with data."""
    makers: Mapping[str, Callable[[], Figure | None]] = {
        "learning_curves.png": lambda: learning_curves(table),
        "learning_rates.png": lambda: learning_rates(table),
        "importance.png": lambda: importance_bars(table, importance(table)),
        "parallel_coordinates.png": lambda: parallel_coordinates(table),
        "lr_sensitivity.png": lambda: lr_sensitivity(table, sensitivities(table)),
        "time_to_target.png": lambda: None if target is None else times(table, target),
    }
    figures = {name: make() for name, make in makers.items()}
    return {name: figure for name, figure in figures.items() if figure is not None}


def _figure(width: float, height: float, columns: int = 1) -> tuple["Figure", "list[Axes]"]:
    figure = drawing.figure(width, height)
    axes = [figure.add_subplot(1, columns, i + 1) for i in range(columns)]
    drawing.clean_axes(*axes)
    return figure, axes


def _rows(table: Table) -> Sequence[Configuration]:
    return (table.ranked or table.rows)[:SHOWN]


def learning_curves(table: Table) -> "Figure | None":
    """Plots the ranking metric of the best configurations against epochs, updates and seconds."""
    figure, axes = _figure(12, 3.8 + 0.2 * len(_rows(table)), len(_AGAINST))
    drawn = [_curve(axis, table, table.by, against) for axis, against in zip(axes, _AGAINST, strict=True)]
    if not any(drawn):
        return None
    axes[0].set_ylabel(metric_label(table.by))
    return _with_legend(figure, axes[0], table, "mean over seeds, band: 95 % confidence interval")


def learning_rates(table: Table) -> "Figure | None":
    figure, [axis] = _figure(7.5, 4.5 + 0.2 * len(_rows(table)))
    if not _curve(axis, table, "lr", "epoch"):
        return None
    curves = [np.asarray(line.get_ydata(), dtype=float) for line in axis.get_lines()]
    rates = np.concatenate(curves)
    rates, tops = rates[rates > 0], [curve.max() for curve in curves]
    if len(rates) and max(tops) > 20 * min(tops):
        axis.set_yscale("log", nonpositive="mask")
        axis.set_ylim(max(rates.min() / 1.5, rates.max() * 1e-6), rates.max() * 1.5)
    else:
        axis.set_ylim(bottom=0)
    axis.set_ylabel("learning rate at the end of the epoch")
    return _with_legend(figure, axis, table, "")


def _curve(axis: "Axes", table: Table, name: str, against: str) -> bool:
    """Plots means with bands. Scales the y-axis to the means, as the interval of two runs can be much wider."""
    means: list[float] = []
    for i, row in enumerate(_rows(table)):
        curve = band(row.runs, name, against)
        if curve is None:
            continue
        label = f"{row.label}  ({len(row.runs)} run{'s' * (len(row.runs) > 1)})"
        axis.plot(curve.x, curve.mean, label=label, **style(i, linewidth=1.8))
        axis.fill_between(curve.x, curve.low, curve.high, color=COLOURS[i % len(COLOURS)], alpha=0.15, linewidth=0)
        means += [value for value in curve.mean if math.isfinite(value)]
    axis.set_xlabel(_AGAINST[against])
    if means:
        margin = 0.08 * (max(means) - min(means)) or 0.1 * abs(means[0]) or 0.1
        axis.set_ylim(min(means) - margin, max(means) + margin)
    if against != "seconds":
        axis.locator_params("x", integer=True)
    return bool(means)


def _with_legend(figure: "Figure", axis: "Axes", table: Table, note: str) -> "Figure":
    count, total = len(axis.get_legend_handles_labels()[1]), len(table.rows)
    title = "; ".join(filter(None, [f"best {count} of {total} configurations" * (total > count), note]))
    drawing.legend_below(figure, axis, 1, title=title, title_fontsize="small", handlelength=3)
    return figure


def importance_bars(table: Table, importances: Importance | None) -> "Figure | None":
    if importances is None or importances.missing:
        return None
    keys = sorted(importances.fractions, key=lambda key: importances.fractions[key])
    figure, [axis] = _figure(7, 1.4 + 0.4 * len(keys))
    axis.barh(keys, [100 * importances.fractions[key] for key in keys], color=COLOURS[0])
    axis.set_xlabel(f"explained variance of {metric_label(table.by)} (%)")
    axis.set_xlim(0, 100)
    axis.grid(visible=False, axis="y")
    axis.set_title(f"functional ANOVA of {len(table.ranked)} configurations, main effects", fontsize="small")
    return figure


def lr_sensitivity(table: Table, results: Sequence[Sensitivity]) -> "Figure | None":
    """Plots the best metric at each learning rate by optimizer, and the ranges of good rates below the curves."""
    if not results:
        return None
    figure = drawing.figure(7.5, 4.2 + 0.25 * len(results))
    axis, strip = figure.subplots(2, 1, sharex=True, height_ratios=[16, len(results) + 0.5])
    for i, result in enumerate(results):
        colour, marker = COLOURS[i % len(COLOURS)], _MARKERS[i % len(_MARKERS)]
        best = zip(*((lr, value.mean, value.std or 0.0) for lr, value in result.best), strict=True)
        axis.plot([p[0] for p in result.points], [p[1].mean for p in result.points], ".", color=colour, alpha=0.4)
        axis.errorbar(*best, capsize=3, label=result.optimizer, **style(i, linewidth=1.8, marker=marker))
        strip.plot(result.good, [-i, -i], color=colour, linewidth=4, marker=marker, markersize=7)
        if result.failed:
            bottom = [0.02] * len(result.failed)
            axis.plot(result.failed, bottom, "x", color=colour, transform=axis.get_xaxis_transform())
    axis.set_xscale("log")
    axis.set_ylabel(metric_label(table.by))
    drawing.clean_axes(axis)
    strip.set_ylim(-len(results) + 0.4, 0.6)
    labels = [f"good: {result.optimizer}" for result in results]
    strip.set_yticks([-i for i in range(len(results))], labels, fontsize="small")
    strip.set_xlabel("learning rate")
    strip.spines[["top", "right", "left"]].set_visible(False)
    strip.tick_params(left=False)
    note = "best over the other keys; bars: standard deviation over seeds"
    axis.set_title(note + ("; ×: failed runs" if any(result.failed for result in results) else ""), fontsize="small")
    axis.legend(frameon=False)
    return figure


def parallel_coordinates(table: Table) -> "Figure | None":
    """Plots a line per configuration through the values of its keys to its metric; darker is better."""
    rows = table.ranked
    if len(table.keys) < 2 or len(rows) < 2:
        return None
    from matplotlib.collections import LineCollection
    from matplotlib.colors import LinearSegmentedColormap

    keys = list(table.keys)[:8]
    scales = [_Scale([row.values.get(key) for row in rows]) for key in keys]
    metrics = [row.value.mean for row in rows if row.value is not None]
    scales.append(_Scale(metrics))
    figure, [axis] = _figure(1.8 * len(scales) + 1, 4.5)
    shades = LinearSegmentedColormap.from_list("", ["#d9d9d9", "#9ecae1", "#08306b"])
    lines = [
        [(x, scale(value)) for x, (scale, value) in enumerate(zip(scales, values, strict=True))]
        for values in ((*(row.values.get(key) for key in keys), metrics[i]) for i, row in enumerate(rows))
    ]
    colours = [shades(1 - i / (len(rows) - 1)) for i in range(len(rows))]
    axis.add_collection(LineCollection(lines[::-1], colors=colours[::-1], linewidths=1.2, alpha=0.8))
    axis.set_ylim(-0.04, 1.04)
    for x, scale in enumerate(scales):
        axis.axvline(x, color="0.3", linewidth=0.8)
        for position, label in scale.ticks:
            box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
            axis.annotate(
                label, (x, position), xytext=(5, 0), textcoords="offset points", fontsize="small", va="center", bbox=box
            )
    axis.set_xticks(range(len(scales)), [*keys, metric_label(table.by)], fontsize="small")
    axis.set_yticks([])
    axis.grid(visible=False)
    axis.set_xlim(-0.2, len(scales) - 0.6)
    axis.spines[["left", "bottom"]].set_visible(False)
    return figure


class _Scale:
    """Maps the values of one axis to 0..1, with labelled ticks."""

    def __init__(self, values: Sequence[Any]) -> None:
        known = [value for value in values if value is not None]
        self.is_number = all(is_number(value) for value in known) and len(set(known)) > 1
        if not self.is_number:
            names = sorted({text(value) for value in values})
            self.positions = {name: (i + 0.5) / len(names) for i, name in enumerate(names)}
            self.ticks = [(position, name) for name, position in self.positions.items()]
            return
        self.low, self.high = min(known), max(known)
        self.log = self.low > 0 and self.high / self.low >= 20
        tick_values = sorted(set(known)) if len(set(known)) <= 8 else [self._at(i / 4) for i in range(5)]
        self.ticks = [(self(value), f"{value:.4g}") for value in tick_values]

    def _at(self, position: float) -> float:
        if self.log:
            return float(self.low * (self.high / self.low) ** position)
        return float(self.low + position * (self.high - self.low))

    def __call__(self, value: Any) -> float:
        if not self.is_number:
            return self.positions[text(value)]
        if value is None:
            return math.nan
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return float((value - self.low) / (self.high - self.low))


def times(table: Table, target: float) -> "Figure | None":
    """Plots updates and seconds to the target for the configurations that reach it, fastest first."""
    results = [(row, time_to_target(row, table.by, target)) for row in table.ranked]
    reached = [(row, result) for row, result in results if result.steps is not None]
    if not reached:
        return None
    reached.sort(key=lambda pair: (pair[1].count < pair[1].runs, pair[1].steps.mean if pair[1].steps else 0))
    drawn = reached[:15][::-1]
    figure, axes = _figure(11, 1.6 + 0.34 * len(drawn), 2)
    for axis, name, colour in zip(axes, ("steps", "seconds"), (COLOURS[0], COLOURS[1]), strict=True):
        values = [getattr(result, name) for _, result in drawn]
        axis.barh(
            range(len(drawn)), [0 if v is None else v.mean for v in values], color=colour, height=0.6,
            xerr=[0 if v is None else v.std or 0 for v in values], ecolor="0.2", capsize=2,
        )  # fmt: skip
        axis.set_xlabel({"steps": "updates", "seconds": "seconds of training"}[name])
        axis.grid(visible=False, axis="y")
        axis.set_yticks([])
    labels = [f"{row.label}  ({result.count}/{result.runs})" for row, result in drawn]
    axes[0].set_yticks(range(len(drawn)), labels, fontsize="small")
    sign = "≤" if table.lower else "≥"
    goal = f"{metric_label(table.by)} {sign} {target:g}"
    figure.suptitle(f"time to {goal} (runs that reach it / all runs)", fontsize="medium")
    return figure
