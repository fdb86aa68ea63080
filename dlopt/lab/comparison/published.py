"""Results of a comparison beside published ones: a check, the rank correlation, and a plot of both."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from dlopt.extend import UserError
from dlopt.lab.comparison.comparison import Comparison, Results
from dlopt.lab.comparison.labels import axis_label, is_percent, label, scale
from dlopt.results import drawing

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def check_published(comparison: Comparison) -> None:
    """Raises `UserError` unless `published` has one value for each point of the only axis of the only variant."""
    if not comparison.published:
        return
    points = [] if len(comparison.along) != 1 else [*map(str, next(iter(comparison.along.values())))]
    if len(comparison.published) != 1 or len(comparison.variants) != 1 or not points:
        raise UserError("comparison.published: needs one label, one variant and one key in comparison.along")
    [(name, values)] = comparison.published.items()
    if [*values] != points:
        raise UserError(
            f"comparison.published.{name}: must have a value for each of {', '.join(points)}, in this order"
        )


def values_beside(results: Results) -> tuple[list[float], list[float]]:
    """Returns the published values, and the averages over seeds of the first metric, one per point."""
    comparison = results.comparison
    [published], [variant], metric = comparison.published.values(), comparison.variants, comparison.metrics[0]
    finals = results.finals(variant, metric)
    return [*published.values()], [comparison.average(metric, values).middle for values in finals.values()]


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Returns Spearman's rank correlation: Pearson's of the ranks, where ties share their mean rank.

    NaN if a value is NaN or all values of a side are equal.
    """
    from scipy.stats import rankdata

    ranks = [rankdata(values) for values in (first, second)]
    if any(map(math.isnan, (*first, *second))) or any(np.ptp(each) == 0 for each in ranks):
        return math.nan
    return float(np.corrcoef(np.stack(ranks))[0, 1])


def record_published(results: Results) -> dict[str, Mapping[str, object]]:
    """Returns the entry of comparison.json: the published values and the rank correlation; empty without any."""
    if not results.comparison.published:
        return {}
    [(name, values)] = results.comparison.published.items()
    correlation = rank_correlation(*values_beside(results))
    entry = {"label": name, "values": values}
    return {"published": entry | ({} if math.isnan(correlation) else {"rank_correlation": round(correlation, 4)})}


def describe_published(results: Results) -> list[str]:
    """Returns the line for the terminal: the rank correlation; none without published values."""
    if not results.comparison.published:
        return []
    correlation = rank_correlation(*values_beside(results))
    return [
        f"Rank correlation with the published values (Spearman; 1: the same order, 0: unrelated): {correlation:.2f}"
    ]


def draw_beside(results: Results, figure: "Figure", fontsize: float) -> None:
    """Plots two columns with a row per point: the published values, and averages over seeds with intervals here."""
    comparison = results.comparison
    [(name, _)], [variant] = comparison.published.items(), comparison.variants
    metric = comparison.metrics[0]
    factor = scale(metric)
    averages = [comparison.average(metric, values) for values in results.finals(variant, metric).values()]
    panels = figure.subplots(1, 2, sharey=True)
    rows = [*range(len(averages))]
    for axes, fractions, colour in zip(panels, values_beside(results), drawing.COLOURS, strict=False):
        values = [factor * value for value in fractions]
        axes.plot(values, rows, "o", color=colour, markersize=10, zorder=3)
        for x, row in zip(values, rows, strict=True):
            offset = {"textcoords": "offset points", "xytext": (0, 8), "ha": "center", "fontsize": fontsize}
            axes.annotate(f"{x:.2f}" if is_percent(metric) else f"{x:.4f}", (x, row), **offset)
        axes.tick_params(labelsize=fontsize)
        axes.margins(x=0.15)
        axes.locator_params("x", nbins=4)  # more labels overlap
    for row, each in zip(rows, averages, strict=True):
        ends = [factor * each.low, factor * each.high]
        panels[1].plot(ends, [row, row], color=drawing.COLOURS[1], linewidth=4, alpha=0.3)
    [(key, points)] = comparison.along.items()
    panels[0].set_yticks(rows, [*points])
    panels[0].set(ylim=(len(rows) - 0.5, -0.7))
    panels[0].set_ylabel(label(key), fontsize=fontsize)
    panels[0].set_xlabel(name.replace(", ", "\n"), fontsize=fontsize)
    seeds = averages[0].label(len(comparison.seeds)).replace(" over", "\nover")
    panels[1].set_xlabel(f"{axis_label(metric)}\n{variant}\n{seeds}", fontsize=fontsize)
    drawing.clean_axes(*panels)
