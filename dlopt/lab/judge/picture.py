"""Draws a judgement: the gain of each pair, and the interval after each of them."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dlopt.lab.judge.sequential import Look
from dlopt.lab.judge.wording import scale
from dlopt.metrics.shown import is_percent
from dlopt.results.drawing import COLOURS, clean_axes, figure, integer_ticks, legend_below, metric_label

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(title: str, metric: str, gains: Sequence[float], looks: Sequence[Look], margin: float) -> "Figure":
    """Draws gains, estimates and intervals against the number of pairs; infinite ones are left out."""
    made = figure(6.4, 4.0, title)
    axes = made.subplots()
    unit = scale(metric)
    finite = [(i + 1, unit * gain) for i, gain in enumerate(gains) if math.isfinite(gain)]
    estimated = [(look.pairs, unit * look.estimate) for look in looks if math.isfinite(look.estimate)]
    bounded = [look for look in looks if math.isfinite(look.low) and math.isfinite(look.high)]
    axes.axhline(0, color="0.4", linewidth=0.8)
    for side in {margin, -margin} - {0.0}:
        axes.axhline(unit * side, color="0.4", linewidth=0.8, linestyle="--")
    axes.plot(*zip(*finite, strict=True) if finite else ((), ()), "o", color=COLOURS[0], label="gain of a pair")
    axes.plot(*zip(*estimated, strict=True) if estimated else ((), ()), color=COLOURS[1], label="gain so far")
    axes.vlines(
        [look.pairs for look in bounded],
        [unit * look.low for look in bounded], [unit * look.high for look in bounded],
        color=COLOURS[1], alpha=0.3, linewidth=8, zorder=1, label="interval of the gain",
    )  # fmt: skip
    axes.set_xlabel("pairs of runs")
    axes.set_ylabel(f"gain in {metric_label(metric)}{' (points)' * is_percent(metric)}\nabove 0: the change is better")
    axes.set_xlim(0.5, max(len(gains), 2) + 0.5)
    clean_axes(axes)
    integer_ticks(axes)
    legend_below(made, axes, 3)
    return made
