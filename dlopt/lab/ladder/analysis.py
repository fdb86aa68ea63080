"""Analysis of a ladder: fitted laws, speed-ups with bootstrap intervals, the held-out rung. Pure functions.

The bootstrap draws rungs with replacement, and within each the seeds; all optimizers share the draws, because runs of a
seed start from the same weights and see the same batches. With three rungs or fewer, only seeds are drawn. An interval
contains 95 % of the draws.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dlopt.lab.benchmark.scores import Interval, interval
from dlopt.lab.ladder.laws import Array, Laws, fit_laws

RESAMPLES = 300
_DRAWS_RUNGS = 4  # rungs from which the bootstrap draws them
HELD_OUT = 4
"""Rungs from which the largest is predicted by the others."""


@dataclass(frozen=True)
class Measured:
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

    def without_largest(self) -> "Measured":
        losses = {name: each[:-1] for name, each in self.losses.items()}
        return Measured(self.rungs[:-1], self.compute[:-1], losses)


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
        speed_up: compute that the baseline needs for the same loss, over that of the optimizer, by the laws.
        interpolated: the same between the measured losses of the baseline, without a law; NaN: beyond them. The
            intervals come from seeds alone.
        speed_up_in_time: multiplied by the baseline's time of an update over the optimizer's; None: unknown.
        difference: mean loss minus the baseline's, over common seeds, with a 95 % interval of Student's t.
        trend: exponent with which the speed-up grows with compute; negative: it shrinks.
    """

    speed_up: Sequence[Interval]
    interpolated: Sequence[Interval]
    speed_up_in_time: Sequence[float | None]
    difference: Sequence[Interval]
    trend: Interval


@dataclass(frozen=True)
class Analysis:
    """What a ladder shows.

    Attributes:
        mean: optimizer -> mean loss of each rung; NaN: no run.
        gains: of all optimizers but the baseline.
        predictions: by optimizer; empty with fewer than four rungs.
        draws_rungs: the bootstrap has drawn rungs as well as seeds.
    """

    measured: Measured
    mean: Mapping[str, Sequence[float]]
    laws: Laws
    irreducible: Interval
    exponents: Mapping[str, Interval]
    gains: Mapping[str, Gain]
    predictions: Mapping[str, Prediction]
    draws_rungs: bool


def analyze(measured: Measured, *, resamples: int = RESAMPLES) -> Analysis | None:
    """Returns the analysis of the optimizers with at least two rungs; None if the baseline is not one of them."""
    usable = {name: each for name, each in measured.losses.items() if np.isfinite(each).any(axis=1).sum() > 1}
    if measured.baseline not in usable:
        return None
    measured = Measured(measured.rungs, measured.compute, usable, measured.seconds)
    laws, drawn = _fits(measured, resamples)
    names, base = list(usable), measured.baseline
    return Analysis(
        measured,
        {name: [_mean(row) for row in usable[name]] for name in names},
        laws,
        interval(laws.irreducible, np.array([each.irreducible for each in drawn])),
        {
            name: interval(laws.curves[name].exponent, np.array([each.curves[name].exponent for each in drawn]))
            for name in names
        },
        {name: _gain(measured, laws, drawn, name, resamples) for name in names if name != base},
        _predictions(measured, resamples) if len(measured.rungs) >= HELD_OUT else {},
        len(measured.rungs) >= _DRAWS_RUNGS,
    )


def _mean(row: Array) -> float:
    known = row[np.isfinite(row)]
    return float(known.mean()) if known.size else math.nan


def _fits(measured: Measured, resamples: int) -> tuple[Laws, list[Laws]]:
    """Returns the laws of all runs, and those of each resample."""
    seeds = max(each.shape[1] for each in measured.losses.values())
    rungs = np.arange(len(measured.rungs))
    everything = np.repeat(rungs, seeds), np.tile(np.arange(seeds), len(rungs))
    laws = fit_laws(_points(measured, *everything))
    rng = np.random.default_rng(0)
    drawn = []
    if seeds < 2 and len(rungs) < _DRAWS_RUNGS:
        return laws, []
    for _ in range(resamples):
        chosen = rungs
        if len(rungs) >= _DRAWS_RUNGS:
            chosen = rng.choice(rungs, len(rungs))
            while len(np.unique(chosen)) < 3:  # fewer do not identify a law
                chosen = rng.choice(rungs, len(rungs))
        pairs = np.repeat(chosen, seeds), rng.integers(seeds, size=len(chosen) * seeds)
        points = _points(measured, *pairs)
        if all(len(np.unique(compute)) >= min(3, len(rungs)) for compute, _ in points.values()):
            drawn.append(fit_laws(points, start=laws))
    return laws, drawn


def _points(measured: Measured, rungs: NDArray[Any], seeds: NDArray[Any]) -> dict[str, tuple[Array, Array]]:
    compute = np.asarray(measured.compute)[rungs]
    found = {}
    for name, table in measured.losses.items():
        loss = np.pad(table, ((0, 0), (0, max(0, int(seeds.max()) + 1 - table.shape[1]))), constant_values=np.nan)
        values = loss[rungs, seeds]
        known = np.isfinite(values)
        found[name] = compute[known], values[known]
    return found


def _gain(measured: Measured, laws: Laws, drawn: Sequence[Laws], name: str, resamples: int) -> Gain:
    base = measured.baseline
    speed_ups = [
        interval(laws.speed_up(name, base, compute), np.array([each.speed_up(name, base, compute) for each in drawn]))
        for compute in measured.compute
    ]
    times: list[float | None] = []
    for i, speed_up in enumerate(speed_ups):
        known = [measured.seconds[each][i] for each in (base, name) if each in measured.seconds]
        ratio = known[0] / known[1] if len(known) == 2 and known[1] else math.nan
        times.append(speed_up.value * ratio if math.isfinite(ratio) else None)
    differences = [
        difference(own, other) for own, other in zip(measured.losses[name], measured.losses[base], strict=True)
    ]
    trend = interval(laws.trend(name, base), np.array([each.trend(name, base) for each in drawn]))
    return Gain(speed_ups, _interpolated(measured, name, resamples), times, differences, trend)


def _interpolated(measured: Measured, name: str, resamples: int) -> list[Interval]:
    """Returns the speed-up at each rung, by linear interpolation of the baseline's log loss over log compute."""
    seeds = min(each.shape[1] for each in (measured.losses[name], measured.losses[measured.baseline]))
    own, base = (measured.losses[each][:, :seeds] for each in (name, measured.baseline))
    ended = np.isfinite(base).all(axis=1)
    unknown = [Interval(math.nan, math.nan, math.nan)] * len(own)
    if ended.sum() < 2:
        return unknown
    x, count = np.log(measured.compute), resamples if seeds > 1 else 0
    draws = np.random.default_rng(2).integers(seeds, size=(count, len(own), seeds))
    ratios = []
    for drawn in [np.tile(np.arange(seeds), (len(own), 1)), *draws]:  # first the runs themselves
        losses, curve = (np.log(np.take_along_axis(each, drawn, 1).mean(axis=1)) for each in (own, base))
        ratios.append([_compute_for(loss, x[ended], curve[ended]) for loss in losses] - x)
    values = np.exp(np.clip(ratios, -50, 50))
    losses, curve = own.mean(axis=1), base[ended].mean(axis=1)
    is_reached = (curve.min() <= losses) & (losses <= curve.max())
    return [interval(values[0, i], values[1:, i]) if is_reached[i] else unknown[i] for i in range(len(own))]


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
    from scipy.stats import t

    count = min(len(own), len(base))
    values = own[:count] - base[:count]
    values = values[np.isfinite(values)]
    if not values.size:
        return Interval(math.nan, math.nan, math.nan)
    mean = float(values.mean())
    if len(values) < 2:
        return Interval(mean, math.nan, math.nan)
    half = float(t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))
    return Interval(mean, mean - half, mean + half)


def _predictions(measured: Measured, resamples: int) -> dict[str, Prediction]:
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
        found[name] = Prediction(interval(laws.loss(name, compute), values), float(last.mean()))
    return found


def _noise(table: Array) -> Array:
    """Returns the deviations of log losses from their rung's mean, scaled to the variance of single runs."""
    found = []
    for row in np.log(table):
        known = row[np.isfinite(row)]
        if len(known) > 1:
            found.append((known - known.mean()) * math.sqrt(len(known) / (len(known) - 1)))
    return np.concatenate(found) if found else np.array([])
