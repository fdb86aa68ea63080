"""Trajectories of optimizers on functions of two variables, and of a matrix.

Optimizers are called as in training. Trajectories are plotted over the contours of the function, with their distance to
the minimum, and animated.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dlopt.basics.formats import wrap
from dlopt.basics.random import generator
from dlopt.extend import Component, LossClosure
from dlopt.lab.trajectory.functions import Function, Window
from dlopt.optim import SGDW
from dlopt.optim.traits import not_evaluated, optimizer_traits, refuse_missing_closure
from dlopt.results import drawing
from dlopt.results.drawing import MARKERS, style
from dlopt.schedules import Factor, Scheduler
from dlopt.tracking.terminal_text import align_columns
from dlopt.training.averaging import evaluation_weights

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Build = Callable[[Sequence[nn.Parameter]], Optimizer]

# The E12 series of preferred numbers: steps of about 20 %.
_DIGITS = (1.0, 1.2, 1.5, 1.8, 2.2, 2.7, 3.3, 3.9, 4.7, 5.6, 6.8, 8.2)
RATES = tuple(float(f"{digit}e{power}") for power in range(-4, 2) for digit in _DIGITS)
"""Learning rates among which `best_rate` chooses."""

_COARSE = 4  # tries every fourth rate first, then the neighbours of the best one
MAX_TRIALS = len(range(0, len(RATES), _COARSE)) + 2 * (_COARSE - 1)

TOLERANCE = 1e-3
"""Distance at which a minimum counts as reached, as a fraction of the initial distance."""

_DIVERGED = 1e6  # coordinates beyond this count as divergence


@dataclass(frozen=True)
class Trajectory:
    """Points of an optimizer before the first and after each update.

    `evaluations[i]`: number of loss evaluations, with or without gradient, up to point i, without Hessian products.
    `samples`: samples per evaluation, 1 for functions without data.
    """

    points: Tensor  # [steps + 1, 2], or the entries of a matrix
    losses: Tensor  # [steps + 1], of the function itself, without noise
    distances: Tensor  # [steps + 1], to the nearest minimum
    evaluations: list[int]
    diverged: bool
    samples: int = 1

    @property
    def cost(self) -> list[int]:
        """The number of samples evaluated up to each point."""
        return [count * self.samples for count in self.evaluations]

    def stays_in_the_plot(self, function: Function) -> bool:
        return not self.diverged and function.shows(self.points)

    def updates_to_minimum(self) -> int | None:
        """Returns the first update after which the distance stays within `TOLERANCE`; None if there is none."""
        outside = (~(self.distances <= TOLERANCE * self.distances[0])).nonzero()
        last = int(outside[-1]) if len(outside) else -1
        return None if last == len(self.distances) - 1 else last + 1

    def reversal_fraction(self) -> float:
        """Returns the fraction of moves at more than a right angle to the previous move."""
        moves = self.points.diff(dim=0)
        moves = moves[moves.norm(dim=1) > 1e-6 * self.distances[0]]
        if len(moves) < 2:
            return 0.0
        return float(((moves[1:] * moves[:-1]).sum(1) < 0).double().mean())


def follow(function: Function, build: Build, *, steps: int, seed: int, factor: Factor) -> Trajectory:
    """Runs `steps` updates from the function's start in float64; stops early if the optimizer diverges.

    As in training, an optimizer that evaluates the loss once gets gradients, and the others get a closure. `factor` is
    the schedule. The noise depends only on the seed and the update, so it is the same for all optimizers. Raises
    `UserError` if the optimizer does not call its closure.
    """
    point = nn.Parameter(torch.tensor(function.start, dtype=torch.float64).view(function.shape))
    optimizer = build([point])
    schedule = Scheduler(optimizer, factor)
    evaluates_once = optimizer_traits(optimizer).evaluations == "once"
    points, evaluations = [point.detach().flatten().clone()], [0]
    count = 0
    diverged = False
    for t in range(steps):
        sampled = function.sample(generator("cpu", seed, t))

        def loss() -> Tensor:
            nonlocal count
            count += 1
            return sampled(point.flatten())  # noqa: B023 - called within this update only

        closure = LossClosure(optimizer, loss)
        if evaluates_once:
            closure()
            try:
                optimizer.step()
            except Exception as error:
                refuse_missing_closure(optimizer, error)
                raise
        else:
            optimizer.step(closure)  # type: ignore[arg-type]
            if count == evaluations[-1]:
                raise not_evaluated(optimizer)
        schedule.step()
        with evaluation_weights(optimizer):
            position = point.detach().flatten().clone()
        diverged = not bool(position.abs().max() < _DIVERGED)
        if diverged:
            break
        points.append(position)
        evaluations.append(count)
    visited = torch.stack(points)
    distances = torch.cdist(visited, torch.tensor(function.minima, dtype=torch.float64)).min(1).values
    return Trajectory(visited, function(visited).detach(), distances, evaluations, diverged, function.samples)


def best_rate(trial: Callable[[float], Trajectory], function: Function) -> float:
    """Returns the learning rate of `RATES` with the lowest mean logarithm of the loss above the minimum, among those
    whose path stays in the plot, or among all if every path leaves it. Raises ValueError if all
    diverge."""

    def best(indices: Iterable[int]) -> int:
        for i in indices:
            if i not in scores:
                path = trial(RATES[i])
                scores[i] = (not path.stays_in_the_plot(function), _score(path, function.least))
        return min(scores, key=lambda i: scores[i])

    scores: dict[int, tuple[bool, float]] = {}
    coarse = best(range(0, len(RATES), _COARSE))
    if math.isinf(scores[coarse][1]):
        raise ValueError(f"every learning rate from {RATES[0]:g} to {RATES[-1]:g} diverges")
    return RATES[best(range(max(coarse - _COARSE + 1, 0), min(coarse + _COARSE, len(RATES))))]


def _score(trajectory: Trajectory, least: float) -> float:
    if trajectory.diverged:
        return math.inf
    heights = (trajectory.losses - least).clamp(min=0) / max(float(trajectory.losses[0]) - least, 1e-300)
    return float((heights + 1e-10).log().mean())


_FRAMES = 120  # of an animation, at most
_FLOOR = 1e-6  # fraction of the initial distance that counts as arrived in plots
_LOG_RANGE = 8  # ratio of the batch sizes from which the axis of samples is logarithmic
_LINE = 92  # characters per line of the legend
_TEXT = 13  # points


# -- plots of trajectories


def optimum(optimizer: Component, least: float, largest: float, *, fixed_momentum: bool) -> Mapping[str, float] | None:
    """Returns the keys with the fastest convergence on a quadratic with Hessian eigenvalues `least` to `largest`.

    Gradient descent: lr = 2 / (L + mu). Heavy ball: lr = 4 / (sqrt L + sqrt mu)^2 and momentum ((sqrt L - sqrt mu) /
    (sqrt L + sqrt mu))^2 (Polyak 1964); with `fixed_momentum` the lr for the momentum of the optimizer. None for other
    optimizers. Momentum as an average of gradients (`SGDW`) takes steps 1 - momentum times as long.
    """
    arguments = optimizer.arguments
    averages = optimizer.target is SGDW
    heavy_ball = optimizer.target is torch.optim.SGD and not arguments["nesterov"] and arguments["dampening"] == 0
    if not (averages or heavy_ball) or arguments["weight_decay"] != 0:
        return None
    if arguments["momentum"] == 0:
        return {"lr": 2 / (largest + least)}
    best = ((math.sqrt(largest) - math.sqrt(least)) / (math.sqrt(largest) + math.sqrt(least))) ** 2
    momentum = arguments["momentum"] if fixed_momentum else best
    scale = 1 - momentum if averages else 1.0
    lr = _heavy_ball_rate(momentum, best, least, largest) / scale
    return {"lr": lr} if fixed_momentum else {"lr": lr, "momentum": momentum}


def _heavy_ball_rate(momentum: float, best: float, least: float, largest: float) -> float:
    """Returns the heavy ball's best lr at this momentum.

    Below the best momentum the slowest roots of both ends are equal at 2 (1 + momentum) / (L + mu). Above it, every lr
    from (1 - sqrt momentum)^2 / mu to (1 + sqrt momentum)^2 / L converges with sqrt momentum; the geometric mean.
    """
    if momentum <= best:
        return 2 * (1 + momentum) / (largest + least)
    root = math.sqrt(momentum)
    return math.sqrt((1 - root) ** 2 / least * (1 + root) ** 2 / largest)


def draw_trajectories(
    function: Function, trajectories: Mapping[str, Trajectory], *, title: str, subtitle: str = ""
) -> "Figure":
    """Plots trajectories over contours, and their distance to the nearest minimum against updates and evaluations.

    Without the panel of evaluations, if every update of all trajectories takes one.
    """
    figure = drawing.figure(9.6, 5.4, drawing.title_with_subtitle(title, subtitle, 80), fontsize=_TEXT + 1)
    plane = figure.add_subplot(2, 5, (1, 8))
    _contours(plane, function, _frame(function.window, trajectories.values()), trajectories.values())
    is_one_each = all(each.cost == [*range(len(each.points))] for each in trajectories.values())
    upper = figure.add_subplot(2, 5, (4, 10 if is_one_each else 5))
    lower = None if is_one_each else figure.add_subplot(2, 5, (9, 10))
    for i, (label, trajectory) in enumerate(trajectories.items()):
        moves = _arrival_update(trajectory)
        line = _line(i, len(trajectories)) | {"zorder": 3 + 1 / (1 + moves)}  # a short path is in front of a long one
        if moves <= 5:
            line["linewidth"] = 3.0  # else it is hidden by the longer ones
        size = 8.0 if moves <= 5 else max(2.5, 6.0 - moves / 25)
        plane.plot(*trajectory.points.numpy().T, **line, marker=MARKERS[i % len(MARKERS)], markersize=size, label=label)
        upper.plot(trajectory.distances, **line)
        if lower is not None:
            lower.plot(trajectory.cost, trajectory.distances, **line)
    updates = max(len(trajectory.points) - 1 for trajectory in trajectories.values())
    _finish_distances(upper, trajectories, "updates", updates)
    if lower is not None:
        _finish_costs(lower, trajectories)
    columns = max(1, min(len(trajectories), _LINE // (10 + max(map(len, trajectories)))))
    for axes in figure.axes:
        axes.tick_params(labelsize=_TEXT - 1)
        if lower is not None and axes is not plane:  # half as high
            axes.set_ylabel("distance to\nthe minimum", fontsize=_TEXT)
    drawing.legend_below(figure, plane, columns, fontsize=_TEXT)
    return figure


def _finish_costs(axes: "Axes", trajectories: Mapping[str, Trajectory]) -> None:
    """Labels the axis of evaluations; logarithmic if batches differ in size by an order of magnitude."""
    cost = max(trajectory.cost[_arrival_update(trajectory)] for trajectory in trajectories.values())
    sizes = {trajectory.samples for trajectory in trajectories.values()}
    _finish_distances(axes, trajectories, "evaluations of the loss" if sizes == {1} else "samples evaluated", cost)
    if max(sizes) >= _LOG_RANGE * min(sizes):
        axes.set_xscale("log")
        axes.set_xlim(min(sizes), max(trajectory.cost[-1] for trajectory in trajectories.values()))


def _arrival_update(trajectory: Trajectory) -> int:
    """Returns the update of arrival at the minimum; the evaluations of line searches after it would hide the rest."""
    arrived = (trajectory.distances <= _FLOOR * trajectory.distances[0]).nonzero()
    return int(arrived[0]) if len(arrived) else len(trajectory.distances) - 1


def _line(i: int, count: int) -> dict[str, Any]:
    """Returns the style of path i: earlier ones are wider, so that they show below a path that coincides."""
    width = 2.8 - 1.0 * i / max(count - 1, 1)
    return style(i, dash=i // len(drawing.COLOURS), linewidth=width, zorder=3 + i / 100)


def _frame(window: Window | None, trajectories: Iterable[Trajectory]) -> Window:
    """Returns the window, which a function of two variables has, extended to contain the trajectories, by at most its
    size on each side."""
    assert window is not None
    finite = [trajectory.points for trajectory in trajectories if not trajectory.diverged]
    if not finite:
        return window
    x, y = torch.cat(finite).unbind(1)
    return (*_extended(*window[:2], x), *_extended(*window[2:], y))


def _extended(low: float, high: float, values: Tensor) -> tuple[float, float]:
    size, least, largest = high - low, float(values.min()), float(values.max())
    margin = 0.03 * size
    return (
        max(least - margin, low - size) if least < low else low,
        min(largest + margin, high + size) if largest > high else high,
    )


def _contours(axes: "Axes", function: Function, window: Window, trajectories: Iterable[Trajectory]) -> None:
    """Draws contours at quantiles of the values in the window, which resolves both valleys and walls."""
    left, right, bottom, top = window
    x, y = np.meshgrid(np.linspace(left, right, 200), np.linspace(bottom, top, 200))
    grid = torch.from_numpy(np.stack([x, y], -1))
    with torch.no_grad():
        values = function(grid).numpy()
    levels = np.unique(np.quantile(values, np.linspace(0, 1, 22) ** 1.5))
    shades = [str(shade) for shade in np.linspace(0.72, 1.0, len(levels) - 1)]
    axes.contourf(x, y, values, levels=levels, colors=shades).set_rasterized(True)  # an SVG of half a megabyte else
    axes.contour(x[::2, ::2], y[::2, ::2], values[::2, ::2], levels=levels, colors="0.6", linewidths=0.6)
    axes.plot(*zip(*function.minima, strict=True), "*", color="white", markeredgecolor="black", markersize=15, zorder=5)
    for start in dict.fromkeys(tuple(trajectory.points[0].tolist()) for trajectory in trajectories):
        axes.plot(*start, "o", markerfacecolor="none", markeredgecolor="black", markersize=11, zorder=5)
    axes.set(xlim=(left, right), ylim=(bottom, top))
    axes.set_xlabel(f"{function.axes[0]}   (circle: start, star: minimum)", fontsize=_TEXT)
    axes.set_ylabel(function.axes[1], fontsize=_TEXT)


def _finish_distances(axes: "Axes", trajectories: Mapping[str, Trajectory], label: str, longest: int) -> None:
    lowest = min(float(trajectory.distances.min()) for trajectory in trajectories.values())
    start = max(float(trajectory.distances[0]) for trajectory in trajectories.values())
    highest = min(max(float(trajectory.distances.max()) for trajectory in trajectories.values()), 100 * start)
    if highest > 0:  # else all paths stay at the minimum
        axes.set_yscale("log", nonpositive="clip")
        axes.set_ylim(max(lowest / 2, _FLOOR * start), 2 * highest)
    axes.set_xlim(0, max(longest, 1))
    axes.set_xlabel(label, fontsize=_TEXT)
    axes.set_ylabel("distance to the minimum", fontsize=_TEXT)
    axes.locator_params(axis="x", integer=True)
    drawing.clean_axes(axes)


def animate(function: Function, trajectories: Mapping[str, Trajectory], target: Path, *, title: str) -> None:
    """Animates the trajectories in about ten seconds, as a GIF or an MP4 (requires ffmpeg)."""
    from matplotlib import animation, rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = drawing.figure(6.4, 5.2)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _contours(axes, function, _frame(function.window, trajectories.values()), trajectories.values())
    lines = [
        axes.plot([], [], **_line(i, len(trajectories)), marker="o", markersize=5, markevery=[-1], label=label)[0]
        for i, label in enumerate(trajectories)
    ]
    axes.legend(loc="upper left", fontsize=8)
    longest = max(len(trajectory.points) for trajectory in trajectories.values())
    shown = np.unique(np.linspace(1, longest, min(longest, _FRAMES)).round().astype(int))

    def frame(end: int) -> list[Any]:
        for line, trajectory in zip(lines, trajectories.values(), strict=True):
            line.set_data(*trajectory.points[:end].numpy().T)
        axes.set_title(f"{title}: {end - 1} updates", fontsize=11)
        return lines

    film = animation.FuncAnimation(figure, frame, frames=[*shown, *[shown[-1]] * 10], blit=False)
    # A matplotlibrc of the current folder, which may be a stranger's, could name another program and its options.
    with rc_context({"animation.ffmpeg_path": "ffmpeg", "animation.ffmpeg_args": []}):
        writer = animation.FFMpegWriter(fps=12) if target.suffix == ".mp4" else animation.PillowWriter(fps=12)
        film.save(target, writer=writer, dpi=90)


def table(
    trajectories: Mapping[str, Trajectory], rates: Mapping[str, float | None], width: int | None = None
) -> list[str]:
    """Formats a table: learning rate, updates and evaluations to the minimum, final distance, and remarks.

    `width`: of a terminal, on which remarks that are too long follow below their row; None for no limit.
    """
    counted = "evaluations" if all(each.samples == 1 for each in trajectories.values()) else "samples"
    rows = [["path", "lr", "updates", counted, "distance"]]
    remarks = ["", ""]  # of the heads and the rule
    for label, trajectory in trajectories.items():
        step, rate = trajectory.updates_to_minimum(), rates[label]
        updates = "-" if step is None else f"{step}"
        cost = f"{trajectory.cost[-1 if step is None else step]}"
        lr, distance = "search" if rate is None else f"{rate:g}", f"{float(trajectory.distances[-1]):.2g}"
        rows.append([label, lr, updates, cost, distance])
        remarks.append(_verdict(trajectory))
    lines = []
    aligned = align_columns(rows)
    longest = max(map(len, aligned))
    for row, remark in zip(aligned, remarks, strict=True):
        line = f"{row:{longest}}  {remark}".rstrip()
        if width is None or len(line) <= width:
            lines.append(line)
        else:
            lines += [row, *wrap(remark, width, first="  ", indent="  ")]
    note = f"updates and {counted} until the distance to a minimum stays below {TOLERANCE:g} of the initial distance"
    return [*lines, *wrap(note, width)]


def _verdict(trajectory: Trajectory) -> str:
    if trajectory.diverged:
        return f"diverged after {len(trajectory.points) - 1} updates: try a smaller optimizer.lr"
    reversals = trajectory.reversal_fraction()
    remarks = [f"zigzags: {100 * reversals:.0f} % of the moves reverse"] if reversals >= 0.3 else []
    if trajectory.updates_to_minimum() is None:
        remaining = float(trajectory.distances[-1] / trajectory.distances[0])
        remarks.insert(0, f"minimum not reached: {remaining:.2g} of the initial distance left")
    return "; ".join(remarks)
