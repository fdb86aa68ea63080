"""Paths of optimizers on functions of two variables, and learning-rate curves of schedules, without a training.

Paths go through the same `step(closure)` as in a training. They are drawn over the contours of their function, with
their distance to the minimum beside, as a picture and as a film.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as File
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dlopt.analysis import drawing
from dlopt.analysis.drawing import MARKERS, style
from dlopt.functions import Function
from dlopt.optim import LossClosure
from dlopt.random import generator
from dlopt.schedules import Factor, Scheduler
from dlopt.tracking.layout import aligned
from dlopt.training.averaging import at_evaluation_point

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Build = Callable[[Sequence[nn.Parameter]], Optimizer]

# The series of preferred numbers that electronics knows as E12: steps of a fifth.
_DIGITS = (1.0, 1.2, 1.5, 1.8, 2.2, 2.7, 3.3, 3.9, 4.7, 5.6, 6.8, 8.2)
RATES = tuple(float(f"{digit}e{power}") for power in range(-4, 2) for digit in _DIGITS)
"""Learning rates among which `best_rate` chooses."""

_COARSE = 4  # every fourth is tried, and then the neighbours of the best

REACHED = 1e-3
"""Distance at which a minimum counts as reached, as a share of the distance at the start."""

_FAR = 1e6  # who is so far away has diverged


@dataclass(frozen=True)
class Path:
    """Where an optimizer was before its first and after each update.

    `evaluations[i]` counts those of the loss, with or without its gradient, that led to point i; products with a
    Hessian are not among them.
    """

    points: Tensor  # [steps + 1, 2]
    losses: Tensor  # [steps + 1], of the function itself, without noise
    distances: Tensor  # [steps + 1], to the nearest minimum
    evaluations: list[int]
    diverged: bool

    def reached(self) -> int | None:
        """The first update after which the path stays within `REACHED` of a minimum."""
        outside = (~(self.distances <= REACHED * self.distances[0])).nonzero()
        last = int(outside[-1]) if len(outside) else -1
        return None if last == len(self.distances) - 1 else last + 1

    def turns(self) -> float:
        """The share of moves that lead back, at more than a right angle to the move before."""
        moves = self.points.diff(dim=0)
        moves = moves[moves.norm(dim=1) > 1e-6 * self.distances[0]]
        if len(moves) < 2:
            return 0.0
        return float(((moves[1:] * moves[:-1]).sum(1) < 0).double().mean())


def follow(function: Function, build: Build, *, steps: int, seed: int, factor: Factor) -> Path:
    """At most `steps` updates from the function's start, in float64; fewer where the optimizer diverges.

    `factor` is the schedule. Every optimizer sees the same noise in the same update.
    """
    point = nn.Parameter(torch.tensor(function.start, dtype=torch.float64))
    optimizer = build([point])
    schedule = Scheduler(optimizer, factor)
    points, evaluations = [point.detach().clone()], [0]
    count = 0
    diverged = False
    for t in range(steps):
        sampled = function.sample(generator("cpu", seed, t))

        def loss() -> Tensor:
            nonlocal count
            count += 1
            return sampled(point)  # noqa: B023 - called within this update only

        optimizer.step(LossClosure(optimizer, loss))  # type: ignore[arg-type]
        schedule.step()
        with at_evaluation_point(optimizer):
            reached = point.detach().clone()
        diverged = not bool(reached.abs().max() < _FAR)
        if diverged:
            break
        points.append(reached)
        evaluations.append(count)
    path = torch.stack(points)
    distances = torch.cdist(path, torch.tensor(function.minima, dtype=torch.float64)).min(1).values
    return Path(path, function(path).detach(), distances, evaluations, diverged)


def best_rate(trial: Callable[[float], Path], least: float) -> float:
    """The learning rate of `RATES` with which the loss falls fastest: of which the mean logarithm of its height above
    `least` is the smallest. Raises ValueError where all of them diverge."""

    def best(indices: Iterable[int]) -> int:
        for i in indices:
            scores.setdefault(i, _score(trial(RATES[i]), least))
        return min(scores, key=lambda i: scores[i])

    scores: dict[int, float] = {}
    middle = best(range(0, len(RATES), _COARSE))
    if math.isinf(scores[middle]):
        raise ValueError(f"every learning rate from {RATES[0]:g} to {RATES[-1]:g} diverges")
    return RATES[best(range(max(middle - _COARSE + 1, 0), min(middle + _COARSE, len(RATES))))]


def _score(path: Path, least: float) -> float:
    if path.diverged:
        return math.inf
    heights = (path.losses - least).clamp(min=0) / max(float(path.losses[0]) - least, 1e-300)
    return float((heights + 1e-10).log().mean())


_FRAMES = 120  # of a film, at most
_FLOOR = 1e-6  # share of the first distance; below it is there
_LINE = 120  # letters in a line of the legend


# -- pictures of paths


def paths_picture(function: Function, paths: Mapping[str, Path], *, title: str, subtitle: str = "") -> "Figure":
    """The contours with the paths, and the distance to the nearest minimum against updates and evaluations."""
    figure = drawing.figure(11, 6, drawing.headed(title, subtitle, 110))
    plane = figure.add_subplot(2, 5, (1, 8))
    _contours(plane, function)
    upper, lower = figure.add_subplot(2, 5, (4, 5)), figure.add_subplot(2, 5, (9, 10))
    for i, (label, path) in enumerate(paths.items()):
        line = _line(i, len(paths))
        size = max(2.0, 5.0 - len(path.points) / 40)
        plane.plot(*path.points.numpy().T, **line, marker=MARKERS[i % len(MARKERS)], markersize=size, label=label)
        upper.plot(path.distances, **line)
        lower.plot(path.evaluations, path.distances, **line)
    _finish_distances(upper, paths, "updates", max(len(path.points) - 1 for path in paths.values()))
    evaluations = max(path.evaluations[_arrival(path)] for path in paths.values())
    _finish_distances(lower, paths, "evaluations of the loss", evaluations)
    columns = max(1, min(len(paths), _LINE // (10 + max(map(len, paths)))))
    drawing.legend_below(figure, plane, columns)
    return figure


def _arrival(path: Path) -> int:
    """The update after which nothing is left to see: a search along a line that has ended evaluates on and on."""
    there = (path.distances <= _FLOOR * path.distances[0]).nonzero()
    return int(there[0]) if len(there) else len(path.distances) - 1


def _line(i: int, count: int) -> dict[str, Any]:
    width = 2.2 - 1.2 * i / max(count - 1, 1)
    return style(i, dash=i // len(drawing.COLOURS), linewidth=width, zorder=3 + i / 100)


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
    drawing.plain(axes)


def animate(function: Function, paths: Mapping[str, Path], target: File, *, title: str) -> None:
    """The same paths as they grow, some ten seconds at most: a GIF, or an MP4, which needs ffmpeg."""
    from matplotlib import animation
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = drawing.figure(6.4, 5.2)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _contours(axes, function)
    lines = [
        axes.plot([], [], **_line(i, len(paths)), marker="o", markersize=5, markevery=[-1], label=label)[0]
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
    rows = [["path", "lr", "updates", "evaluations", "distance", ""]]
    for label, path in paths.items():
        step, rate = path.reached(), rates[label]
        when = ("-", f"{path.evaluations[-1]}") if step is None else (f"{step}", f"{path.evaluations[step]}")
        shown = "search" if rate is None else f"{rate:g}"
        rows.append([label, shown, *when, f"{float(path.distances[-1]):.2g}", _verdict(path)])
    note = f"updates and evaluations until the distance to a minimum stays below {REACHED:g} of the first one"
    return [*aligned(rows), note]


def _verdict(path: Path) -> str:
    if path.diverged:
        return f"diverged after {len(path.points) - 1} updates: a smaller optimizer.lr"
    turns = path.turns()
    words = [f"zigzags: {turns:.0%} of its moves turn back"] if turns >= 0.3 else []
    if path.reached() is None:
        far = float(path.distances[-1] / path.distances[0])
        words.insert(0, f"not there yet: {far:.2g} of the distance is left")
    return "; ".join(words)


# -- learning-rate curves

_POINTS = 4000  # more cannot be seen


@dataclass(frozen=True)
class Curve:
    """The learning rate `rates[i]` holds from `epochs[i]` (fractions included) to the next."""

    label: str
    epochs: Sequence[float]
    rates: Sequence[float]


def curve(
    label: str, factor: Factor, *, lr: float, steps: int, steps_per_epoch: float, evaluate_every: float = 1.0
) -> Curve:
    """The rates of updates 0..steps-1 (of long runs some 4000 of them, evenly spread), closed at the end of the last.

    A schedule that follows a validation metric sees no improvement: every `evaluate_every` epochs the metric of the
    first evaluation.
    """
    component: Any = getattr(factor, "component", factor)
    stride = math.ceil(steps / _POINTS)
    between = max(round(evaluate_every * steps_per_epoch), 1)
    epochs, rates, evaluations = [], [], 0
    for t in range(0, steps, stride):
        while hasattr(component, "update") and (evaluations + 1) * between <= t:
            component.update({component.monitor: 0.5})
            evaluations += 1
        epochs.append(t / steps_per_epoch)
        rates.append(lr * factor(t))
    return Curve(label, [*epochs, steps / steps_per_epoch], [*rates, rates[-1]])


def curves_picture(
    curves: Sequence[Curve], *, title: str, subtitle: str = "", steps_per_epoch: float, log_y: bool
) -> "Figure":
    """All curves in one picture; on the logarithmic axis rates of zero are left out."""
    figure = drawing.figure(9.5, 5)
    axes = figure.add_subplot()
    for i, each in enumerate(curves):
        width = 3.0 - 1.6 * i / max(len(curves) - 1, 1)  # what lies below another curve shows at its sides
        axes.plot(each.epochs, each.rates, label=each.label, drawstyle="steps-post", **style(i, linewidth=width))
    axes.set_title(drawing.headed(title, subtitle), fontsize=11)
    axes.set_xlabel(f"epoch ({steps_per_epoch:g} updates each)")
    axes.set_ylabel("learning rate")
    axes.set_xlim(0, max(each.epochs[-1] for each in curves))
    if log_y:
        axes.set_yscale("log", nonpositive="mask")
        top = max(max(each.rates) for each in curves)
        axes.set_ylim(bottom=max(axes.get_ylim()[0], top * 1e-6))
    else:
        axes.set_ylim(bottom=0)
    drawing.plain(axes)
    figure.legend(loc="outside right upper", frameon=False, handlelength=3.5)
    return figure
