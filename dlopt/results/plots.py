"""Plots of the report, one figure each; a plot without data is None.

Accuracies are in percent. Colours and dashes are those of the page: if optimizers differ, each has a colour, and dashes
tell its configurations apart; otherwise a configuration has the colour of its rank.
"""

import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dlopt.basics.formats import brief
from dlopt.basics.formats import format_value as text
from dlopt.metrics.shown import is_percent, unit_of
from dlopt.results import drawing
from dlopt.results.drawing import COLOURS, MARKERS, literal, metric_label, style
from dlopt.results.history import columns
from dlopt.results.ranking import (
    AXES,
    SPREADS,
    TIMES,
    Configuration,
    Ranking,
    Sensitivity,
    band,
    default_spread,
    fastest,
    importance,
    sensitivities,
    tolerance_text,
)
from dlopt.results.reading import is_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWN = 6  # configurations in a plot of curves
_WIDTH = 6.4  # inches: the text of a plot is legible over the width of a page


def plots(ranking: Ranking, target: float | None, names: Iterable[str] | None = None) -> dict[str, "Figure"]:
    """Returns the plots with data: all, or those in `names`."""
    figures = {name: PLOTS[name](ranking, target) for name in (PLOTS if names is None else names)}
    return {name: figure for name, figure in figures.items() if figure is not None}


def _figure(height: float, width: float = _WIDTH) -> tuple["Figure", "Axes"]:
    figure = drawing.figure(width, height)
    axis = figure.add_subplot()
    drawing.clean_axes(axis)
    return figure, axis


def _scale(metric: str) -> float:
    return 100.0 if is_percent(metric) else 1.0


def _label(metric: str) -> str:
    return literal(metric_label(metric)) + f" ({unit_of(metric)})" * is_percent(metric)


def _wrapped(label: str, width: int) -> str:
    """Wraps the label of a configuration, paths also inside words."""
    return literal("\n".join(textwrap.wrap(label, width)))


def key_labels(keys: Sequence[str]) -> list[str]:
    """Returns labels such as learning rate for optimizer.lr; keys of equal labels keep their names."""
    labels = [drawing.label(key) for key in keys]
    return [label if labels.count(label) == 1 else key for label, key in zip(labels, keys, strict=True)]


def _rows(ranking: Ranking) -> Sequence[Configuration]:
    return (ranking.ranked or ranking.rows)[:SHOWN]


def _optimizers(ranking: Ranking) -> list[str]:
    """Returns the optimizers of all rows, in the order of their colours; [] if the rows do not differ in it."""
    if "optimizer" not in ranking.keys:
        return []
    return sorted({text(row.values.get("optimizer", "")) for row in ranking.rows})


def _row_styles(ranking: Ranking) -> list[tuple[int, int]]:
    """Returns the colour and the dash of each row in a plot of curves."""
    optimizers, rows = _optimizers(ranking), _rows(ranking)
    if not optimizers:
        return [(i, i) for i in range(len(rows))]
    styles: list[tuple[int, int]] = []
    for row in rows:
        colour = optimizers.index(text(row.values.get("optimizer", ""))) % len(COLOURS)
        styles.append((colour, sum(other == colour for other, _ in styles)))
    return styles


def learning_curves(ranking: Ranking, against: str) -> "Figure | None":
    """Plots the ranking metric of the best configurations against epochs, updates or seconds."""
    figure, axis = _figure(3.6)
    if not _curves(axis, ranking, ranking.by, against):
        return None
    axis.set_ylabel(_label(ranking.by))
    counts = sorted({len(row.distinct) for row in _rows(ranking)})
    runs = " to ".join(map(str, {counts[0]: 0, counts[-1]: 0}))
    note = f"mean of {runs} runs each; band: {SPREADS[default_spread(ranking)]}" if counts[-1] > 1 else ""
    return _with_legend(figure, axis, ranking, note)


def _against_updates(ranking: Ranking) -> "Figure | None":
    """Plots against updates; None if all epochs have the same length, because the plot against epochs is the same."""
    lengths: set[float] = set()
    for run in (run for row in _rows(ranking) for run in row.runs):
        steps, epochs = columns(run.history, ["step", "epoch"]).T
        lengths |= set(np.unique((steps[epochs > 0] / epochs[epochs > 0]).round(3)).tolist())
    return learning_curves(ranking, "step") if len(lengths) > 1 else None


def learning_rates(ranking: Ranking) -> "Figure | None":
    figure, axis = _figure(3.2)
    if not _curves(axis, ranking, "lr", "epoch"):
        return None
    curves = [np.asarray(line.get_ydata(), dtype=float) for line in axis.get_lines()]
    rates = np.concatenate(curves)
    rates, tops = rates[rates > 0], [curve.max() for curve in curves]
    if len(rates) and max(tops) > 20 * min(tops):
        drawing.logarithmic(axis)
        axis.set_ylim(max(rates.min() / 1.5, rates.max() * 1e-6), rates.max() * 1.5)
    else:
        axis.set_ylim(bottom=0)
    axis.set_ylabel("learning rate")
    return _with_legend(figure, axis, ranking, "at the end of each epoch")


def _curves(axis: "Axes", ranking: Ranking, name: str, against: str) -> bool:
    """Plots the means over seeds with bands; returns whether there is any."""
    scale, spread = _scale(name), default_spread(ranking)
    for i, (row, (colour, dash)) in enumerate(zip(_rows(ranking), _row_styles(ranking), strict=True)):
        curve = band(row.distinct, name)
        if curve is None:
            continue
        x, (low, high) = curve.x[against], curve.spreads[spread]
        marker = MARKERS[i % len(MARKERS)] if len(x) < 10 else None
        line = style(colour, dash=dash, linewidth=1.8, marker=marker, markersize=4)
        axis.plot(x, scale * curve.mean, label=_wrapped(row.label, 78), **line)
        band_style = {"color": line["color"], "alpha": 0.15, "linewidth": 0}
        axis.fill_between(x, scale * low, scale * high, **band_style)
    axis.set_xlabel(AXES[against])
    if against != "seconds":
        drawing.integer_ticks(axis)
    return bool(axis.get_lines())


def _with_legend(figure: "Figure", axis: "Axes", ranking: Ranking, note: str) -> "Figure":
    labels, total = axis.get_legend_handles_labels()[1], len(ranking.rows)
    title = "; ".join(filter(None, [f"best {len(labels)} of {total} configurations" * (total > len(labels)), note]))
    columns = 2 if len(labels) > 1 and max(map(len, labels)) < 32 else 1
    lines = sum(label.count("\n") + 1 for label in labels)
    height = 0.19 * (-(-lines // columns) + bool(title))
    figure.set_figheight(figure.get_figheight() + height)
    drawing.legend_below(figure, axis, columns, title=title, fontsize="small", title_fontsize="small")
    return figure


def _set_notes(figure: "Figure", *notes: str) -> None:
    """Writes notes above a plot: centred on the figure, because long labels move the axes to the right."""
    lines = [line for note in notes for line in textwrap.wrap(note, 94)]
    figure.suptitle("\n".join(lines), fontsize="small")


def importance_bars(ranking: Ranking) -> "Figure | None":
    importances = importance(ranking)
    if importances is None or importances.missing:
        return None
    keys = sorted(importances.fractions, key=lambda key: importances.fractions[key])
    figure, axis = _figure(1.7 + 0.4 * len(keys))
    axis.barh(key_labels(keys), [100 * importances.fractions[key] for key in keys], color=COLOURS[0])
    axis.set_xlabel(f"explained variance of {metric_label(ranking.by)} (%)")
    axis.set_xlim(0, 100)
    axis.grid(visible=False, axis="y")
    title = f"functional ANOVA of {len(ranking.ranked)} configurations, main effects"
    explained = f"the model explains {100 * importances.explained:.0f} % of the variance of held-out ones"
    _set_notes(figure, title, explained)
    return figure


def lr_sensitivity(ranking: Ranking) -> "Figure | None":
    """Plots the best metric at each learning rate by optimizer, and the ranges of good rates below the curves."""
    results = sensitivities(ranking)
    if not results:
        return None
    scale = _scale(ranking.by)
    figure = drawing.figure(_WIDTH, 3.8 + 0.25 * len(results))
    axis, strip = figure.subplots(2, 1, sharex=True, height_ratios=[16, len(results) + 0.5])
    for y, (i, result) in enumerate(zip(_optimizer_styles(ranking, results), results, strict=True)):
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        dash = 0 if _optimizers(ranking) else i
        best = zip(*((lr, scale * value.mean, scale * (value.std or 0.0)) for lr, value in result.best), strict=True)
        rates, means = zip(*((lr, scale * value.mean) for lr, value, _ in result.points), strict=True)
        axis.plot(rates, means, ".", color=colour, alpha=0.4)
        axis.errorbar(*best, capsize=3, **style(i, dash=dash, linewidth=1.8, marker=marker))
        strip.plot(result.good, [y, y], color=colour, linewidth=4, marker=marker, markersize=7)  # also the legend
        if result.failed:
            bottom = [0.02] * len(result.failed)
            axis.plot(result.failed, bottom, "x", color=colour, transform=axis.get_xaxis_transform())
    axis.set_xscale("log")
    values = [value.mean for result in results for _, value, _ in result.points]
    if ranking.lower and drawing.spans_decades(values):  # of rates at which runs diverge without becoming infinite
        drawing.logarithmic(axis)
    axis.set_ylabel(_label(ranking.by))
    drawing.clean_axes(axis)
    strip.set_ylim(len(results) - 0.4, -0.6)
    strip.set_yticks(range(len(results)), [literal(result.optimizer) for result in results], fontsize="small")
    strip.set_xlabel("learning rate")
    strip.spines[["top", "right", "left"]].set_visible(False)
    strip.tick_params(left=False)
    note = "best over the other keys; error bars: standard deviation over seeds"
    failed = "; ×: failed runs" if any(result.failed for result in results) else ""
    strips = f"below: good rates, at most {tolerance_text(ranking)} (or one standard deviation) worse than the best"
    _set_notes(figure, f"{note}{failed}", strips)
    return figure


def _optimizer_styles(ranking: Ranking, results: Sequence[Sensitivity]) -> list[int]:
    """Returns the style of each optimizer: its own, its best configuration's, or one that curves do not use."""
    if optimizers := _optimizers(ranking):
        return [optimizers.index(result.optimizer) for result in results]
    best = [min(row for _, _, row in result.points) for result in results]
    free = iter(range(SHOWN, SHOWN + len(results)))
    return [row if row < SHOWN else next(free) for row in best]


def parallel_coordinates(ranking: Ranking) -> "Figure | None":
    """Plots a line per configuration through the values of its keys to its metric; darker is better."""
    rows = ranking.ranked
    if len(ranking.keys) < 2 or len(rows) < 2:
        return None
    from matplotlib.collections import LineCollection

    keys = list(ranking.keys)[:8]
    scales = [AxisScale([row.values.get(key) for row in rows]) for key in keys]
    metrics = [_scale(ranking.by) * row.value.mean for row in rows if row.value is not None]
    scales.append(AxisScale(metrics))
    figure, axis = _figure(4.2, max(_WIDTH, 1.8 * len(scales) + 1))
    shades = drawing.shades("#d9d9d9", "#9ecae1", "#08306b")
    lines = [
        [(x, scale(value)) for x, (scale, value) in enumerate(zip(scales, values, strict=True))]
        for values in ((*(row.values.get(key) for key in keys), metrics[i]) for i, row in enumerate(rows))
    ]
    colours = [shades(1 - i / (len(rows) - 1)) for i in range(len(rows))]
    axis.add_collection(LineCollection(lines[::-1], colors=colours[::-1], linewidths=1.2, alpha=0.8))
    axis.set_ylim(-0.04, 1.04)
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
    for x, scale in enumerate(scales):
        axis.axvline(x, color="0.3", linewidth=0.8)
        for position, label, _ in scale.ticks:
            short = _wrapped(label if len(label) <= 48 else f"{label[:47]}…", 24)
            offset: dict[str, Any] = {"xytext": (5, 0), "textcoords": "offset points", "va": "center"}
            axis.annotate(short, (x, position), fontsize="small", bbox=box, **offset)
    axis.set_xticks(range(len(scales)), [*key_labels(keys), _label(ranking.by)], fontsize="small")
    axis.set_yticks([])
    axis.grid(visible=False)
    axis.set_xlim(-0.2, len(scales) - 0.6)
    axis.spines[["left", "bottom"]].set_visible(False)
    return figure


class AxisScale:
    """Maps the values of one axis to 0..1, with ticks: position, label and value."""

    def __init__(self, values: Sequence[Any]) -> None:
        known = [value for value in values if value is not None]
        self.is_number = all(is_number(value) for value in known) and len(set(known)) > 1
        if not self.is_number:
            named = {text(value): value for value in values}
            self.positions = {name: (i + 0.5) / len(named) for i, name in enumerate(sorted(named))}
            # The value stays a number if all values are equal: the page formats it like the metric.
            self.ticks = _apart([(at, brief(named[name]), named[name]) for name, at in self.positions.items()])
            return
        self.low, self.high = min(known), max(known)
        self.log = self.low > 0 and self.high / self.low >= 20
        spaced = np.geomspace if self.log else np.linspace
        tick_values = sorted(set(known)) if len(set(known)) <= 8 else spaced(self.low, self.high, 5).tolist()
        self.ticks = _apart([(self(value), f"{value:.4g}", value) for value in tick_values])

    def __call__(self, value: Any) -> float:
        if not self.is_number:
            return self.positions[text(value)]
        if value is None:
            return math.nan
        if self.log:
            low = math.log(self.low)
            return (math.log(value) - low) / (math.log(self.high) - low)
        return float((value - self.low) / (self.high - self.low))


def _apart(ticks: Sequence[tuple[float, str, Any]]) -> list[tuple[float, str, Any]]:
    """Returns the ticks from the highest down whose labels do not overlap."""
    kept: list[tuple[float, str, Any]] = []
    for tick in reversed(ticks):
        if not kept or kept[-1][0] - tick[0] > 0.045:
            kept.append(tick)
    return kept


def times(ranking: Ranking, target: float | None) -> "Figure | None":
    """Plots updates and seconds to the target for the configurations that reach it."""
    drawn = [] if target is None else fastest(ranking, target)[:15][::-1]
    if target is None or not drawn:
        return None
    labels = [f"{_wrapped(row.label, 48)}  ({result.count}/{result.runs})" for row, result in drawn]
    lines = max(label.count("\n") + 1 for label in labels)
    figure = drawing.figure(1.5 * _WIDTH, 1.4 + (0.2 + 0.14 * lines) * len(drawn))
    panels = figure.subplots(1, 2)
    drawing.clean_axes(*panels, axis="x")
    optimizers = _optimizers(ranking)
    for axis, name in zip(panels, TIMES, strict=True):
        for y, (row, result) in enumerate(drawn):
            if (value := getattr(result, name)) is not None:
                colour = optimizers.index(text(row.values.get("optimizer", ""))) if optimizers else 0
                alpha = 1.0 if result.count == result.runs else 0.4
                axis.barh(
                    y,
                    value.mean,
                    xerr=value.std or None,
                    color=COLOURS[colour % len(COLOURS)],
                    alpha=alpha,
                    height=0.6,
                    capsize=2,
                )
        axis.set_xlabel(TIMES[name])
        axis.set_yticks([])
    panels[0].set_yticks(range(len(drawn)), labels, fontsize="small")
    unit = " %" if _scale(ranking.by) == 100 else ""
    goal = f"{metric_label(ranking.by)} {'≤' if ranking.lower else '≥'} {_scale(ranking.by) * target:g}{unit}"
    note = "pale: not all runs reach it" * any(result.count < result.runs for _, result in drawn)
    title = f"time to {goal} (runs that reach it / all runs); {note}".removesuffix("; ")
    figure.suptitle(title, fontsize="medium")
    return figure


PLOTS: Mapping[str, Callable[[Ranking, float | None], "Figure | None"]] = {
    "learning_curves": lambda ranking, _: learning_curves(ranking, "epoch"),
    "learning_curves_updates": lambda ranking, _: _against_updates(ranking),
    "learning_curves_seconds": lambda ranking, _: learning_curves(ranking, "seconds"),
    "learning_rates": lambda ranking, _: learning_rates(ranking),
    "importance": lambda ranking, _: importance_bars(ranking),
    "parallel_coordinates": lambda ranking, _: parallel_coordinates(ranking),
    "lr_sensitivity": lambda ranking, _: lr_sensitivity(ranking),
    "time_to_target": times,
}
"""Plots by the name of their files."""
