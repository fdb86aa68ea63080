"""Laws of the loss: L = E + A C^-a for each optimizer, with an irreducible loss E that all of them share.

E is a property of the data and the family, and a few rungs do not identify it for each optimizer alone. Two rungs do
not identify it at all: E is then 0. As in Hoffmann et al. 2022 (Training compute-optimal large language models,
equation 3), the fit minimizes the sum of Huber losses of the residuals of log L, but with delta = 0.1 instead of 0.001:
with so few runs, losses that are nearly absolute values have no single minimum.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DELTA = 0.1
_STARTS = (0.0, 0.5, 0.9)  # of E, as fractions of the smallest loss
_LARGEST = 0.999  # E as a fraction of the smallest loss
Array = NDArray[np.float64]
Points = Mapping[str, tuple[Array, Array]]
"""optimizer -> (compute [N], loss [N])."""


@dataclass(frozen=True)
class Curve:
    """A C^-a of an optimizer, as exp(log_scale) C^-exponent."""

    log_scale: float
    exponent: float


@dataclass(frozen=True)
class Laws:
    """The fitted laws of all optimizers. `irreducible`: the shared E. `objective`: the sum of Huber losses."""

    irreducible: float
    curves: Mapping[str, Curve]
    objective: float

    def loss(self, optimizer: str, compute: float) -> float:
        curve = self.curves[optimizer]
        return self.irreducible + math.exp(curve.log_scale - curve.exponent * math.log(compute))

    def speed_up(self, optimizer: str, baseline: str, compute: float) -> float:
        """Returns how many times `compute` the baseline needs for the loss of `optimizer` at `compute`."""
        own, base = self.curves[optimizer], self.curves[baseline]
        if base.exponent <= 0:
            return math.nan
        log_excess = own.log_scale - own.exponent * math.log(compute)
        exponent = (base.log_scale - log_excess) / base.exponent - math.log(compute)
        return math.exp(min(max(exponent, -50.0), 50.0))

    def trend(self, optimizer: str, baseline: str) -> float:
        """Returns the exponent with which the speed-up grows with compute; negative: it shrinks."""
        base = self.curves[baseline].exponent
        return self.curves[optimizer].exponent / base - 1 if base > 0 else math.nan


def fit_laws(points: Points, *, start: Laws | None = None) -> Laws:
    """Fits the laws. `start`: parameters of a fit to similar points, to start from these only.

    Raises:
        ValueError: an optimizer has points at fewer than two values of compute.
    """
    from scipy.optimize import least_squares

    names = list(points)
    if any(len(np.unique(compute)) < 2 for compute, _ in points.values()):
        raise ValueError("a law needs at least two rungs")
    has_constant = all(len(np.unique(compute)) > 2 for compute, _ in points.values())
    compute = np.concatenate([points[name][0] for name in names])
    loss = np.concatenate([points[name][1] for name in names])
    group = np.repeat(np.arange(len(names)), [len(points[name][0]) for name in names])
    middle = float(np.log(compute).mean())
    x, y = np.log(compute) - middle, np.log(loss)
    rows = np.arange(len(x))

    def terms(values: Array) -> tuple[Array, Array]:
        scale, exponent = values[1::2][group], values[2::2][group]
        term = np.exp(np.clip(scale - exponent * x, -60, 60))
        return term, values[0] * has_constant + term

    def residuals(values: Array) -> Array:
        return np.log(terms(values)[1]) - y

    def jacobian(values: Array) -> Array:
        term, total = terms(values)
        matrix = np.zeros((len(x), len(values)))
        matrix[:, 0] = has_constant / total
        matrix[rows, 1 + 2 * group] = term / total
        matrix[rows, 2 + 2 * group] = -x * term / total
        return matrix

    largest = _LARGEST * float(loss.min())
    low = [0.0, *[-math.inf, 0.0] * len(names)]
    high = [largest, *[math.inf, 5.0] * len(names)]

    def initial(constant: float) -> Array:
        values = [constant]
        for i in range(len(names)):
            slope, intercept = np.polyfit(x[group == i], np.log(loss[group == i] - constant), 1)
            values += [intercept, min(max(-slope, 1e-3), 4.9)]
        return np.array(values)

    if start is None:
        starts = [initial(fraction * largest) for fraction in (_STARTS if has_constant else (0.0,))]
    else:
        known = [start.curves[name] for name in names]
        flat = [value for each in known for value in (each.log_scale - each.exponent * middle, each.exponent)]
        starts = [np.array([min(start.irreducible, 0.99 * largest) * has_constant, *flat])]
    found = [
        least_squares(
            residuals, np.clip(each, low, high), jacobian, (low, high), loss="huber", f_scale=DELTA, x_scale="jac",
            ftol=1e-12 if start is None else 1e-8, xtol=1e-12 if start is None else 1e-8, gtol=None,
            max_nfev=2000 if start is None else 60,
        )
        for each in starts
    ]  # fmt: skip
    best = min(found, key=lambda each: each.cost)
    curves = {
        name: Curve(float(best.x[1 + 2 * i] + best.x[2 + 2 * i] * middle), float(best.x[2 + 2 * i]))
        for i, name in enumerate(names)
    }
    return Laws(float(best.x[0]) if has_constant else 0.0, curves, float(best.cost))
