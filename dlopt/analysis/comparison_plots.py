"""Plots of a comparison: curves, metrics against one key, or heat maps over two keys."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

from dlopt.analysis import drawing
from dlopt.analysis.claims import Finding, sentence, shown
from dlopt.analysis.comparison import Cell, Comparison, Outcome, finals, mean
from dlopt.analysis.drawing import MARKERS, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
_UNITS = {"epoch": "epoch", "step": "update", "seconds": "seconds"}


def draw(comparison: Comparison, outcomes: Mapping[Cell, Outcome], findings: Sequence[Finding] = ()) -> "Figure":
    """Plots a panel per metric, or for two keys in `along` a heat map per variant; the title ends with the findings."""
    if len(comparison.along) == 2:
        return _heat_maps(comparison, outcomes, findings)
    shown = [(name, x) for name in comparison.metrics for x in (comparison.axes if not comparison.along else [""])]
    count = len(shown)
    figure = _titled_figure(comparison, findings, 9.5 if count > 1 else 8, 5)
    panels = figure.subplots(1, count, squeeze=False)[0]
    for axes, (name, x) in zip(panels, shown, strict=True):
        if comparison.along:
            _along(axes, comparison, outcomes, name)
        else:
            _curves(axes, comparison, outcomes, name, x)
        axes.set_ylabel("\n".join(_evenly(drawing.label(name), 45)))
        if not name.endswith(("accuracy", "_error")):
            drawing.logarithmic(axes)
    drawing.clean_axes(*panels)
    columns = max(1, min(len(comparison.variants), 110 // (12 + max(map(len, comparison.variants)))))
    drawing.legend_below(figure, panels[0], columns, handlelength=3)
    return figure


def _titled_figure(comparison: Comparison, findings: Sequence[Finding], width: float, height: float) -> "Figure":
    """Creates a figure with the comparison's title and description, and the outcome of its claims."""
    characters = round(width * 13.5)
    lines = [rf"$\bf{{{_escaped(comparison.title)}}}$", *_evenly(comparison.see, characters)]
    for finding in findings:
        lines += _evenly(_plain(sentence(finding, drawing.label, short=True)), characters)
    return drawing.figure(width, height + 0.17 * max(0, len(lines) - 3), "\n".join(lines), fontsize=10)


def _plain(text: str) -> str:
    """Escapes a text for matplotlib, which reads dollar signs as mathtext."""
    return text.replace("$", r"\$")


def _evenly(text: str, width: int) -> list[str]:
    """Wraps text into the fewest lines of nearly equal length, so that no single word is left on the last line."""
    count = len(textwrap.wrap(text, width))
    while width > 20 and len(textwrap.wrap(text, width - 1)) == count:
        width -= 1
    return textwrap.wrap(text, width)


def _escaped(title: str) -> str:
    """Escapes a title for matplotlib's mathtext, the only way to mix bold and regular text in one title."""
    hyphens = title.replace("-", "\u2010")  # mathtext renders "-" as a minus sign
    escaped = "".join(f"\\{letter}" if letter in " %#_${}" else letter for letter in hyphens)
    return escaped.replace(",", "{,}")  # mathtext adds a space after a bare comma


def _line(i: int, width: float = 1.8) -> dict[str, Any]:
    return style(i, dash=i // len(drawing.COLOURS), linewidth=width)


def _curves(axes: "Axes", comparison: Comparison, outcomes: Mapping[Cell, Outcome], name: str, x_axis: str) -> None:
    """Plots means and ranges over seeds; a cross marks the end of a diverged run."""
    for i, variant in enumerate(comparison.variants):
        # Curves may coincide against updates: narrower lines on top keep all of them visible.
        line = _line(i, _narrowing(i, len(comparison.variants)) if len(comparison.axes) > 1 else 1.8)
        runs = [outcomes[Cell(variant, (), seed)] for seed in comparison.seeds]
        pairs = [run.curve(name, x_axis) for run in runs]
        length = min(len(values) for _, values in pairs)
        x = pairs[0][0][:length]
        columns = list(zip(*(values[:length] for _, values in pairs), strict=True))
        axes.plot(x, [mean(column) for column in columns], **line, label=variant)
        if len(runs) > 1:
            low, high = [min(column) for column in columns], [max(column) for column in columns]
            axes.fill_between(x, low, high, color=line["color"], alpha=0.15, linewidth=0)
        if any(run.failed for run in runs):
            end = (x[-1], mean(columns[-1])) if x else (0.0, 1.0)
            axes.plot(*end, "x", color=line["color"], markersize=12, markeredgewidth=3)
    axes.set_xlabel(_UNITS[x_axis])
    axes.set_xlim(left=0)
    if x_axis != "seconds":
        axes.locator_params(axis="x", integer=True)


def _narrowing(i: int, count: int) -> float:
    """Returns the width of curve i of `count`: decreasing, so that a curve below another shows at its sides."""
    return 7 - 5.6 * i / max(count - 1, 1)


def _coincide(curves: Sequence[Sequence[float]]) -> bool:
    """Returns whether any two curves coincide in most of their points."""
    return any(
        sum(math.isclose(x, y, rel_tol=0.01) for x, y in zip(a, b, strict=True)) > len(a) / 2
        for a, b in combinations(curves, 2)
    )


def _along(axes: "Axes", comparison: Comparison, outcomes: Mapping[Cell, Outcome], name: str) -> None:
    """Plots the final metric against the key's value; crosses at the edge mark diverged runs."""
    [(key, settings)] = comparison.along.items()
    values = [*settings]
    positions = [float(value) if _are_numbers(values) else float(i) for i, value in enumerate(values)]
    diverged = []
    results = {variant: finals(comparison, outcomes, variant, name) for variant in comparison.variants}
    coincide = _coincide([[mean(means[(value,)]) for value in values] for means in results.values()])
    for i, variant in enumerate(comparison.variants):
        line = _line(i)
        if coincide:
            line = _line(i, _narrowing(i, len(comparison.variants)))
            line["markersize"] = 4 + line["linewidth"]
        columns = [results[variant][(value,)] for value in values]
        means = [mean(column) for column in columns]
        axes.plot(positions, means, **line, marker=MARKERS[i % len(MARKERS)], label=variant)
        for position, column in zip(positions, columns, strict=True):
            finite = [value for value in column if not math.isnan(value)]
            if len(finite) > 1:
                axes.plot([position, position], [min(finite), max(finite)], color=line["color"], linewidth=4, alpha=0.3)
            if len(finite) < len(column):
                diverged.append((position, i, line["color"]))
    edge = 0.02 if name.endswith("accuracy") else 0.98
    for position, i, colour in diverged:
        cross: dict[str, Any] = {"color": colour, "markersize": 9, "markeredgewidth": 2.5}
        axes.plot(position, abs(edge - 0.035 * i), "x", transform=axes.get_xaxis_transform(), **cross)
    if _are_numbers(values) and min(positions) > 0 and max(positions) >= 8 * min(positions):
        axes.set_xscale("log")
    axes.set_xticks(positions, [shown(value) for value in values])
    axes.minorticks_off()
    axes.set_xlabel(f"{drawing.label(key)}   (crosses: diverged)" if diverged else drawing.label(key))


def _are_numbers(values: Sequence[Any]) -> bool:
    """Returns whether all values are numbers, or strings of numbers (names of points that set several keys)."""
    try:
        return not any(isinstance(value, bool) for value in values) and bool([float(value) for value in values])
    except (TypeError, ValueError):
        return False


def _heat_maps(comparison: Comparison, outcomes: Mapping[Cell, Outcome], findings: Sequence[Finding]) -> "Figure":
    """Plots a heat map per variant with a shared colour scale; a frame marks the best cell."""
    import numpy as np
    from matplotlib.patches import Rectangle

    [name] = comparison.metrics
    (row_key, rows), (column_key, columns) = comparison.along.items()
    maps = []
    for variant in comparison.variants:
        results = finals(comparison, outcomes, variant, name)
        maps.append(np.array([[mean(results[row, column]) for column in columns] for row in rows]))
    is_accuracy = name.endswith("accuracy")
    shades = np.stack(maps) if is_accuracy else -np.log10(np.stack(maps))
    low, high = float(np.nanquantile(shades, 0.1 if is_accuracy else 0)), float(np.nanmax(shades))
    across = len(maps) if len(maps) < 4 else math.ceil(len(maps) / 2)
    down = math.ceil(len(maps) / across)
    figure = _titled_figure(comparison, findings, 3.6 * across + 1.2, 3.2 * down + 1)
    panels = figure.subplots(down, across, squeeze=False)
    for axes, variant, values, coloured in zip(panels.flat, comparison.variants, maps, shades, strict=False):
        axes.imshow(np.ma.masked_invalid(coloured), vmin=low, vmax=high, cmap="viridis")
        axes.set_facecolor("0.85")
        for (row, column), value in np.ndenumerate(values):
            is_bright = math.isnan(value) or (coloured[row, column] - low) / max(high - low, 1e-12) > 0.6
            text = "×" if math.isnan(value) else f"{100 * value:.1f}" if is_accuracy else f"{value:.2g}"
            axes.text(column, row, text, ha="center", va="center", fontsize=8, color="black" if is_bright else "white")
        best = np.unravel_index(np.nanargmax(coloured), values.shape)
        frame = Rectangle((best[1] - 0.5, best[0] - 0.5), 1, 1, fill=False, edgecolor="#D55E00", linewidth=3)
        axes.add_patch(frame)
        axes.set_xticks(range(len(columns)), list(map(shown, columns)))
        axes.set_yticks(range(len(rows)), list(map(shown, rows)))
        axes.set_xlabel(drawing.label(column_key))
        axes.set_ylabel(drawing.label(row_key))
        axes.set_title(variant, fontsize=10)
    unit, note = (" (%)", "brighter is better; ") if is_accuracy else ("", "")
    figure.supxlabel(
        f"{drawing.label(name)}{unit}   {note}×: diverged, frame: best", fontsize=9
    )
    return figure
