"""Line searches along x + t d, for methods that evaluate the loss several times per step.

Nocedal & Wright, Numerical Optimization, 2nd ed.: algorithms 3.1 (backtracking), 3.5 and 3.6 (strong Wolfe conditions).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass
class LinePoint:
    """Loss, slope along the line, and gradient [n] at step length t."""

    t: float
    loss: float
    slope: float
    gradient: Tensor


def backtracking(
    loss_at: Callable[[float], float], *, loss: float, slope: float, t: float, c1: float, evaluations: int
) -> float:
    """Returns the first of t, t/2, t/4, ... with loss(t) <= loss + c1 t slope; 0 if `evaluations` of them fail."""
    for _ in range(evaluations):
        if loss_at(t) <= loss + c1 * t * slope:  # False for NaN
            return t
        t *= 0.5
    return 0.0


def strong_wolfe(
    evaluate: Callable[[float], LinePoint], start: LinePoint, t: float, *, c1: float, c2: float, evaluations: int
) -> LinePoint:
    """Finds a point with loss(t) <= loss(0) + c1 t slope(0) and |slope(t)| <= c2 |slope(0)|; tries t first.

    After `evaluations` without success returns the best point with sufficient decrease (the first condition), which may
    be `start`. A c2 near zero makes the search exact. Cubic interpolation: on a quadratic the second point is the
    minimizer.
    """

    def too_high(point: LinePoint) -> bool:
        return not point.loss <= start.loss + c1 * point.t * start.slope  # True for NaN

    # Bracketing (algorithm 3.5): increase t until a minimizer lies between two points.
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

    # Zoom (algorithm 3.6): `low` has sufficient decrease and the lowest loss so far; a minimizer is between the two.
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
        bisect = abs(high.t - low.t) > 0.66 * width  # interpolation shrinks the interval too slowly
        width = abs(high.t - low.t)
    return low


def _between(low: LinePoint, high: LinePoint, bisect: bool) -> float:
    """Returns the interpolated minimizer if it is well inside the interval, else the midpoint."""
    guess = None if bisect else _minimizer(low, high)
    a, b = min(low.t, high.t), max(low.t, high.t)
    margin = 1e-3 * (b - a)
    return guess if guess is not None and a + margin < guess < b - margin else 0.5 * (a + b)


def _minimizer(a: LinePoint, b: LinePoint) -> float | None:
    """Returns the minimizer of the cubic through the losses and slopes of two points (eq. 3.59), or None."""
    if not (math.isfinite(b.loss) and math.isfinite(b.slope) and a.t != b.t):
        return None
    d1 = a.slope + b.slope - 3 * (a.loss - b.loss) / (a.t - b.t)
    square = d1 * d1 - a.slope * b.slope
    if square < 0:
        return None
    d2 = math.copysign(math.sqrt(square), b.t - a.t)
    denominator = b.slope - a.slope + 2 * d2
    return b.t - (b.t - a.t) * (b.slope + d2 - d1) / denominator if denominator else None
