"""The stopping rule of plain gradient descent on a path: updates and distance at its end, against the tolerance.

The rule of `dlopt train stopping=tolerance`: a run ends after more than `ITERATIONS` updates in a row that move
the parameters by less than the tolerance. On a quadratic, its end has a closed form.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dlopt.lab.trajectory.functions import Quadratic
from dlopt.lab.trajectory.paths import Trajectory
from dlopt.results import drawing
from dlopt.results.drawing import MARKERS, style
from dlopt.tracking.terminal_text import align_columns
from dlopt.training.stopping import Tolerance

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ITERATIONS = 10
"""`iterations` of conf/stopping/tolerance.yaml."""


@dataclass(frozen=True)
class Decay:
    """The slowest coordinates of a quadratic, which decide the end of gradient descent: start * factor^t.

    Args:
        start: their distance from the minimum at first.
        factor: |1 - lr curvature|, the largest of all coordinates.
        step: lr curvature; update t moves them by start * factor^(t-1) * step.
    """

    start: float
    factor: float
    step: float

    def updates(self, tolerance: float) -> float:
        """Returns the number of updates at the end, a real number; the rule ends with the next integer.

        Update t is below the tolerance e for t - 1 > ln(e / (start step)) / ln(factor).
        """
        return max(math.log(tolerance / (self.start * self.step)) / math.log(self.factor), 0.0) + 1 + ITERATIONS

    def distance(self, tolerance: float) -> float:
        """Returns the distance to the minimum at the end; about e / (lr curvature) for small steps."""
        return self.start * self.factor ** self.updates(tolerance)


def decay(function: Quadratic, lr: float) -> Decay | None:
    """Returns the slowest decay of gradient descent on a quadratic without noise; None if it does not decay."""
    if function.curvatures is None:
        return None
    rates = [lr * curvature for curvature in function.hessian]
    found = [
        Decay(abs(start), abs(1 - rate), rate)
        for start, rate in zip(function.coordinates(*function.start), rates, strict=True)
        if start
    ]
    factor = max((each.factor for each in found), default=0.0)
    if not 0 < factor < 1:
        return None
    # At lr = 2 / (L + mu), both coordinates are equally slow.
    slowest = [each for each in found if math.isclose(each.factor, factor)]
    start = math.hypot(*(each.start for each in slowest))
    return Decay(start, factor, math.hypot(*(each.start * each.step for each in slowest)) / start)


def end(points: Tensor, tolerance: float) -> int | None:
    """Returns the number of updates after which the rule ends the run along `points` [updates + 1, 2]; None: never."""
    module = nn.Module()
    module.point = nn.Parameter(points[0].clone())
    rule = Tolerance(module, tolerance=tolerance, iterations=ITERATIONS)
    for update, point in enumerate(points[1:], 1):
        with torch.no_grad():
            module.point.copy_(point)
        rule.after_change()
        if rule.should_stop:
            return update
    return None


Ends = Mapping[str, Sequence[tuple[float, int | None, float]]]
"""path -> (tolerance, updates at the end, distance to the minimum there), by tolerance; None and NaN: not ended."""


def ends(trajectories: Mapping[str, Trajectory], tolerances: Sequence[float]) -> Ends:
    found: dict[str, list[tuple[float, int | None, float]]] = {}
    for label, trajectory in trajectories.items():
        found[label] = []
        for tolerance in sorted(tolerances):
            update = end(trajectory.points, tolerance)
            distance = math.nan if update is None else float(trajectory.distances[update])
            found[label].append((tolerance, update, distance))
    return found


def draw_ends(found: Ends, decays: Mapping[str, Decay | None], *, title: str, subtitle: str) -> "Figure":
    """Plots updates and distance at the end against the tolerance: marks measured, lines in closed form."""
    figure = drawing.figure(9.6, 5.4, drawing.title_with_subtitle(title, subtitle, 84), fontsize=12)
    panels = figure.subplots(1, 2)
    for i, (label, rows) in enumerate(found.items()):
        line, marker = style(i, linewidth=2.2), {"marker": MARKERS[i % len(MARKERS)], "markersize": 9}
        ended = [(tolerance, update, distance) for tolerance, update, distance in rows if update is not None]
        for axes, column in zip(panels, (1, 2), strict=True):
            x, y = [row[0] for row in ended], [row[column] for row in ended]
            axes.plot(x, y, linestyle="", color=line["color"], **marker, label=label)
        if (closed := decays.get(label)) is not None:
            fine = torch.logspace(math.log10(rows[0][0]), math.log10(rows[-1][0]), 200).tolist()
            for axes, function in zip(panels, (closed.updates, closed.distance), strict=True):
                axes.plot(fine, [*map(function, fine)], **line)
    for axes, name in zip(panels, ("updates until the run ends", "distance to the minimum at the end"), strict=True):
        axes.set(xscale="log", yscale="log")
        axes.set_xlabel("tolerance: size of a tiny update", fontsize=13)
        axes.set_ylabel(name, fontsize=13)
    drawing.clean_axes(*panels)
    handles, labels = panels[0].get_legend_handles_labels()
    if any(decays.values()):
        handles.append(panels[0].plot([], [], color="0.3", linewidth=2.2)[0])
        labels.append("closed form")
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=13)
    return figure


def end_table(found: Ends, decays: Mapping[str, Decay | None]) -> list[str]:
    """Formats a line per path and tolerance: updates and distance at the end, measured and in closed form."""
    rows = [["path", "tolerance", "updates", "closed form", "distance", "closed form"]]
    for label, each in found.items():
        closed = decays.get(label)
        for tolerance, update, distance in each:
            theory = ["", ""]
            if closed is not None:
                theory = [f"{closed.updates(tolerance):.1f}", f"{closed.distance(tolerance):.2g}"]
            measured = ["-", "-"] if update is None else [f"{update}", f"{distance:.2g}"]
            rows.append([label, f"{tolerance:g}", measured[0], theory[0], measured[1], theory[1]])
    return align_columns(rows)
