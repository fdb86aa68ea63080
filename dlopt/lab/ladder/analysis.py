"""Analysis of a ladder: fitted scaling laws, speed-ups with 95 % intervals, the held-out rung. Pure functions.

The bootstrap draws rungs with replacement, and within each one seed fewer than there are, because the variance of n
draws of n seeds is too small by (n - 1) / n. All optimizers share the draws: runs of a seed start from the same weights
and see the same batches. Percentiles are corrected as if the draws had Student's t distribution (Hesterberg, What
teachers should know about the bootstrap, The American Statistician 69, 2015). Fewer than four rungs give no intervals
of the laws: seeds alone say nothing about the fit, and such intervals exclude the truth in up to half of the cases.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dlopt.lab.benchmark.scores import Interval, interval
from dlopt.lab.ladder.scaling_laws import Array, ScalingLaws, fit_scaling_laws
from dlopt.results.intervals import mean_difference

RESAMPLES = 300
FEWEST = 4
"""Rungs from which on the laws have intervals."""
HELD_OUT = FEWEST + 1
"""Rungs from which on the largest is predicted by the others."""
_LARGEST = 0.999  # irreducible loss as a fraction of the smallest loss


UNKNOWN = Interval(math.nan, math.nan, math.nan)


@dataclass(frozen=True)
class RungLosses:
    """The runs of a ladder at the best rates.

    Attributes:
        compute: of each rung, FLOPs, ascending.
        losses: optimizer -> [rungs, seeds]; NaN: missing or failed. The first optimizer is the baseline.
        seconds: optimizer -> median seconds of training of each rung; NaN: unknown.
    """

    rungs: Sequence[str]
    compute: Sequence[float]
    losses: Mapping[str, Array]
    seconds: Mapping[str, Sequence[float]] = field(default_factory=dict)

    @property
    def baseline(self) -> str:
        return next(iter(self.losses))

    def without_largest(self) -> "RungLosses":
        losses = {name: each[:-1] for name, each in self.losses.items()}
        return RungLosses(self.rungs[:-1], self.compute[:-1], losses)


@dataclass(frozen=True)
class Prediction:
    """The loss of the largest rung, predicted by the laws of the others, and the mean loss measured."""

    predicted: Interval
    measured: float

    @property
    def holds(self) -> bool:
        return self.predicted.low <= self.measured <= self.predicted.high


@dataclass(frozen=True)
class Gain:
    """An optimizer compared with the baseline, by rung.

    Attributes:
        speed_up: compute of the baseline for the same loss, over the optimizer's compute, by the laws. The
            intervals hold at all rungs together.
        interpolated: the same between the measured losses of the baseline; NaN: beyond them.
        difference: mean loss minus the baseline's, over common seeds, with a 95 % interval of Student's t.
        trend: exponent with which the speed-up grows with compute; negative: it shrinks.
        change: the last of `interpolated` over the first, paired by seed.
    """

    speed_up: Sequence[Interval]
    interpolated: Sequence[Interval]
    difference: Sequence[Interval]
    trend: Interval
    change: Interval = UNKNOWN

    @property
    def is_distinguishable(self) -> bool:
        """Whether the speed-up differs from 1 at a rung, by the intervals of all rungs together."""
        return any(each.low > 1 or each.high < 1 for each in self.speed_up)

    @property
    def contradicted(self) -> list[int]:
        """Rungs, of the smallest and the largest, at which the laws differ from the paired losses.

        There the interval of the speed-up excludes 1, and that of the difference contains 0 or has the other sign.
        """
        found = []
        for i in (0, len(self.speed_up) - 1):
            by_laws, paired = self.speed_up[i], self.difference[i]
            if (by_laws.low > 1 and paired.high >= 0) or (by_laws.high < 1 and paired.low <= 0):
                found.append(i)
        return found


@dataclass(frozen=True)
class Analysis:
    """What a ladder shows.

    Attributes:
        mean: optimizer -> mean loss of each rung; NaN: no run.
        gains: of all optimizers but the baseline.
        predictions: by optimizer; empty with fewer than `HELD_OUT` rungs.
    """

    measured: RungLosses
    mean: Mapping[str, Sequence[float]]
    scaling_laws: ScalingLaws
    irreducible: Interval
    exponents: Mapping[str, Interval]
    gains: Mapping[str, Gain]
    predictions: Mapping[str, Prediction]


def analyze(measured: RungLosses, *, resamples: int = RESAMPLES) -> Analysis | None:
    """Returns the analysis of the optimizers with at least two rungs; None if the baseline is not one of them."""
    usable = {name: each for name, each in measured.losses.items() if np.isfinite(each).any(axis=1).sum() > 1}
    if measured.baseline not in usable:
        return None
    measured = RungLosses(measured.rungs, measured.compute, usable, measured.seconds)
    laws, drawn = _fits(measured, resamples)
    names, base, tail = list(usable), measured.baseline, _tail(measured)
    irreducible = interval(laws.irreducible, np.array([each.irreducible for each in drawn]), tail)
    return Analysis(
        measured,
        {name: [_mean(row) for row in usable[name]] for name in names},
        laws,
        irreducible,
        {
            name: interval(laws.curves[name].exponent, np.array([each.curves[name].exponent for each in drawn]), tail)
            for name in names
        },
        {name: _gain(measured, laws, drawn, name, irreducible) for name in names if name != base},
        _predictions(measured, resamples) if len(measured.rungs) >= HELD_OUT else {},
    )


def _mean(row: Array) -> float:
    known = row[np.isfinite(row)]
    return float(known.mean()) if known.size else math.nan


def _seeds(measured: RungLosses) -> int:
    return max(each.shape[1] for each in measured.losses.values())


def _tail(measured: RungLosses) -> float:
    """Returns the fraction of the draws below an interval: Phi(-t), the 97.5 % point t with a degree per free run."""
    from scipy.stats import norm, t

    rungs = len(measured.rungs)
    freedom = max(rungs * (_seeds(measured) - 1), rungs - 2, 1)
    return float(norm.sf(t.isf(0.025, freedom)))


def _fits(measured: RungLosses, resamples: int) -> tuple[ScalingLaws, list[ScalingLaws]]:
    """Returns the laws of all runs, and of each resample; none with fewer than `FEWEST` rungs."""
    seeds, rungs = _seeds(measured), np.arange(len(measured.rungs))
    laws = fit_scaling_laws(_points(measured, np.repeat(rungs, seeds), np.tile(np.arange(seeds), len(rungs))))
    rng, drawn, count = np.random.default_rng(0), [], max(seeds - 1, 1)
    for _ in range(resamples if len(rungs) >= FEWEST else 0):
        chosen = rng.choice(rungs, len(rungs))
        while len(np.unique(chosen)) < 3:  # fewer do not identify a law
            chosen = rng.choice(rungs, len(rungs))
        points = _points(measured, np.repeat(chosen, count), rng.integers(seeds, size=len(chosen) * count))
        if all(len(np.unique(compute)) >= 3 for compute, _ in points.values()):
            drawn.append(fit_scaling_laws(points, start=laws))
    return laws, drawn


def _points(measured: RungLosses, rungs: NDArray[Any], seeds: NDArray[Any]) -> dict[str, tuple[Array, Array]]:
    compute = np.asarray(measured.compute)[rungs]
    found = {}
    for name, table in measured.losses.items():
        loss = np.pad(table, ((0, 0), (0, max(0, int(seeds.max()) + 1 - table.shape[1]))), constant_values=np.nan)
        values = loss[rungs, seeds]
        known = np.isfinite(values)
        found[name] = compute[known], values[known]
    return found


def _gain(
    measured: RungLosses, laws: ScalingLaws, drawn: Sequence[ScalingLaws], name: str, irreducible: Interval
) -> Gain:
    base, tail = measured.baseline, _tail(measured)
    values = [laws.speed_up(name, base, compute) for compute in measured.compute]
    replicas = np.array([[each.speed_up(name, base, compute) for compute in measured.compute] for each in drawn])
    differences = [
        difference(own, other) for own, other in zip(measured.losses[name], measured.losses[base], strict=True)
    ]
    trend = interval(laws.trend(name, base), np.array([each.trend(name, base) for each in drawn]), tail)
    interpolated, change = _interpolated(measured, name, irreducible)
    return Gain(band(values, replicas, tail), interpolated, differences, trend, change)


def band(values: Sequence[float], replicas: Array, tail: float) -> list[Interval]:
    """Returns percentile intervals that contain all values of a replica together, in all but 2 `tail` of the replicas.

    `replicas`: [draws, values]. The intervals are from Besag et al., Bayesian computation and stochastic systems,
    Statistical Science 10, 1995, section 6.3: the ranks of a replica are compared with their most extreme one.
    """
    known = replicas[np.isfinite(replicas).all(axis=1)] if replicas.size else replicas
    if not len(known):
        return [Interval(value, math.nan, math.nan) for value in values]
    ranks = (known.argsort(axis=0).argsort(axis=0) + 0.5) / len(known)
    extreme = float(np.quantile(np.abs(ranks - 0.5).max(axis=1), 1 - 2 * tail))
    low, high = np.quantile(known, [0.5 - extreme, 0.5 + extreme], axis=0)
    return [Interval(*each) for each in zip(values, low.tolist(), high.tolist(), strict=True)]


def _interpolated(measured: RungLosses, name: str, irreducible: Interval) -> tuple[list[Interval], Interval]:
    """Returns the speed-up at each rung, and the last one over the first.

    The baseline's log(L - E) is interpolated linearly over log compute. A power of the compute is then a line; with
    E = 0, chords lie above a curve that has a floor, and the speed-up is biased upwards. The interval is the union of
    those at E and at the ends of its interval, each Student's t of the seeds; there is none without an interval of E.
    """
    from scipy.stats import t

    own, base = measured.losses[name], measured.losses[measured.baseline]
    seeds = min(own.shape[1], base.shape[1])
    own, base = own[:, :seeds], base[:, :seeds]
    unknown = [UNKNOWN] * len(own)
    ended = np.flatnonzero(np.isfinite(base).all(axis=1))
    if len(ended) < 2:
        return unknown, UNKNOWN
    losses = own.mean(axis=1)
    base_losses = base[ended].mean(axis=1)
    is_reached = (base_losses.min() <= losses) & (losses <= base_losses.max())
    if not is_reached.any():
        return unknown, UNKNOWN
    first, last = np.flatnonzero(is_reached)[[0, -1]]

    has_interval = seeds > 1 and not math.isnan(irreducible.low)
    floors = [irreducible.value]
    if has_interval:
        floors += [irreducible.low, irreducible.high]
    largest = _LARGEST * min(np.nanmin(own), np.nanmin(base))
    centres, halves = [], []
    for floor in floors:
        log_speed_ups = _log_speed_ups(np.log(measured.compute), own, base, ended, min(floor, largest))
        log_change = log_speed_ups[:, last] - log_speed_ups[:, first]
        values = np.column_stack([log_speed_ups, log_change])
        centres.append(values[0])
        if has_interval:
            halves.append(t.isf(0.025, seeds - 1) * values[1:].std(axis=0, ddof=1) / math.sqrt(seeds))

    centre = np.exp(np.clip(centres[0], -50, 50))
    low = high = np.full(len(centre), np.nan)
    if has_interval:
        low = np.exp(np.clip(np.min(np.subtract(centres, halves), axis=0), -50, 50))
        high = np.exp(np.clip(np.max(np.add(centres, halves), axis=0), -50, 50))
    *rungs, change = map(Interval, centre.tolist(), low.tolist(), high.tolist())
    known = [each if reached else UNKNOWN for each, reached in zip(rungs, is_reached, strict=True)]
    return known, change if last > first else UNKNOWN


def _log_speed_ups(x: Array, own: Array, base: Array, ended: NDArray[np.intp], floor: float) -> Array:
    """Returns the logarithms of the speed-ups, [1 + seeds, rungs]: of the mean over seeds, then of each seed.

    Args:
        x: log compute of the rungs.
        own, base: losses of the optimizer and of the baseline, [rungs, seeds].
        ended: indices of the rungs that the baseline is interpolated between.
        floor: the irreducible loss.
    """
    own_excess = np.log(np.column_stack([own.mean(axis=1), own]) - floor)
    base_excess = np.log(np.column_stack([base.mean(axis=1), base]) - floor)
    rows = []
    for targets, curve in zip(own_excess.T, base_excess.T, strict=True):
        needed = [_compute_for(target, x[ended], curve[ended]) for target in targets]
        rows.append(needed - x)
    return np.array(rows)


def _compute_for(target: float, x: Array, y: Array) -> float:
    """Returns where the curve through (x, y) falls to `target`; beyond its ends, its last piece continues.

    Noise may make a larger rung worse; the curve is then the best loss so far, with a negligible slope.
    """
    falling = np.minimum.accumulate(y) - 1e-9 * np.arange(len(y))
    i = min(max(int(np.searchsorted(-falling, -target)), 1), len(y) - 1)
    part = (target - falling[i - 1]) / (falling[i] - falling[i - 1])
    return float(x[i - 1] + part * (x[i] - x[i - 1]))


def difference(own: Array, base: Array) -> Interval:
    """Returns the mean difference of the losses of common seeds with the 95 % interval of a paired t-test."""
    count = min(len(own), len(base))
    values = own[:count] - base[:count]
    found = mean_difference(values[np.isfinite(values)].tolist())
    if found is None or found.low is None or found.high is None:
        return Interval(math.nan if found is None else found.mean, math.nan, math.nan)
    return Interval(found.mean, found.low, found.high)


def _predictions(measured: RungLosses, resamples: int) -> dict[str, Prediction]:
    """Fits all rungs but the largest and predicts the mean loss of the largest, the noise of its seeds included."""
    smaller = measured.without_largest()
    if any(np.isfinite(each).any(axis=1).sum() < 3 for each in smaller.losses.values()):
        return {}
    laws, drawn = _fits(smaller, resamples)
    compute, rng, found = measured.compute[-1], np.random.default_rng(1), {}
    for name, table in measured.losses.items():
        last = table[-1][np.isfinite(table[-1])]
        if not last.size:
            continue
        noise = _noise(smaller.losses[name])
        drawn_noise = rng.choice(noise, (len(drawn), len(last))).mean(axis=1) if noise.size else np.zeros(len(drawn))
        values = np.array([each.loss(name, compute) for each in drawn]) * np.exp(drawn_noise)
        found[name] = Prediction(interval(laws.loss(name, compute), values, _tail(smaller)), float(last.mean()))
    return found


def _noise(table: Array) -> Array:
    """Returns the deviations of log losses from their rung's mean, scaled to the variance of single runs."""
    found = []
    for row in np.log(table):
        known = row[np.isfinite(row)]
        if len(known) > 1:
            found.append((known - known.mean()) * math.sqrt(len(known) / (len(known) - 1)))
    return np.concatenate(found) if found else np.array([])
