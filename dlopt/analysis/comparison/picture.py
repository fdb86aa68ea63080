"""The picture of a comparison: curves, figures along a key, or heat maps along two."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

from dlopt.analysis.comparison.runs import Cell, Comparison, Outcome, finals, mean, typed
from dlopt.analysis.drawing import COLOURS, DASHES, logarithmic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_NAMES = {
    "train_loss": "training loss",
    "val_loss": "validation loss",
    "test_loss": "test loss",
    "train_accuracy": "training accuracy",
    "val_accuracy": "validation accuracy",
    "val_error": "validation error (share that is wrong)",
    "test_accuracy": "test accuracy",
    "input_drift": "drift of the layers' inputs in an epoch (standard deviations)",
    "gradient_variance": "variance of the batches' gradients (1: in a random order)",
    "effective_rate": "effective learning rate (median weight)",
}
_UNITS = {"epoch": "epoch", "step": "update", "seconds": "seconds"}


def draw(comparison: Comparison, outcomes: Mapping[Cell, Outcome]) -> "Figure":
    """A panel for each figure; with two keys along which the variants are run, one for each variant."""
    if len(comparison.along) == 2:
        return _heat_maps(comparison, outcomes)
    from matplotlib.figure import Figure

    shown = [(name, x) for name in comparison.figures for x in (comparison.axes if not comparison.along else [""])]
    count = len(shown)
    figure = Figure(figsize=(9.5 if count > 1 else 8, 5), layout="constrained")
    panels = figure.subplots(1, count, squeeze=False)[0]
    for axes, (name, x) in zip(panels, shown, strict=True):
        if comparison.along:
            _along(axes, comparison, outcomes, name)
        else:
            _curves(axes, comparison, outcomes, name, x)
        axes.set_ylabel("\n".join(_evenly(_NAMES.get(name, name), 45)))
        if not name.endswith(("accuracy", "_error")):
            logarithmic(axes)
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    columns = max(1, min(len(labels), 110 // (12 + max(map(len, labels)))))
    figure.legend(handles, labels, loc="outside lower center", frameon=False, ncols=columns, handlelength=3)
    _head(figure, comparison)
    return figure


def _head(figure: "Figure", comparison: Comparison) -> None:
    lines = _evenly(comparison.see, round(figure.get_figwidth() * 13.5))
    figure.suptitle("\n".join([rf"$\bf{{{_escaped(comparison.title)}}}$", *lines]), fontsize=10)


def _evenly(text: str, width: int) -> list[str]:
    """As few lines as fit into `width`, as long as each other: no word stands alone on the last one."""
    count = len(textwrap.wrap(text, width))
    while width > 20 and len(textwrap.wrap(text, width - 1)) == count:
        width -= 1
    return textwrap.wrap(text, width)


def _escaped(title: str) -> str:
    """A title as matplotlib's mathematics, the one way to have it bold above lines that are not."""
    hyphens = title.replace("-", "\u2010")  # which would be minus signs there
    escaped = "".join(f"\\{letter}" if letter in " %#_${}" else letter for letter in hyphens)
    return escaped.replace(",", "{,}")  # which would have a space behind it of its own


def _style(i: int) -> dict[str, Any]:
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i // len(COLOURS) % len(DASHES)], "linewidth": 1.8}


def _curves(axes: "Axes", comparison: Comparison, outcomes: Mapping[Cell, Outcome], name: str, x_axis: str) -> None:
    """The mean over the seeds and the range that they span; a cross ends the curve of a run that diverged."""
    for i, variant in enumerate(comparison.variants):
        style = _style(i)
        if len(comparison.axes) > 1:  # against updates curves may lie on each other
            style["linewidth"] = _narrowing(i, len(comparison.variants))
        runs = [outcomes[Cell(variant, (), seed)] for seed in comparison.seeds]
        pairs = [run.curve(name, x_axis) for run in runs]
        length = min(len(values) for _, values in pairs)
        x = pairs[0][0][:length]
        columns = list(zip(*(values[:length] for _, values in pairs), strict=True))
        axes.plot(x, [mean(column) for column in columns], **style, label=variant)
        if len(runs) > 1:
            low, high = [min(column) for column in columns], [max(column) for column in columns]
            axes.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
        if any(run.failed for run in runs):
            end = (x[-1], mean(columns[-1])) if x else (0.0, 1.0)
            axes.plot(*end, "x", color=style["color"], markersize=12, markeredgewidth=3)
    axes.set_xlabel(_UNITS[x_axis])
    axes.set_xlim(left=0)
    if x_axis != "seconds":
        axes.locator_params(axis="x", integer=True)


def _narrowing(i: int, count: int) -> float:
    """The width of the curve i of so many that may lie on each other: what is below shows at the sides."""
    return 7 - 5.6 * i / max(count - 1, 1)


def _coincide(curves: Sequence[Sequence[float]]) -> bool:
    """Whether one of the curves hides another in most of its points."""
    return any(
        sum(math.isclose(x, y, rel_tol=0.01) for x, y in zip(a, b, strict=True)) > len(a) / 2
        for a, b in combinations(curves, 2)
    )


def _along(axes: "Axes", comparison: Comparison, outcomes: Mapping[Cell, Outcome], name: str) -> None:
    """The figure at the end against the key's value; crosses at the edge are runs that diverged."""
    [(key, given)] = comparison.along.items()
    values = [*given]
    places = _places(values)
    diverged = []
    found = {variant: finals(comparison, outcomes, variant, name) for variant in comparison.variants}
    coincide = _coincide([[mean(each[(value,)]) for value in values] for each in found.values()])
    for i, variant in enumerate(comparison.variants):
        style = _style(i)
        if coincide:
            style["linewidth"] = _narrowing(i, len(comparison.variants))
            style["markersize"] = 4 + style["linewidth"]
        columns = [found[variant][(value,)] for value in values]
        axes.plot(
            places, [mean(column) for column in columns], **style, marker=_MARKERS[i % len(_MARKERS)], label=variant
        )
        for place, column in zip(places, columns, strict=True):
            finite = [value for value in column if not math.isnan(value)]
            if len(finite) > 1:
                axes.plot([place, place], [min(finite), max(finite)], color=style["color"], linewidth=4, alpha=0.3)
            if len(finite) < len(column):
                diverged.append((place, i, style["color"]))
    edge = 0.02 if name.endswith("accuracy") else 0.98
    for place, i, colour in diverged:
        height = abs(edge - 0.035 * i)
        axes.plot(
            place, height, "x", color=colour, markersize=9, markeredgewidth=2.5, transform=axes.get_xaxis_transform()
        )
    _scale(axes, values, places)
    axes.set_xlabel(f"{key}   (crosses: diverged)" if diverged else key)


def _places(values: Sequence[Any]) -> list[float]:
    """The values themselves, or their positions where they are not numbers."""
    return [float(value) for value in values] if _are_numbers(values) else [float(i) for i in range(len(values))]


def _are_numbers(values: Sequence[Any]) -> bool:
    """Also of names that are written as numbers: those of points that set several keys."""
    try:
        return not any(isinstance(value, bool) for value in values) and bool([float(value) for value in values])
    except (TypeError, ValueError):
        return False


def _scale(axes: "Axes", values: Sequence[Any], places: Sequence[float]) -> None:
    if _are_numbers(values) and min(places) > 0 and max(places) >= 8 * min(places):
        axes.set_xscale("log")
    axes.set_xticks(places, [typed(value) for value in values])
    axes.minorticks_off()


def _heat_maps(comparison: Comparison, outcomes: Mapping[Cell, Outcome]) -> "Figure":
    """A map for each variant, all in the colours of one scale; a frame marks the best cell."""
    import numpy as np
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    [name] = comparison.figures
    (row_key, rows), (column_key, columns) = comparison.along.items()
    maps = []
    for variant in comparison.variants:
        found = finals(comparison, outcomes, variant, name)
        maps.append(np.array([[mean(found[row, column]) for column in columns] for row in rows]))
    is_accuracy = name.endswith("accuracy")
    shown = np.stack(maps) if is_accuracy else np.log10(np.stack(maps))
    low, high = float(np.nanquantile(shown, 0.1 if is_accuracy else 0)), float(np.nanmax(shown))
    across = len(maps) if len(maps) < 4 else math.ceil(len(maps) / 2)
    down = math.ceil(len(maps) / across)
    figure = Figure(figsize=(3.6 * across + 1.2, 3.2 * down + 1), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False)
    for axes, variant, values in zip(panels.flat, comparison.variants, maps, strict=False):
        coloured = values if is_accuracy else -np.log10(values)
        limits = (low, high) if is_accuracy else (-high, -low)
        image = axes.imshow(np.ma.masked_invalid(coloured), vmin=limits[0], vmax=limits[1], cmap="viridis")
        axes.set_facecolor("0.85")
        for (row, column), value in np.ndenumerate(values):
            bright = (coloured[row, column] - limits[0]) / max(limits[1] - limits[0], 1e-12) > 0.6
            text = "×" if math.isnan(value) else f"{100 * value:.1f}" if is_accuracy else f"{value:.2g}"
            dark = math.isnan(value) or bright
            axes.text(column, row, text, ha="center", va="center", fontsize=8, color="black" if dark else "white")
        best = np.unravel_index(np.nanargmax(coloured), values.shape)
        frame = Rectangle((best[1] - 0.5, best[0] - 0.5), 1, 1, fill=False, edgecolor="#D55E00", linewidth=3)
        axes.add_patch(frame)
        axes.set_xticks(range(len(columns)), [typed(value) for value in columns])
        axes.set_yticks(range(len(rows)), [typed(value) for value in rows])
        axes.set_xlabel(column_key)
        axes.set_ylabel(row_key)
        axes.set_title(variant, fontsize=10)
    unit = (
        ", percent (the brighter the better; × diverged; frame: best)" if is_accuracy else " (× diverged; frame: best)"
    )
    figure.supxlabel(_NAMES.get(name, name) + unit, fontsize=9)
    _head(figure, comparison)
    del image
    return figure
