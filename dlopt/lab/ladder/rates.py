"""Searches learning rates on small rungs and extrapolates them to the others. Pure functions.

A rate is centre * `SPACING` ** (index / 2). Even indices are the grid; odd ones refine it around the best.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import linear_regression

SPACING = math.sqrt(10)
GRID = (-4, -2, 0, 2, 4)
"""Indices of the first rates: two decades."""
LIMIT = 10
"""Largest index to which the grid is extended while the best rate is at its end: a factor of 316 from the centre."""


def rate(centre: float, index: int) -> float:
    """Returns the rate of an index, rounded to four digits."""
    return float(f"{centre * SPACING ** (index / 2):.4g}")


def missing(losses: Mapping[int, float], grid: Sequence[int] = GRID) -> list[int]:
    """Returns the indices to measure next; [] if the search is complete.

    Args:
        losses: by index; infinity for a run that failed.
        grid: even indices of the first rates.
    """
    if first := [index for index in grid if index not in losses]:
        return first
    coarse = sorted(index for index in losses if index % 2 == 0)
    best = min(coarse, key=lambda index: losses[index])
    if best == coarse[0] and best > -LIMIT:
        return [best - 2]
    if best == coarse[-1] and best < LIMIT:
        return [best + 2]
    around = [best - 1, best + 1]
    return [index for index in around if coarse[0] < index < coarse[-1] and index not in losses]


def expected_runs(place: int) -> int:
    """Returns the number of runs that search the rung at `place` (from 0), if its grid is not extended."""
    return (len(GRID) if place < FITTED else _AROUND) + 2


@dataclass(frozen=True)
class Optimum:
    """The best learning rate of a rung. `at_end`: the best measured rate is the smallest or the largest."""

    lr: float
    loss: float
    at_end: bool


def optimum(losses: Mapping[float, float]) -> Optimum | None:
    """Returns the vertex of the parabola through the best three losses in the logarithm of the learning rate.

    The three are the best rate and its neighbours. Where a neighbour is missing or diverged, the best rate itself is
    returned; None if every run failed. `losses`: by learning rate.
    """
    rates = sorted(losses)
    best = min(rates, key=lambda lr: losses[lr])
    if not math.isfinite(losses[best]):
        return None
    place = rates.index(best)
    if place in (0, len(rates) - 1):
        return Optimum(best, losses[best], at_end=True)
    three = rates[place - 1 : place + 2]
    y = [losses[lr] for lr in three]
    if not all(map(math.isfinite, y)) or len(set(y)) == 1:
        return Optimum(best, losses[best], at_end=False)
    import numpy as np

    x = [math.log(lr / best) for lr in three]
    a, b, c = np.polyfit(x, y, 2)
    vertex = -b / (2 * a)
    return Optimum(best * math.exp(vertex), float(c + vertex * b / 2), at_end=False)


FITTED = 3
"""Number of searched rungs whose optima are extrapolated, the largest: the optima of tiny ones may follow no law.

The search of a rung above so many others begins around their extrapolation.
"""
_AROUND = 3  # first rates of such a search


@dataclass(frozen=True)
class RateFit:
    """The law of the best learning rate: lr = scale * parameters ** exponent.

    Attributes:
        error: largest factor between a measured optimum and its prediction from the other rungs (leave-one-out); None:
            fewer than three rungs.
    """

    scale: float
    exponent: float
    error: float | None

    def __call__(self, parameters: float) -> float:
        return float(f"{self.scale * parameters**self.exponent:.4g}")


def fit_rates(parameters: Sequence[float], optima: Sequence[float]) -> RateFit:
    """Fits log lr = a + b log N to the largest `FITTED` rungs by least squares; one rung gives a constant.

    `parameters`: ascending.
    """
    points = [(math.log(size), math.log(lr)) for size, lr in zip(parameters, optima, strict=True)][-FITTED:]
    intercept, slope = _line(points)
    error = math.exp(max(_left_out(points, i) for i in range(len(points)))) if len(points) > 2 else None
    return RateFit(math.exp(intercept), slope, error)


def grid_around(lr: float, centre: float) -> tuple[int, ...]:
    """Returns the first indices of a search whose best rate is expected at `lr`: the nearest and its neighbours."""
    nearest = 2 * round(math.log(lr / centre, SPACING))
    middle = max(-LIMIT + 2, min(nearest, LIMIT - 2))
    return middle - 2, middle, middle + 2


def _line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Returns intercept and slope."""
    if len(points) == 1:
        return points[0][1], 0.0
    slope, intercept = linear_regression(*zip(*points, strict=True))
    return intercept, slope


def _left_out(points: Sequence[tuple[float, float]], i: int) -> float:
    intercept, slope = _line([*points[:i], *points[i + 1 :]])
    return abs(points[i][1] - intercept - slope * points[i][0])
