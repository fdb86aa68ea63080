"""Paths over the contours of their function, with their distance to the minimum beside; as a picture and as a film."""

import textwrap
from collections.abc import Mapping
from pathlib import Path as File
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dlopt.analysis.drawing import COLOURS, DASHES
from dlopt.analysis.paths.walking import REACHED, Path
from dlopt.functions import Function

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_FRAMES = 120  # of a film, at most
_FLOOR = 1e-6  # share of the first distance; below it is there
_LINE = 120  # letters in a line of the legend


def draw(function: Function, paths: Mapping[str, Path], *, title: str, subtitle: str = "") -> "Figure":
    """The contours with the paths, and the distance to the nearest minimum against updates and evaluations."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), layout="constrained")
    plane = figure.add_subplot(2, 5, (1, 8))
    _contours(plane, function)
    upper, lower = figure.add_subplot(2, 5, (4, 5)), figure.add_subplot(2, 5, (9, 10))
    for i, (label, path) in enumerate(paths.items()):
        style: dict[str, Any] = _style(i, len(paths))
        points = path.points.numpy()
        size = max(2.0, 5.0 - len(points) / 40)
        plane.plot(*points.T, **style, marker=_MARKERS[i % len(_MARKERS)], markersize=size, label=label)
        upper.plot(path.distances, **style)
        lower.plot(path.evaluations, path.distances, **style)
    _finish_distances(upper, paths, "updates", max(len(path.points) - 1 for path in paths.values()))
    evaluations = max(path.evaluations[_arrival(path)] for path in paths.values())
    _finish_distances(lower, paths, "evaluations of the loss", evaluations)
    columns = max(1, min(len(paths), _LINE // (10 + max(map(len, paths)))))
    figure.legend(loc="outside lower center", frameon=False, ncols=columns, handlelength=3.5)
    figure.suptitle("\n".join([title, *textwrap.wrap(subtitle, 110)]), fontsize=11)
    return figure


def _arrival(path: Path) -> int:
    """The update after which nothing is left to see: a search along a line that has ended evaluates on and on."""
    there = (path.distances <= _FLOOR * path.distances[0]).nonzero()
    return int(there[0]) if len(there) else len(path.distances) - 1


def _style(i: int, count: int) -> dict[str, Any]:
    return {
        "color": COLOURS[i % len(COLOURS)],
        "linestyle": DASHES[i // len(COLOURS) % len(DASHES)],
        "linewidth": 2.2 - 1.2 * i / max(count - 1, 1),
        "zorder": 3 + i / 100,
    }


def _contours(axes: "Axes", function: Function) -> None:
    """Levels that are evenly spread over the window's points, so that valleys and walls both show."""
    left, right, bottom, top = function.window
    x, y = np.meshgrid(np.linspace(left, right, 240), np.linspace(bottom, top, 240))
    grid = torch.from_numpy(np.stack([x, y], -1))
    with torch.no_grad():
        values = function(grid).numpy()
    levels = np.unique(np.quantile(values, np.linspace(0, 1, 22) ** 1.5))
    shades = [str(shade) for shade in np.linspace(0.72, 1.0, len(levels) - 1)]
    axes.contourf(x, y, values, levels=levels, colors=shades)
    axes.contour(x, y, values, levels=levels, colors="0.6", linewidths=0.6)
    axes.plot(*zip(*function.minima, strict=True), "*", color="white", markeredgecolor="black", markersize=15, zorder=5)
    axes.plot(*function.start, "o", markerfacecolor="none", markeredgecolor="black", markersize=11, zorder=5)
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, top)
    axes.set_xlabel("x   (circle: start, star: minimum)")
    axes.set_ylabel("y")


def _finish_distances(axes: "Axes", paths: Mapping[str, Path], label: str, longest: int) -> None:
    lowest = min(float(path.distances.min()) for path in paths.values())
    start = max(float(path.distances[0]) for path in paths.values())
    highest = min(max(float(path.distances.max()) for path in paths.values()), 100 * start)
    axes.set_yscale("log", nonpositive="clip")
    axes.set_ylim(max(lowest / 2, _FLOOR * start), 2 * highest)
    axes.set_xlim(0, longest)
    axes.set_xlabel(label)
    axes.set_ylabel("distance to the minimum")
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def animate(function: Function, paths: Mapping[str, Path], target: File, *, title: str) -> None:
    """The same paths as they grow, some ten seconds at most: a GIF, or an MP4, which needs ffmpeg."""
    from matplotlib import animation
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _contours(axes, function)
    lines = [
        axes.plot([], [], **_style(i, len(paths)), marker="o", markersize=5, markevery=[-1], label=label)[0]
        for i, label in enumerate(paths)
    ]
    axes.legend(loc="upper left", fontsize=8)
    longest = max(len(path.points) for path in paths.values())
    shown = np.unique(np.linspace(1, longest, min(longest, _FRAMES)).round().astype(int))

    def frame(end: int) -> list[Any]:
        for line, path in zip(lines, paths.values(), strict=True):
            line.set_data(*path.points[:end].numpy().T)
        axes.set_title(f"{title}: {end - 1} updates", fontsize=11)
        return lines

    film = animation.FuncAnimation(figure, frame, frames=[*shown, *[shown[-1]] * 10], blit=False)
    writer = animation.FFMpegWriter(fps=12) if target.suffix == ".mp4" else animation.PillowWriter(fps=12)
    film.save(target, writer=writer, dpi=90)


def table(paths: Mapping[str, Path], rates: Mapping[str, float | None]) -> list[str]:
    """A line for each path: learning rate, how near it came, how soon, and what is striking about it."""
    rows = [("path", "lr", "updates", "evaluations", "distance", "")]
    for label, path in paths.items():
        step, rate = path.reached(), rates[label]
        when = ("-", f"{path.evaluations[-1]}") if step is None else (f"{step}", f"{path.evaluations[step]}")
        shown = "search" if rate is None else f"{rate:g}"
        rows.append((label, shown, *when, f"{float(path.distances[-1]):.2g}", _verdict(path)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [*lines, f"updates and evaluations until the distance to a minimum stays below {REACHED:g} of the first one"]


def _verdict(path: Path) -> str:
    if path.diverged:
        return f"diverged after {len(path.points) - 1} updates: a smaller optimizer.lr"
    turns = path.turns()
    words = [f"zigzags: {turns:.0%} of its moves turn back"] if turns >= 0.3 else []
    if path.reached() is None:
        far = float(path.distances[-1] / path.distances[0])
        words.insert(0, f"not there yet: {far:.2g} of the distance is left")
    return "; ".join(words)
