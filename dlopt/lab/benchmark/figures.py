"""Draws the figures of a benchmark, one function each; a figure without data is None.

Of many optimizers, those measured here and the first by the score in updates have a colour, which is the same in all
figures; the others are grey. If there are shipped optimizers, the lines of those measured here are thicker.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dlopt.extend import lower_is_better
from dlopt.lab.benchmark import formats, tuning
from dlopt.lab.benchmark.results import Results
from dlopt.lab.benchmark.scores import MAX_RATIO, Summary, profile, ratios
from dlopt.results import drawing
from dlopt.results.drawing import COLOURS, MARKERS, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURED = 6  # optimizers with a colour, unless more are measured here
_OTHERS: Any = {"color": "0.8", "linestyle": "-", "linewidth": 1.0, "zorder": 1}
_NAME = 22  # characters of an optimizer or a workload
_ACROSS = 3  # panels of learning curves in a row
_PROFILES_ACROSS = 5
_LINE = 12  # characters of a title at the width of a phone
_MEASURE_DASHES = ("-", (0, (2, 1)), (0, (0.8, 0.8)))
_LARGE: Any = {"fontsize": 15}
_GREY = "#e0e0e0"
_NUMBERED = 16  # optimizers up to which the cells of the differences have numbers
_TICKS: Any = {"fontsize": 9}


def draw(results: Results, summary: Summary) -> dict[str, "Figure"]:
    """Returns the figures with data, by the names of their files."""
    figures = {name: function(results, summary) for name, function in FIGURES.items()}
    return {name: figure for name, figure in figures.items() if figure is not None}


def label(name: str) -> str:
    """Returns a short name, escaped for matplotlib."""
    return drawing.literal(formats.abbreviated(name, _NAME))


def coloured(results: Results, summary: Summary) -> list[str]:
    """Returns the optimizers whose lines have a colour, by the score."""
    own = [name for name in summary.order if results.shipped and name not in results.shipped]
    others = [name for name in summary.order if name not in own]
    return sorted([*own, *others[: max(_COLOURED - len(own), 0)]], key=summary.order.index)


def _line(results: Results, summary: Summary, optimizer: str) -> dict[str, Any]:
    names = coloured(results, summary)
    if optimizer not in names:
        return {**_OTHERS}
    is_own = bool(results.shipped) and optimizer not in results.shipped
    return style(names.index(optimizer), linewidth=2.8 if is_own else 1.8)


def _add_legend(figure: "Figure", panels: "Sequence[Axes]", results: Results, summary: Summary) -> None:
    """Adds the entries of all optimizers: a panel may lack some of the curves."""
    axes, names = panels[0], coloured(results, summary)
    for optimizer in names:
        axes.plot([], [], label=label(optimizer), **_line(results, summary, optimizer))
    if len(names) < len(summary.order):
        axes.plot([], [], label="others", **_OTHERS)
    drawing.legend_below(figure, axes, 4 if len(panels) >= _ACROSS else 2, fontsize=11)


def profiles(results: Results, summary: Summary) -> "Figure":
    """Draws the performance profiles, a panel per optimizer: the higher and the more to the left, the better.

    The panel has the profile of each measure in the optimizer's colour; the others' profiles, in updates, are grey.
    """
    names = coloured(results, summary)
    across = min(_PROFILES_ACROSS, len(summary.order))
    down = math.ceil(len(summary.order) / across)
    figure = drawing.figure(max(1.92 * across, 4.8), 2.2 * down + 1.0, "Performance profiles", fontsize=16)
    panels = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    tables = {measure: ratios(summary.times[measure]) for measure in summary.measures}
    curves = {(name, measure): _profile(tables[measure][name]) for measure in tables for name in summary.order}
    for axes, optimizer in zip(panels.flat, summary.order, strict=False):
        for other in summary.order:
            axes.step(*curves[other, "updates"], where="post", color="0.85", linewidth=1.2)
        for measure, dash in zip(summary.measures, _MEASURE_DASHES, strict=False):
            if summary.score(optimizer, measure) is not None:
                colour = _line(results, summary, optimizer)["color"] if optimizer in names else "0.25"
                axes.step(*curves[optimizer, measure], where="post", color=colour, linestyle=dash, linewidth=2.8)
        axes.set_title(_two_lines(optimizer), **_LARGE)
    for axes in panels.flat[len(summary.order) :]:
        axes.set_visible(False)
    first = panels[0, 0]
    first.set_xlim(1, MAX_RATIO)
    first.set_ylim(-0.02, 1.02)
    first.set_xticks([1, 2, 3, 4])
    first.set_yticks([0, 0.5, 1], ["0", "0.5", "1"])
    for axes in panels.flat:
        axes.tick_params(labelsize=14)
    drawing.clean_axes(*panels.flat)
    for measure, dash in zip(summary.measures, _MEASURE_DASHES, strict=False):  # the legend, in no optimizer's colour
        first.plot([], [], color="0.2", linestyle=dash, linewidth=2.8, label=formats.MEASURE_LABELS[measure])
    first.plot([], [], color="0.85", linewidth=2, label="others (updates)")
    count = len(summary.order)
    for axes in panels.flat[count - across : count]:  # the lowest panel of each column
        axes.xaxis.set_tick_params(labelbottom=True)
    panels.flat[min(across * (down - 1) + across // 2, count - 1)].set_xlabel("τ: relative to the fastest", **_LARGE)
    figure.supylabel("fraction of workloads", **_LARGE)
    columns = len(summary.measures) + 1 if across > 2 else 1
    drawing.legend_below(figure, first, columns, handlelength=2, **_LARGE)
    return figure


def _profile(ratios: Mapping[str, float]) -> tuple[list[float], list[float]]:
    """Returns the steps of a profile, and its heights there."""
    steps = sorted({1.0, *(ratio for ratio in ratios.values() if ratio <= MAX_RATIO), MAX_RATIO})
    return steps, profile(ratios, steps)


def _two_lines(name: str) -> str:
    """Breaks a long name at the underscore that is nearest to its middle."""
    shown = label(name)
    breaks = [i + 1 for i, each in enumerate(shown[:-1]) if each == "_" and i]
    if len(shown) <= _LINE or not breaks:
        return shown
    middle = min(breaks, key=lambda i: abs(i - len(shown) / 2))
    return f"{shown[:middle]}\n{shown[middle:]}"


def scores(results: Results, summary: Summary) -> "Figure":
    """Draws the scores with their intervals, ranked by that in updates."""
    count = len(summary.order)
    figure = drawing.figure(9.6, max(2.4 + 0.34 * count, 5.4), fontsize=15)
    figure.suptitle(f"Scores of {count} optimizers on {len(results.workloads)} workloads", fontsize=15)
    axes = figure.add_subplot()
    offsets = np.linspace(-0.22, 0.22, len(summary.measures)) if len(summary.measures) > 1 else [0.0]
    for i, (measure, offset) in enumerate(zip(summary.measures, offsets, strict=True)):
        for y, optimizer in enumerate(summary.order):
            score = summary.score(optimizer, measure)
            if score is None or (measure == "evaluations" and score == summary.score(optimizer, "updates")):
                continue  # of most optimizers, an update is one evaluation of the loss
            if not math.isnan(score.low):
                axes.plot([score.low, score.high], [y + offset] * 2, color=COLOURS[i], linewidth=2.5, alpha=0.5)
            axes.plot(score.value, y + offset, MARKERS[i], color=COLOURS[i], markersize=7)
        axes.plot([], [], MARKERS[i], color=COLOURS[i], markersize=7, label=formats.MEASURE_LABELS[measure])
    axes.set_yticks(range(count), list(map(label, summary.order)), fontsize=13)
    axes.set_ylim(count - 0.4, -0.6)
    axes.set_xlim(-0.02, 1.02)
    axes.tick_params(axis="x", labelsize=13)
    intervals = "" if results.studies == 1 else ", with its 95 % interval over studies"
    axes.set_xlabel(f"score (1: the fastest on every workload){intervals}", fontsize=13)
    drawing.clean_axes(axes)
    if len(summary.measures) > 1:
        drawing.legend_below(figure, axes, len(summary.measures), handlelength=1, fontsize=13)
    return figure


def differences(results: Results, summary: Summary) -> "Figure | None":
    """Draws the difference of scores in updates: the row's optimizer minus the column's."""
    order = summary.order
    if len(order) < 2:
        return None
    pairs = summary.comparisons["updates"]
    size, is_small = 0.32 * len(order), len(order) <= _NUMBERED
    figure = drawing.figure(max(size + 2.0, 4.5), size + 2.4, "Differences of scores in updates", fontsize=14)
    axes = figure.add_subplot()
    cells = np.full((len(order), len(order)), np.nan)
    for (optimizer, other), pair in pairs.items():
        row, column = order.index(optimizer), order.index(other)
        if pair.distinguishable:
            cells[row, column] = pair.value
        if not is_small:
            continue  # unreadable: the shades show it, and the table has the numbers
        is_dark = pair.distinguishable and abs(pair.value) > 0.84
        text = f"{pair.value:+.2f}".replace("0.", ".", 1)
        axes.text(column, row, text, ha="center", va="center", fontsize=6.5, color="white" if is_dark else "black")
    shades = drawing.shades(COLOURS[1], "#fbe3d3", "#d6e8f4", COLOURS[0])
    axes.imshow(np.where(np.eye(len(order)), np.nan, 0.5), cmap=drawing.shades(_GREY, _GREY))
    shown = axes.imshow(np.ma.masked_invalid(cells), vmin=-1, vmax=1, cmap=shades)
    if not is_small:
        figure.colorbar(shown, shrink=0.5).ax.tick_params(labelsize=12)
    _grid(axes, order, order, 9 if is_small else 12)
    half = next(iter(pairs.values())).half
    upto = "" if math.isnan(half) else f" (up to {half:.2f})"
    grey = f"blue: higher, orange: lower, grey: not distinguishable{upto}"
    axes.set_xlabel(f"score of the row minus that of the column\n{grey}", fontsize=9 if is_small else 13)
    return figure


def sensitivity(results: Results, summary: Summary) -> "Figure":
    """Draws the fraction of the trials that reach the target, in %."""
    workloads = [*results.workloads]
    cells = np.full((len(summary.order), len(workloads) + 1), np.nan)
    for row, optimizer in enumerate(summary.order):
        for column, workload in enumerate(workloads):
            records = results.cell(optimizer, workload).records
            if records:
                cells[row, column] = sum(record.reached for record in records) / len(records)
        cells[row, -1] = summary.standing(optimizer).sensitivity
    figure = drawing.figure(max(0.62 * cells.shape[1] + 2.2, 5.0), 0.36 * cells.shape[0] + 1.6)
    axes = figure.add_subplot()
    shades = drawing.shades("#f7fbff", "#9ecae1", "#08306b")
    axes.imshow(np.ma.masked_invalid(cells), vmin=0, vmax=1, cmap=shades, aspect="auto")
    axes.set_facecolor(_GREY)
    for (row, column), value in np.ndenumerate(cells):
        text = formats.NONE if math.isnan(value) else f"{100 * value:.0f}"
        colour = "white" if value > 0.72 else "black"
        axes.text(column, row, text, ha="center", va="center", fontsize=8.5, color=colour)
    _grid(axes, summary.order, [*workloads, "all"])
    axes.axvline(len(workloads) - 0.5, color="black", linewidth=1.5)
    axes.set_xlabel("trials that reach the target [%]", **_TICKS)
    return figure


def _grid(axes: "Axes", rows: Sequence[str], columns: Sequence[str], fontsize: float = 9) -> None:
    """Labels the rows and columns of a matrix, and draws lines between its cells."""
    rotated: Any = {"rotation": 40 if fontsize < 10 else 60, "ha": "left", "rotation_mode": "anchor"}
    axes.set_xticks(range(len(columns)), list(map(label, columns)), fontsize=fontsize, **rotated)
    axes.set_yticks(range(len(rows)), list(map(label, rows)), fontsize=fontsize)
    axes.xaxis.set_ticks_position("top")
    axes.set_xticks(np.arange(len(columns) - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(len(rows) - 1) + 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)


def learning_curves(results: Results, summary: Summary) -> "Figure | None":
    """Draws the curves of the best trials, a panel per workload; a dot where a coloured one reached the target."""
    names = [name for name in results.workloads if any(results.cell(each, name).curve for each in summary.order)]
    if not names:
        return None
    figure, panels = _panels(len(names), "updates")
    for axes, name in zip(panels, names, strict=True):
        _curves(axes, results, summary, name)
    _add_legend(figure, panels, results, summary)
    return figure


def _panels(count: int, label: str) -> "tuple[Figure, list[Axes]]":
    """Makes a figure with rows of panels, the lowest of each column with a label."""
    across = min(_ACROSS, count)
    down = math.ceil(count / across)
    figure = drawing.figure(2.8 * across + 0.3, 2.1 * down + 1.1)
    panels = [*figure.subplots(down, across, squeeze=False).flat]
    for axes in panels[count:]:
        axes.set_visible(False)
    for axes in panels[count - across : count]:
        axes.set_xlabel(label, **_TICKS)
    return figure, panels[:count]


def _curves(axes: "Axes", results: Results, summary: Summary, name: str) -> None:
    workload, names = results.workloads[name], coloured(results, summary)
    for optimizer in summary.order:
        cell = results.cell(optimizer, name)
        if not cell.curve:
            continue
        x, y = zip(*cell.curve, strict=True)
        line = _line(results, summary, optimizer)
        axes.plot(x, y, marker="." if len(x) == 1 else None, **line)
        sign = 1 if lower_is_better(workload.metric) else -1
        reached = [point for point in cell.curve if sign * point[1] <= sign * workload.target]
        if reached and optimizer in names:
            axes.plot(*reached[0], "o", color=line["color"], markersize=5)
    if math.isfinite(workload.target):
        axes.axhline(workload.target, color="0.3", linestyle=(0, (5, 4)), linewidth=1)
    _limit(axes, results, summary, name)
    axes.set_title(label(name), fontsize=12)
    axes.set_ylabel(drawing.metric_label(workload.metric), fontsize=10)
    axes.tick_params(labelsize=9)
    drawing.clean_axes(axes)


def tuning_curves(results: Results, summary: Summary) -> "Figure | None":
    """Draws the expected score, and the expected best metric of each workload, against the number of trials."""
    found = tuning.tuning(results)
    names = [name for name in results.workloads if any((each, name) in found.metrics for each in summary.order)]
    if len(found.budgets) < 2:
        return None
    figure, [first, *others] = _panels(len(names) + 1, "trials")
    for optimizer in summary.order:
        scores = [each.value for each in found.scores[optimizer] if each is not None]
        first.plot(found.budgets[: len(scores)], scores, **_line(results, summary, optimizer))
    first.set_title("all workloads", fontsize=12)
    first.set_ylabel("expected score", fontsize=10)
    for axes, name in zip(others, names, strict=True):
        for optimizer in summary.order:
            curve = found.metrics.get((optimizer, name), ())
            axes.plot(range(1, len(curve) + 1), curve, **_line(results, summary, optimizer))
        drawing.logarithmic(axes)
        axes.set_title(label(name), fontsize=12)
        axes.set_ylabel(f"expected {drawing.metric_label(results.workloads[name].metric)}", fontsize=10)
    for axes in (first, *others):
        axes.set_xscale("log")
        axes.set_xticks(found.budgets, list(map(str, found.budgets)))
        axes.set_xticks([], minor=True)
        axes.tick_params(which="both", labelsize=9)
    drawing.clean_axes(first, *others)
    _add_legend(figure, [first, *others], results, summary)
    return figure


def _limit(axes: "Axes", results: Results, summary: Summary, name: str) -> None:
    """Limits the y-axis to the values between the usual start and the best, because single curves may diverge."""
    curves = [results.cell(optimizer, name).curve for optimizer in summary.order]
    values = np.array([value for curve in curves for _, value in curve if math.isfinite(value)])
    starts = np.array([curve[0][1] for curve in curves if curve and math.isfinite(curve[0][1])])
    if not values.size or not starts.size:
        return
    workload = results.workloads[name]
    best = values.min() if lower_is_better(workload.metric) else values.max()
    start = float(np.median(starts))
    worst = starts.max() if lower_is_better(workload.metric) else starts.min()
    shown = [float(best), start, *([workload.target] if math.isfinite(workload.target) else [])]
    if abs(worst - start) < 0.5 * abs(best - start):
        shown.append(float(worst))
    low, high = min(shown), max(shown)
    if low > 0 and high > 10 * low:
        drawing.logarithmic(axes)
        axes.set_ylim(low / 1.15, high * 1.15)
    elif high > low:
        axes.set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))


FIGURES: Mapping[str, Callable[[Results, Summary], "Figure | None"]] = {
    "scores": scores,
    "profiles": profiles,
    "differences": differences,
    "learning_curves": learning_curves,
    "sensitivity": sensitivity,
    "tuning": tuning_curves,
}
"""Figures by the names of their files."""
