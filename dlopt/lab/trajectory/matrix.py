"""The picture of paths on a quadratic of a matrix: the singular values against the updates, one panel per path."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from dlopt.lab.trajectory.functions import ABOVE, BELOW, MatrixQuadratic
from dlopt.lab.trajectory.paths import Trajectory
from dlopt.results import drawing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLUMNS = 3


def draw_components(
    function: MatrixQuadratic, trajectories: Mapping[str, Trajectory], *, title: str, subtitle: str = ""
) -> "Figure":
    """Plots u_i^T W v_i of each path, coloured by curvature, and the norm of the rest outside the singular vectors."""
    import matplotlib

    columns = min(_COLUMNS, len(trajectories))
    rows = -(-len(trajectories) // columns)
    figure = drawing.figure(1.5 + 3.2 * columns, 1.4 + 2.6 * rows, drawing.title_with_subtitle(title, subtitle, 100))
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    order = function.eigenvalues.argsort(descending=True).tolist()
    shades = matplotlib.colormaps["viridis"].resampled(len(order) + 1)
    starts, _ = function.components(next(iter(trajectories.values())).points[:1])
    for axes, (label, trajectory) in zip(panels.flat, trajectories.items(), strict=False):
        along, others = function.components(trajectory.points)
        axes.axhline(0, color="0.75", linewidth=0.8)
        for place, i in enumerate(order):
            axes.plot(
                along[:, i], color=shades(place), linewidth=2, label=f"curvature {float(function.eigenvalues[i]):g}"
            )
        axes.plot(others, color="0.35", linestyle="--", linewidth=1.3, label="outside the singular vectors (norm)")
        axes.set_title(label, fontsize=10)
    highest = float(starts.max())
    panels.flat[0].set_ylim(-BELOW * highest, ABOVE * highest)
    panels.flat[0].locator_params(axis="x", integer=True)
    for axes in panels.flat[len(trajectories) :]:
        axes.set_visible(False)
    for axes in panels[:, 0]:
        axes.set_ylabel("$u_i^T W v_i$")
    for axes in panels.flat[: len(trajectories)][-columns:]:  # the lowest of each column
        axes.set_xlabel("updates")
        axes.tick_params(labelbottom=True)
    drawing.clean_axes(*panels.flat)
    drawing.legend_below(figure, panels.flat[0], 3)
    return figure
