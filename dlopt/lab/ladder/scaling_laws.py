"""Scaling laws of the loss: L = E + A C^-a for each optimizer, with an irreducible loss E that all of them share.

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
class PowerLaw:
    """The power law A C^-a of an optimizer, as exp(log_scale) C^-exponent."""

    log_scale: float
    exponent: float


@dataclass(frozen=True)
class ScalingLaws:
    """The fitted scaling laws of all optimizers. `irreducible`: the shared E. `objective`: the sum of Huber losses."""

    irreducible: float
    curves: Mapping[str, PowerLaw]
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


def fit_scaling_laws(points: Points, *, start: ScalingLaws | None = None) -> ScalingLaws:
    """Fits the scaling laws. `start`: parameters of a fit to similar points, to start from these only.

    Raises:
        ValueError: an optimizer has points at fewer than two values of compute.
    """
    from scipy.optimize import least_squares

    different = [len(np.unique(compute)) for compute, _ in points.values()]
    if min(different) < 2:
        raise ValueError("a law needs at least two rungs")
    has_constant = min(different) > 2

    # All points in one row; `group` is the number of the optimizer of each. log C is centred, for the conditioning.
    compute = np.concatenate([each for each, _ in points.values()])
    loss = np.concatenate([each for _, each in points.values()])
    group = np.repeat(np.arange(len(points)), [len(each) for each, _ in points.values()])
    middle = float(np.log(compute).mean())
    x, y = np.log(compute) - middle, np.log(loss)
    rows = np.arange(len(x))

    # The parameters are [E, log scale, exponent, log scale, exponent, ...].
    largest = _LARGEST * float(loss.min())
    low = [0.0, *[-math.inf, 0.0] * len(points)]
    high = [largest, *[math.inf, 5.0] * len(points)]

    def terms(values: Array) -> tuple[Array, Array]:
        """Returns A C^-a and the loss of each point."""
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

    def initial(constant: float) -> Array:
        """Returns the lines through the logarithms of the losses above E = `constant`."""
        values = [constant]
        for i in range(len(points)):
            slope, intercept = np.polyfit(x[group == i], np.log(loss[group == i] - constant), 1)
            values += [intercept, min(max(-slope, 1e-3), 4.9)]
        return np.array(values)

    def parameters_of(laws: ScalingLaws) -> Array:
        values = [min(laws.irreducible, 0.99 * largest) * has_constant]
        for name in points:
            curve = laws.curves[name]
            values += [curve.log_scale - curve.exponent * middle, curve.exponent]
        return np.array(values)

    if start is not None:
        starts = [parameters_of(start)]
        tolerance, evaluations = 1e-8, 60
    else:
        fractions = _STARTS if has_constant else (0.0,)
        starts = [initial(fraction * largest) for fraction in fractions]
        tolerance, evaluations = 1e-12, 2000
    fits = [
        least_squares(
            residuals, np.clip(values, low, high), jacobian, (low, high), loss="huber", f_scale=DELTA, x_scale="jac",
            ftol=tolerance, xtol=tolerance, gtol=None, max_nfev=evaluations,
        )
        for values in starts
    ]  # fmt: skip
    best = min(fits, key=lambda fit: fit.cost)

    curves = {}
    for i, name in enumerate(points):
        scale, exponent = best.x[1 + 2 * i], best.x[2 + 2 * i]
        curves[name] = PowerLaw(float(scale + exponent * middle), float(exponent))
    return ScalingLaws(float(best.x[0]) if has_constant else 0.0, curves, float(best.cost))
