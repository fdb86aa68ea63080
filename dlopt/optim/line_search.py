"""Line searches along x + t d, for methods that see the loss as often as they need.

Nocedal & Wright, Numerical Optimization, 2nd ed.: algorithms 3.1 (backtracking), 3.5 and 3.6 (strong Wolfe conditions).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass
class Point:
    """The loss, its slope along the line, and its gradient [n], at step length t."""

    t: float
    loss: float
    slope: float
    gradient: Tensor


def backtracking(
    loss_at: Callable[[float], float], *, loss: float, slope: float, t: float, c1: float, evaluations: int
) -> float:
    """The first of t, t/2, t/4, ... with loss(t) <= loss + c1 t slope, or 0 when `evaluations` of them did not do."""
    for _ in range(evaluations):
        if loss_at(t) <= loss + c1 * t * slope:  # false for nan
            return t
        t *= 0.5
    return 0.0


def strong_wolfe(
    evaluate: Callable[[float], Point], start: Point, t: float, *, c1: float, c2: float, evaluations: int
) -> Point:
    """A point with loss(t) <= loss(0) + c1 t slope(0) and |slope(t)| <= c2 |slope(0)|, tried first at t.

    When `evaluations` are used up before, the best point that has the first property, which may be `start`. A c2 near
    zero makes the search exact. Cubic interpolation: on a quadratic the second point is the minimizer.
    """

    def too_high(point: Point) -> bool:
        return not point.loss <= start.loss + c1 * point.t * start.slope  # true for nan

    low, high = start, None
    while evaluations > 0:
        point = evaluate(t)
        evaluations -= 1
        if too_high(point) or (low.t > 0 and point.loss >= low.loss):
            high = point
            break
        if abs(point.slope) <= -c2 * start.slope:
            return point
        if point.slope >= 0:
            low, high = point, low
            break
        guess = _minimizer(low, point)
        longest = point.t + 9 * (point.t - low.t)
        t = longest if guess is None or guess <= point.t else min(max(guess, 1.01 * point.t), longest)
        low = point
    if high is None:
        return low

    # low has the first property and the lowest loss so far; a minimizer lies between low and high
    width, bisect = math.inf, False
    while evaluations > 0 and abs(high.t - low.t) > 1e-12 * max(low.t, high.t):
        point = evaluate(_between(low, high, bisect))
        evaluations -= 1
        if too_high(point) or point.loss >= low.loss:
            high = point
        else:
            if abs(point.slope) <= -c2 * start.slope:
                return point
            if point.slope * (high.t - low.t) >= 0:
                high = low
            low = point
        bisect = abs(high.t - low.t) > 0.66 * width  # interpolation creeps along one end
        width = abs(high.t - low.t)
    return low


def _between(low: Point, high: Point, bisect: bool) -> float:
    """The interpolated minimizer when it lies between the two, else their middle."""
    guess = None if bisect else _minimizer(low, high)
    a, b = min(low.t, high.t), max(low.t, high.t)
    margin = 1e-3 * (b - a)
    return guess if guess is not None and a + margin < guess < b - margin else 0.5 * (a + b)


def _minimizer(a: Point, b: Point) -> float | None:
    """The minimizer of the cubic through losses and slopes of two points (eq. 3.59), None where there is none."""
    if not (math.isfinite(b.loss) and math.isfinite(b.slope) and a.t != b.t):
        return None
    d1 = a.slope + b.slope - 3 * (a.loss - b.loss) / (a.t - b.t)
    square = d1 * d1 - a.slope * b.slope
    if square < 0:
        return None
    d2 = math.copysign(math.sqrt(square), b.t - a.t)
    below = b.slope - a.slope + 2 * d2
    return b.t - (b.t - a.t) * (b.slope + d2 - d1) / below if below else None
