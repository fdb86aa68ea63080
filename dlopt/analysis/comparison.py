"""A comparison of a few small runs: which they are, the metrics in their folders, and the picture of them.

The picture shows curves, metrics along a key, or heat maps along two.
"""

import json
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dlopt.analysis import drawing
from dlopt.analysis.drawing import MARKERS, style
from dlopt.analysis.probes import PROBES
from dlopt.ranges import Seed
from dlopt.tracking.layout import aligned

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Value = bool | int | float | str | None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What an experiment file compares; conf/experiment/lecture/_comparison.yaml explains the keys."""

    title: str
    see: str
    variants: dict[str, list[str]]
    along: dict[str, list[Value] | dict[str, list[str]]]
    seeds: list[Seed]
    metrics: list[str]
    x: Literal["epoch", "step", "seconds", "step_and_seconds"]

    @property
    def axes(self) -> list[str]:
        """What curves are drawn against, each in a panel of its own."""
        return self.x.split("_and_")

    def cells(self) -> Iterator["Cell"]:
        """Every run, variant by variant."""
        for variant, point, seed in product(self.variants, product(*self.along.values()), self.seeds):
            yield Cell(variant, point, seed)

    def overrides(self, cell: "Cell") -> list[str]:
        """What one run changes, as it would be typed. A variant may do without a key of `along`: it comes last."""
        lines: list[str] = []
        for (key, values), value in zip(self.along.items(), cell.point, strict=True):
            lines += values[str(value)] if isinstance(values, dict) else [f"{key}={typed(value)}"]
        return [*lines, *self.variants[cell.variant], f"seed={cell.seed}"]


@dataclass(frozen=True)
class Cell:
    """One run: a variant, a value of each key of `along`, and a seed."""

    variant: str
    point: tuple[Value, ...]
    seed: int


def typed(value: Value) -> str:
    """A value as one types it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


@dataclass(frozen=True)
class Outcome:
    """What a run left behind: the lines of its metrics.jsonl and its summary."""

    history: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Any]
    probed: Mapping[str, Sequence[tuple[Mapping[str, Any], float]]]  # probe -> (progress, value) of each checkpoint

    @property
    def failed(self) -> bool:
        return self.summary.get("status") == "failed"

    def curve(self, name: str, x: str) -> tuple[list[float], list[float]]:
        """(x, value) of every epoch, or of every checkpoint for a probe."""
        if name in self.probed:
            pairs = [(progress[x], value) for progress, value in self.probed[name]]
        else:
            pairs = [(line[x], value) for line in self.history if (value := _figure(line, name)) is not None]
        return [float(at) for at, _ in pairs], [float(value) for _, value in pairs]

    def final(self, name: str) -> float:
        """The final value of the metric; NaN for a run that failed, which is one that diverged."""
        if self.failed:
            return math.nan
        if self.summary.get(name) is not None:  # of the test
            return float(self.summary[name])
        values = self.curve(name, "step")[1]
        return values[-1] if values else math.nan


def _figure(line: Mapping[str, Any], name: str) -> Any:
    """Of a line of metrics.jsonl; `val_error` is the share that is not right."""
    if not name.endswith("_error"):
        return line.get(name)
    accuracy = line.get(name.replace("_error", "_accuracy"))
    return None if accuracy is None else 1 - accuracy


def read(folder: Path, metrics: Sequence[str]) -> Outcome:
    """What the run in `folder` left; the probes among `metrics` are computed from its checkpoints."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    summary = folder / "summary.json"
    return Outcome(
        history=[json.loads(line) for line in lines],
        summary=json.loads(summary.read_text()) if summary.is_file() else {"status": "failed"},
        probed={name: PROBES[name](folder) for name in metrics if name in PROBES},
    )


def mean(values: Sequence[float]) -> float:
    """NaN where one of them is: a setting with which one seed diverges is no setting to take."""
    return sum(values) / len(values)


def finals(comparison: Comparison, outcomes: Mapping[Cell, Outcome], variant: str, name: str) -> dict[Any, list[float]]:
    """The final value of the metric for each point of the axes: a value for each seed."""
    found: dict[Any, list[float]] = {}
    for cell in comparison.cells():
        if cell.variant == variant:
            found.setdefault(cell.point, []).append(outcomes[cell].final(name))
    return found


def table(comparison: Comparison, outcomes: Mapping[Cell, Outcome]) -> list[str]:
    """A line for each variant and point of the axes, with the metrics at the end, means over the seeds."""
    rows = [["variant", *comparison.along, *comparison.metrics]]
    for variant in comparison.variants:
        columns = [finals(comparison, outcomes, variant, name) for name in comparison.metrics]
        rows += [[variant, *map(typed, at), *(show(mean(column[at])) for column in columns)] for at in columns[0]]
    return aligned(rows)


def show(value: float) -> str:
    return "diverged" if math.isnan(value) else f"{value:.4g}"


# -- the picture

_NAMES = {
    "val_error": "validation error (share that is wrong)",
    "input_drift": "drift of the layers' inputs in an epoch (standard deviations)",
    "gradient_variance": "variance of the batches' gradients (1: in a random order)",
    "effective_rate": "effective learning rate (median weight)",
}
_UNITS = {"epoch": "epoch", "step": "update", "seconds": "seconds"}


def draw(comparison: Comparison, outcomes: Mapping[Cell, Outcome]) -> "Figure":
    """A panel for each metric; with two keys along which the variants are run, one for each variant."""
    if len(comparison.along) == 2:
        return _heat_maps(comparison, outcomes)
    shown = [(name, x) for name in comparison.metrics for x in (comparison.axes if not comparison.along else [""])]
    count = len(shown)
    figure = _headed(comparison, 9.5 if count > 1 else 8, 5)
    panels = figure.subplots(1, count, squeeze=False)[0]
    for axes, (name, x) in zip(panels, shown, strict=True):
        if comparison.along:
            _along(axes, comparison, outcomes, name)
        else:
            _curves(axes, comparison, outcomes, name, x)
        axes.set_ylabel("\n".join(_evenly(_NAMES.get(name, drawing.spelled(name)), 45)))
        if not name.endswith(("accuracy", "_error")):
            drawing.logarithmic(axes)
    drawing.plain(*panels)
    columns = max(1, min(len(comparison.variants), 110 // (12 + max(map(len, comparison.variants)))))
    drawing.legend_below(figure, panels[0], columns, handlelength=3)
    return figure


def _headed(comparison: Comparison, width: float, height: float) -> "Figure":
    """A figure under the comparison's title and what there is to see."""
    lines = [rf"$\bf{{{_escaped(comparison.title)}}}$", *_evenly(comparison.see, round(width * 13.5))]
    return drawing.figure(width, height, "\n".join(lines), fontsize=10)


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


def _line(i: int, width: float = 1.8) -> dict[str, Any]:
    return style(i, dash=i // len(drawing.COLOURS), linewidth=width)


def _curves(axes: "Axes", comparison: Comparison, outcomes: Mapping[Cell, Outcome], name: str, x_axis: str) -> None:
    """The mean over the seeds and the range that they span; a cross ends the curve of a run that diverged."""
    for i, variant in enumerate(comparison.variants):
        # Against updates curves may lie on each other.
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
    """The width of the curve i of so many that may lie on each other: what is below shows at the sides."""
    return 7 - 5.6 * i / max(count - 1, 1)


def _coincide(curves: Sequence[Sequence[float]]) -> bool:
    """Whether one of the curves hides another in most of its points."""
    return any(
        sum(math.isclose(x, y, rel_tol=0.01) for x, y in zip(a, b, strict=True)) > len(a) / 2
        for a, b in combinations(curves, 2)
    )


def _along(axes: "Axes", comparison: Comparison, outcomes: Mapping[Cell, Outcome], name: str) -> None:
    """The final value of the metric against the key's value; crosses at the edge are runs that diverged."""
    [(key, given)] = comparison.along.items()
    values = [*given]
    places = [float(value) if _are_numbers(values) else float(i) for i, value in enumerate(values)]
    diverged = []
    found = {variant: finals(comparison, outcomes, variant, name) for variant in comparison.variants}
    coincide = _coincide([[mean(each[(value,)]) for value in values] for each in found.values()])
    for i, variant in enumerate(comparison.variants):
        line = _line(i)
        if coincide:
            line = _line(i, _narrowing(i, len(comparison.variants)))
            line["markersize"] = 4 + line["linewidth"]
        columns = [found[variant][(value,)] for value in values]
        means = [mean(column) for column in columns]
        axes.plot(places, means, **line, marker=MARKERS[i % len(MARKERS)], label=variant)
        for place, column in zip(places, columns, strict=True):
            finite = [value for value in column if not math.isnan(value)]
            if len(finite) > 1:
                axes.plot([place, place], [min(finite), max(finite)], color=line["color"], linewidth=4, alpha=0.3)
            if len(finite) < len(column):
                diverged.append((place, i, line["color"]))
    edge = 0.02 if name.endswith("accuracy") else 0.98
    for place, i, colour in diverged:
        cross: dict[str, Any] = {"color": colour, "markersize": 9, "markeredgewidth": 2.5}
        axes.plot(place, abs(edge - 0.035 * i), "x", transform=axes.get_xaxis_transform(), **cross)
    if _are_numbers(values) and min(places) > 0 and max(places) >= 8 * min(places):
        axes.set_xscale("log")
    axes.set_xticks(places, [typed(value) for value in values])
    axes.minorticks_off()
    axes.set_xlabel(f"{key}   (crosses: diverged)" if diverged else key)


def _are_numbers(values: Sequence[Any]) -> bool:
    """Also of names that are written as numbers: those of points that set several keys."""
    try:
        return not any(isinstance(value, bool) for value in values) and bool([float(value) for value in values])
    except (TypeError, ValueError):
        return False


def _heat_maps(comparison: Comparison, outcomes: Mapping[Cell, Outcome]) -> "Figure":
    """A map for each variant, all in the colours of one scale; a frame marks the best cell."""
    import numpy as np
    from matplotlib.patches import Rectangle

    [name] = comparison.metrics
    (row_key, rows), (column_key, columns) = comparison.along.items()
    maps = []
    for variant in comparison.variants:
        found = finals(comparison, outcomes, variant, name)
        maps.append(np.array([[mean(found[row, column]) for column in columns] for row in rows]))
    is_accuracy = name.endswith("accuracy")
    shades = np.stack(maps) if is_accuracy else -np.log10(np.stack(maps))
    low, high = float(np.nanquantile(shades, 0.1 if is_accuracy else 0)), float(np.nanmax(shades))
    across = len(maps) if len(maps) < 4 else math.ceil(len(maps) / 2)
    down = math.ceil(len(maps) / across)
    figure = _headed(comparison, 3.6 * across + 1.2, 3.2 * down + 1)
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
        axes.set_xticks(range(len(columns)), list(map(typed, columns)))
        axes.set_yticks(range(len(rows)), list(map(typed, rows)))
        axes.set_xlabel(column_key)
        axes.set_ylabel(row_key)
        axes.set_title(variant, fontsize=10)
    unit, note = (", percent", "the brighter the better; ") if is_accuracy else ("", "")
    figure.supxlabel(f"{_NAMES.get(name, drawing.spelled(name))}{unit} ({note}× diverged; frame: best)", fontsize=9)
    return figure
