"""Plots of a comparison: curves, lines or bars along one key, or heat maps over two keys."""

import math
import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from statistics import fmean
from typing import TYPE_CHECKING, Any

from dlopt.extend import show
from dlopt.lab.comparison.claims import TEST_METRICS, Value
from dlopt.lab.comparison.comparison import Comparison, Results, VariantOutcome, are_numbers, on_axis
from dlopt.lab.comparison.intervals import Average
from dlopt.lab.comparison.labels import axis_label, is_percent, label, scale
from dlopt.lab.comparison.published import draw_beside
from dlopt.results import drawing
from dlopt.results.drawing import MARKERS, style

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
_UNITS = {
    "epoch": "epoch", "step": "update", "evaluation": "evaluations of the training set", "seconds": "seconds",
}  # fmt: skip
_WIDTH, _HEIGHT = 9.6, 5.4  # inches, 16:9
_TEXT = 13  # points: readable on a slide, and on a phone
_DODGE = 4.0  # points between the marks of two variants at the same value, so that neither hides the other
_ROUNDING = {"sample_dependence": 1e-6, "gradient_bias": 1e-6}  # relative differences below: rounding in fp32
_CROSS: dict[str, Any] = {"markersize": 9, "markeredgewidth": 2.5}


def draw(results: Results) -> "Figure":
    """Plots a panel per metric, or for two keys in `along` a heat map per variant."""
    results = results.tuned() if results.comparison.tuned and results.comparison.along else results
    comparison = results.comparison
    if len(comparison.along) == 2:
        return _heat_maps(results)
    shown = [(name, x) for name in comparison.metrics for x in (comparison.axes if not comparison.along else [""])]
    figure = _titled_figure(comparison)
    if comparison.published:
        draw_beside(results, figure, _TEXT)
        return figure
    panels = figure.subplots(1, len(shown), squeeze=False, sharey=len(comparison.metrics) == 1)[0]
    notes: dict[str, Artist] = {}
    for axes, (name, x) in zip(panels, shown, strict=True):
        if not comparison.along:
            notes |= _curves(axes, results, name, x)
        elif are_numbers([*next(iter(comparison.along.values()))]):
            notes |= _along(axes, results, name)
        else:
            notes |= _bars(axes, results, name)
        if axes is panels[0] or len(comparison.metrics) > 1:
            axes.set_ylabel("\n".join(_evenly(axis_label(name), 34)))
    drawing.clean_axes(*panels)
    _enlarge(*panels)
    handles, labels = panels[0].get_legend_handles_labels()
    labels, handles = [*labels, *notes], [*handles, *notes.values()]
    options: dict[str, Any] = {"frameon": False, "handlelength": 2.5, "columnspacing": 1.5, **_legend(labels)}
    figure.legend(handles, labels, loc="outside lower center", **options)
    return figure


def _legend(labels: Sequence[str]) -> dict[str, Any]:
    """Returns as many columns as fit, in smaller type where the legend would take more than four rows."""
    for size in (_TEXT, _TEXT - 1, _TEXT - 2):
        columns = max(1, min(len(labels), int(_WIDTH / (0.0078 * size * max(map(len, labels)) + 0.058 * size))))
        if len(labels) <= 4 * columns:
            break
    return {"ncols": columns, "fontsize": size}


def _titled_figure(comparison: Comparison) -> "Figure":
    """Creates a figure of the shape of a slide with the comparison's title."""
    title = "\n".join(map(drawing.literal, _evenly(comparison.title, 66)))
    figure = drawing.figure(_WIDTH, _HEIGHT)
    figure.suptitle(title, fontsize=_TEXT + 2, fontweight="bold")
    return figure


def _enlarge(*panels: "Axes") -> None:
    """Makes the type of axes large enough for a slide."""
    for axes in panels:
        axes.tick_params(which="both", labelsize=_TEXT - 1)
        for text in (axes.xaxis.label, axes.yaxis.label, axes.title):
            text.set_fontsize(_TEXT)


def _evenly(text: str, width: int) -> list[str]:
    """Wraps text into the fewest lines of nearly equal length, so that no single word is left on the last line."""
    count = len(textwrap.wrap(text, width))
    while width > 20 and len(textwrap.wrap(text, width - 1)) == count:
        width -= 1
    return textwrap.wrap(text, width)


def _has_logarithm(comparison: Comparison, name: str) -> bool:
    """Returns whether the metric is drawn on a logarithmic axis: gaps and R^2 may be negative, fractions 0 or 1."""
    return not (comparison.is_higher_better(name) or name.endswith(("_error", "gap")) or name.startswith("saturated"))


def _line(i: int) -> dict[str, Any]:
    """Returns the style of curve i: its own colour, and dashes that let a coinciding curve show in the gaps."""
    return style(i, linewidth=2.2)


def _curves(axes: "Axes", results: Results, name: str, x_axis: str) -> "dict[str, Artist]":
    """Plots averages over seeds; a cross marks the end of a diverged run. Returns entries for the legend."""
    comparison = results.comparison
    notes: dict[str, Artist] = {}
    ends: list[float] = []
    drawn: list[Any] = []
    for i, variant in enumerate(comparison.variants):
        line = _line(i)
        runs = results.over_seeds(variant, ())
        points = _common(runs, name, x_axis)
        x = [fmean(positions) for positions, _ in points]
        averages = [comparison.average(name, [scale(name) * value for value in values]) for _, values in points]
        drawn += axes.plot(x, [each.middle for each in averages], **line, label=variant)
        ends += x[-1:]
        if len(runs) > 1 and averages:
            low, high = [each.low for each in averages], [each.high for each in averages]
            axes.fill_between(x, low, high, color=line["color"], alpha=0.2, linewidth=0)
            notes[averages[0].label(len(runs))] = _band()
        if any(run.failed for run in runs):
            cross: dict[str, Any] = {"color": line["color"], "markersize": 12, "markeredgewidth": 3}
            if x:
                axes.plot(x[-1], averages[-1].middle, "x", **cross)
            else:
                axes.plot(0.03 + 0.05 * i, 0.94, "x", transform=axes.transAxes, **cross)
            notes["diverged"] = _cross()
        for position in restarts(runs[0], x_axis):
            axes.axvline(position, color=line["color"], linewidth=1, linestyle=":", zorder=0)
            notes["restart of the learning rate"] = _mark(linestyle=":", linewidth=1)
    if _has_logarithm(comparison, name):
        drawing.logarithmic(axes)
    axes.set_xlabel(_UNITS[x_axis])
    if len(drawn) > 1 and all(_coincide(drawn[0], other) for other in drawn[1:]):
        axes.set_title(f"the {len(drawn)} curves coincide")
    if ends and max(ends) >= 10 * min(ends) > 0:  # short curves would be at the edge
        drawing.logarithmic(axes, axis="x")
        return notes
    axes.set_xlim(left=0)
    if x_axis != "seconds":
        axes.locator_params(axis="x", integer=True)
    return notes


def _coincide(curve: Any, other: Any) -> bool:
    """Returns whether one curve hides the other at every point."""
    import numpy as np

    first, second = curve.get_xydata(), other.get_xydata()
    return first.shape == second.shape and first.size > 0 and np.allclose(first, second, rtol=1e-6, equal_nan=True)


def _common(runs: Sequence[VariantOutcome], name: str, x_axis: str) -> list[tuple[list[float], list[float]]]:
    """Returns the positions and values of the runs at each update that all of their curves have.

    A non-finite value leaves a gap in a curve: its later values must not be paired with earlier ones of other seeds.
    """
    curves = [
        dict(zip(run.curve(name, "step")[0], zip(*run.curve(name, x_axis), strict=True), strict=True)) for run in runs
    ]
    steps = [step for step in curves[0] if all(step in curve for curve in curves)]
    return [([curve[step][0] for curve in curves], [curve[step][1] for curve in curves]) for step in steps]


def restarts(run: VariantOutcome, x_axis: str) -> list[float]:
    """Returns where the learning rate jumps back up: at the end of the last epoch before each rise after a fall."""
    rates = [(on_axis(line, x_axis), float(line["lr"])) for line in run.history if line.get("lr") is not None]
    found, peak = [], 0.0
    for (position, before), (_, after) in pairwise(rates):
        peak = max(peak, before)
        if before < peak and after > 1.5 * before:
            found.append(position)
            peak = 0.0
    return found


def _band() -> "Artist":
    from matplotlib.patches import Patch

    return Patch(color="0.4", alpha=0.3, linewidth=0)


def _mark(**options: Any) -> "Artist":
    from matplotlib.lines import Line2D

    return Line2D([], [], **{"color": "0.3"} | options)


def _cross() -> "Artist":
    return _mark(linestyle="", marker="x", **_CROSS)


def _columns(results: Results, name: str, values: Sequence[Value]) -> dict[str, list[list[float]]]:
    """Returns variant -> final metrics at each value of the only axis, one per seed; accuracies in percent."""
    factor = scale(name)
    finals = {variant: results.finals(variant, name) for variant in results.comparison.variants}
    return {
        variant: [[factor * final for final in points[(value,)]] for value in values]
        for variant, points in finals.items()
    }


def _draw_seeds(
    axes: "Axes",
    position: float,
    column: Sequence[float],
    average: Callable[[Sequence[float]], Average],
    cross: tuple[float, str],
    note: "Artist",
    shift: float = 0.0,
    **style: Any,
) -> "dict[str, Artist]":
    """Draws seeds and their interval, and a cross at (height, colour) if some diverged; returns the legend's entries.

    `note`: the mark of the interval. `shift`: to the right, in points.
    """
    finite = [value for value in column if not math.isnan(value)]
    notes: dict[str, Artist] = {}
    if len(finite) > 1:
        found = average(finite)
        _plot_shifted(axes, shift, [position, position], [found.low, found.high], **style)
        notes[found.label(len(column))] = note
        faint: dict[str, Any] = {"linestyle": "", "marker": "o", "markersize": 3.5, "markeredgewidth": 0, "alpha": 0.45}
        _plot_shifted(axes, shift, [position] * len(finite), finite, color=style["color"], **faint)
        notes["a seed"] = _mark(**faint)
    if len(finite) < len(column):
        height, colour = cross
        transform = _shifted(axes, axes.get_xaxis_transform(), shift)
        axes.plot(position, height, "x", color=colour, transform=transform, **_CROSS)
        notes["a seed diverged" if len(column) > 1 else "diverged"] = _cross()
    return notes


def _shifted(axes: "Axes", transform: Any, points: float) -> Any:
    """Returns the transform with a shift to the right."""
    from matplotlib.transforms import ScaledTranslation

    return transform + ScaledTranslation(points / 72, 0, axes.figure.dpi_scale_trans)


def _plot_shifted(axes: "Axes", points: float, x: Sequence[float], y: Sequence[float], **options: Any) -> None:
    """Plots a curve shifted to the right; the limits fit its values."""
    axes.plot(x, y, transform=_shifted(axes, axes.transData, points), **options)
    axes.update_datalim([*zip(x, y, strict=True)])  # curves with another transform do not count


def _along(axes: "Axes", results: Results, name: str) -> "dict[str, Artist]":
    """Plots the final metric against the key's value; crosses at the edge mark diverged runs."""
    comparison = results.comparison
    [(key, settings)] = comparison.along.items()
    values = sorted(settings, key=float)  # type: ignore[arg-type]
    positions = [float(value) for value in values]  # type: ignore[arg-type]
    notes: dict[str, Artist] = {}
    of_variants = _columns(results, name, values)
    noise = _ROUNDING.get(name, 0.0)
    average = partial(comparison.average, name)
    means = {variant: [_above(average(each).middle, noise) for each in found] for variant, found in of_variants.items()}
    edge = 0.02 if comparison.is_higher_better(name) else 0.98
    middle = (len(of_variants) - 1) / 2
    for i, (variant, columns) in enumerate(of_variants.items()):
        line = _line(i)
        marker: dict[str, Any] = {"marker": MARKERS[i % len(MARKERS)], "markersize": 7.5, "markeredgecolor": "white"}
        shift = _DODGE * (i - middle)
        _plot_shifted(axes, shift, positions, means[variant], **line, **marker, label=variant)
        for position, column in zip(positions, columns, strict=True):
            cross, style = (
                (abs(edge - 0.035 * i), line["color"]),
                {"color": line["color"], "linewidth": 4, "alpha": 0.3},
            )
            seen = [value for value in column if not value <= noise] if noise else column
            notes |= _draw_seeds(axes, position, seen, average, cross, _band(), shift, **style)
    if min(positions) > 0 and max(positions) >= 10 * min(positions):
        axes.set_xscale("log")
    _label_ticks(axes, positions, [show(value) for value in values], _WIDTH / len(comparison.metrics))
    axes.set_xlabel(label(key))
    if _has_logarithm(comparison, name):
        drawing.logarithmic(axes)
        for i, curve in enumerate(means.values()):
            zeros = [position for position, value in zip(positions, curve, strict=True) if value == 0]
            if zeros:  # underflow, for example of gradients
                transform = _shifted(axes, axes.get_xaxis_transform(), 2 * _DODGE * (i - middle))
                line = {"color": _line(i)["color"], "transform": transform, "clip_on": False}
                axes.plot(zeros, [0.02] * len(zeros), "v", markersize=10, **line)
                text = f"below {noise:g} (rounding error)" if noise else "0, below the axis"
                notes[text] = _mark(linestyle="", marker="v")
    return notes


def _above(value: float, noise: float) -> float:
    """Returns the value, or 0 if it is nothing but rounding."""
    return 0.0 if value <= noise else value


def _label_ticks(axes: "Axes", positions: Sequence[float], texts: Sequence[str], width: float) -> None:
    """Labels the x-axis of a panel of this width (inches); every second label is a line lower if they would collide."""
    is_log = axes.get_xscale() == "log"
    at = [math.log(position) if is_log else position for position in positions]
    character = 0.6 * (_TEXT - 1) / 72 / (0.8 * width)  # its width, as a fraction of the axis
    span = max(at) - min(at)
    collide = any(
        (b - a) < span * character * ((len(first) + len(second)) / 2 + 1.5)
        for (a, first), (b, second) in pairwise(zip(at, texts, strict=True))
    )
    axes.set_xticks(positions, ["\n" * (collide and i % 2) + text for i, text in enumerate(texts)])
    axes.minorticks_off()


def _bars(axes: "Axes", results: Results, name: str) -> "dict[str, Artist]":
    """Plots the final metric for each category as groups of bars, a bar per variant with the interval over seeds."""
    comparison = results.comparison
    [(key, settings)] = comparison.along.items()
    values, count = [*settings], len(comparison.variants)
    has_room = count * len(values) * len(comparison.metrics) <= 12  # more labels would overlap
    notes: dict[str, Artist] = {}
    heights = []
    for i, (variant, columns) in enumerate(_columns(results, name, values).items()):
        colour = drawing.COLOURS[i % len(drawing.COLOURS)]
        positions = [k + (i - (count - 1) / 2) * 0.8 / count for k in range(len(values))]
        averages = [comparison.average(name, column) for column in columns]
        means = [each.middle for each in averages]
        heights += [value for value in means if not math.isnan(value)]
        hatch = ("", "//", "..", "xx")[i // len(drawing.COLOURS) % 4]
        axes.bar(positions, means, 0.74 / count, color=colour, label=variant, hatch=hatch, edgecolor="white")
        for position, column, found in zip(positions, columns, averages, strict=True):
            line: dict[str, Any] = {"color": "black", "linewidth": 1.5}
            average, mark = partial(comparison.average, name), _mark(**line)
            notes |= _draw_seeds(axes, position, column, average, (0.03, colour), mark, **line)
            if has_room and not math.isnan(found.middle):
                style = {"ha": "center", "va": "bottom", "fontsize": _TEXT - 1}
                offset = {"textcoords": "offset points", "xytext": (0, 2)}
                axes.annotate(f"{found.middle:.3g}", (position, found.high), **style, **offset)  # type: ignore[arg-type]
    if heights and min(heights) > 0 and max(heights) > 30 * min(heights) and not comparison.is_higher_better(name):
        drawing.logarithmic(axes)
    axes.set_xticks(range(len(values)), [show(value) for value in values])
    axes.set_xlabel(label(key))
    axes.margins(y=0.1)
    return notes


def _heat_maps(results: Results) -> "Figure":
    """Plots a heat map per variant with a shared colour scale; a frame marks the best cell."""
    comparison = results.comparison
    import numpy as np
    from matplotlib.patches import Rectangle

    [name] = comparison.metrics
    # Framing by a test metric would show a choice made on the test set.
    chooser = comparison.choose if comparison.choose is not None else None if name in TEST_METRICS else name
    (row_key, rows), (column_key, columns) = comparison.along.items()
    maps = []
    for variant in comparison.variants:
        found = {point: comparison.average(name, values) for point, values in results.finals(variant, name).items()}
        maps.append(np.array([[found[row, column].middle for column in columns] for row in rows]))
    has_percent, is_higher = is_percent(name), comparison.is_higher_better(name)
    stacked = np.stack(maps)  # gaps may be negative, and errors 0: they have no logarithm
    has_logarithm = not is_higher and not (stacked <= 0).any()
    shades = -np.log10(stacked) if has_logarithm else stacked if is_higher else -stacked
    known = shades[~np.isnan(shades)]
    low, high = (float(np.quantile(known, 0.1 if is_higher else 0)), float(known.max())) if known.size else (0.0, 1.0)
    across = len(maps) if len(maps) < 4 else math.ceil(len(maps) / 2)
    down = math.ceil(len(maps) / across)
    figure = _titled_figure(comparison)
    panels = figure.subplots(down, across, squeeze=False)
    texts = [[[_cell(value, has_percent) for value in row] for row in values] for values in maps]
    longest = max(len(text) for each in texts for row in each for text in row)
    room = 72 * 0.85 * _WIDTH / (across * len(columns) * 0.65 * (longest + 1))  # points, so that no two numbers touch
    for i, (axes, variant, values, coloured) in enumerate(
        zip(panels.flat, comparison.variants, maps, shades, strict=False)
    ):
        axes.imshow(np.ma.masked_invalid(coloured), vmin=low, vmax=high, cmap="viridis", aspect="auto")
        axes.set_facecolor("0.85")
        for (row, column), value in np.ndenumerate(values):
            is_bright = math.isnan(value) or (coloured[row, column] - low) / max(high - low, 1e-12) > 0.6
            style = {"ha": "center", "va": "center", "color": "black" if is_bright else "white"}
            axes.text(column, row, texts[i][row][column], fontsize=min(_TEXT, room), **style)
        if chooser is not None:
            row, column = _best(results, variant, chooser)
            frame = Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="#D55E00", linewidth=3, zorder=3)
            frame.set_clip_on(False)  # whole at the edge
            axes.add_patch(frame)
        axes.set_xticks(range(len(columns)), list(map(show, columns)))
        is_first = i % across == 0  # of its row; the others have the same rows
        axes.set_yticks(range(len(rows)), list(map(show, rows)) if is_first else [""] * len(rows))
        axes.set_xlabel(label(column_key))
        axes.set_ylabel(label(row_key) if is_first else "")
        axes.set_title("\n".join(_evenly(variant, 36)))
        _enlarge(axes)
    notes = ["brighter is better", *(["×: diverged"] if np.isnan(shades).any() else [])]
    if chooser is not None:
        notes.append("frame: best" if chooser == name else f"frame: best {label(chooser)}")
    kind, count = next(iter(found.values())).kind, len(comparison.seeds)
    seeds = f", {kind} of {count} seeds" if count > 1 else ""
    figure.supxlabel(f"{axis_label(name)}{seeds}   {'; '.join(notes)}", fontsize=_TEXT)
    return figure


def _cell(value: float, has_percent: bool) -> str:
    """Returns the text of a cell of a heat map; accuracies in percent."""
    return "×" if math.isnan(value) else f"{100 * value:.1f}" if has_percent else f"{value:.2g}"


def _best(results: Results, variant: str, metric: str) -> tuple[int, int]:
    """Returns (row, column) of the best cell of a heat map by the average over seeds of `metric`."""
    comparison = results.comparison
    rows, columns = ([*values] for values in comparison.along.values())
    sign, finals = 1 if comparison.is_higher_better(metric) else -1, results.finals(variant, metric)
    averages = {point: sign * comparison.average(metric, values).middle for point, values in finals.items()}
    usable = {point: value for point, value in averages.items() if not math.isnan(value)} or averages
    row, column = max(usable, key=lambda point: usable[point])
    return rows.index(row), columns.index(column)
