"""Scores of a benchmark: performance profiles and their integral (Dolan & More 2002; Dahl et al. 2023, AlgoPerf).

The time of an optimizer on a workload is the median over its studies of the time of the study's fastest trial. The
performance ratio is this time over the fastest optimizer's; a ratio above `MAX_RATIO` counts as not reached. The
profile at tau is the fraction of workloads with a ratio of at most tau, and the score is the normalized integral of the
profile over tau in [1, MAX_RATIO]: 1 for the fastest optimizer on all workloads, 0 for one that reaches no target.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from statistics import median

import numpy as np
from numpy.typing import NDArray

from dlopt.lab.benchmark.results import MEASURES, Cell, Measure, Results, TrialRecord

MAX_RATIO = 4.0
RESAMPLES = 1000
_TAIL = 0.025  # of a 95 % interval
Array = NDArray[np.float64]
Times = Mapping[str, Mapping[str, float]]
"""optimizer -> workload -> time to the target; infinity: not reached."""


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval; NaN: there is none."""

    value: float
    low: float
    high: float

    @property
    def half(self) -> float:
        """Half the length of the interval."""
        return (self.high - self.low) / 2

    @property
    def distinguishable(self) -> bool:
        """Whether the interval of a difference excludes 0."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Standing:
    """Summary of an optimizer: its score with interval, and facts beside the score.

    Attributes:
        reached: workloads with a finite median over studies.
        sensitivity: fraction of all trials that reach their target.
        failed: fraction of the trials that failed (diverged, for example).
        cost: geometric mean over workloads of the time of an update relative to SGD's; None if not measured on all
            workloads that count.
        state: mean memory of the state relative to the parameters; None if not measured.
    """

    optimizer: str
    score: Interval
    reached: int
    sensitivity: float
    failed: float
    cost: float | None
    state: float | None


# -- times


def trial_time(record: TrialRecord, cell: Cell, measure: Measure) -> float:
    """Returns the time of a trial to its target; in `time`, the unit is an update of SGD on the same workload."""
    if measure == "evaluations":
        return record.evaluations
    if measure == "updates":
        return record.updates
    return math.inf if cell.cost is None else record.updates * cell.cost.time


def measured(results: Results) -> list[Measure]:
    """Returns the measures that the results have.

    Evaluations, if they differ from updates; time, if an optimizer has the costs of all workloads whose targets it
    reaches.
    """
    cells = results.cells.values()
    present = {
        "updates": True,
        "evaluations": any(each.evaluations != each.updates for cell in cells for each in cell.records),
        "time": any(_cost(results, optimizer)[0] is not None for optimizer in results.optimizers),
    }
    return [measure for measure in MEASURES if present[measure]]


def study_times(results: Results, optimizer: str, workload: str, measure: Measure) -> list[float]:
    """Returns the time of the fastest trial of each study; infinity for a study without a successful trial."""
    cell = results.cell(optimizer, workload)
    return [
        min((trial_time(record, cell, measure) for record in cell.study(study)), default=math.inf)
        for study in range(results.studies_of(optimizer))
    ]


def times(results: Results, measure: Measure) -> dict[str, dict[str, float]]:
    """Returns the median over studies by optimizer and workload; infinity unless more than half of them reached it."""
    return {
        optimizer: {
            workload: median(study_times(results, optimizer, workload, measure)) for workload in results.workloads
        }
        for optimizer in results.optimizers
    }


# -- profiles and scores


def ratios(times: Times) -> dict[str, dict[str, float]]:
    """Returns the performance ratios; infinity where the target was not reached, or the ratio is above `MAX_RATIO`."""
    rows = zip(times.items(), _ratios(_array(times)).tolist(), strict=True)
    return {optimizer: dict(zip(row, values, strict=True)) for (optimizer, row), values in rows}


def _array(times: Times) -> Array:
    """Returns the times as [optimizers, workloads]."""
    return np.array([[*row.values()] for row in times.values()], dtype=float)


def _ratios(times: Array) -> Array:
    """Returns the ratios to the fastest of the optimizers; `times`: [..., optimizers, workloads]."""
    with np.errstate(invalid="ignore"):  # NaN where no optimizer reached the target
        table = times / times.min(axis=-2, keepdims=True)
    return np.where(table <= MAX_RATIO, table, np.inf)


def profile(ratios: Mapping[str, float], taus: Sequence[float]) -> list[float]:
    """Returns the fraction of workloads with a ratio of at most tau, for each tau."""
    return [sum(ratio <= tau for ratio in ratios.values()) / len(ratios) for tau in taus]


def scores(times: Times) -> dict[str, float]:
    """Returns the integral of each profile over [1, MAX_RATIO] / (MAX_RATIO - 1)."""
    return dict(zip(times, map(float, profile_scores(_array(times))), strict=True))


def profile_scores(times: Array) -> Array:
    """Returns the scores of tables of times, [..., optimizers, workloads] -> [..., optimizers]."""
    return _scores(_ratios(times))


def _scores(ratios: Array) -> Array:
    """Integrates profiles in closed form; `ratios`: [..., workloads].

    A profile is a sum of steps: a workload with ratio r contributes (MAX_RATIO - r) / (MAX_RATIO - 1).
    """
    return np.maximum(MAX_RATIO - ratios, 0.0).mean(axis=-1) / (MAX_RATIO - 1)


# -- bootstrap over studies


def bootstrap(results: Results, measure: Measure, *, resamples: int = RESAMPLES) -> Array:
    """Returns tables of times, [resamples, optimizers, workloads], of studies drawn with replacement.

    The studies are drawn for each workload separately. All optimizers with the same number of studies share them,
    because trial k of study s has the same initial weights for all of them. One study has no spread: there are no
    tables, and the intervals are NaN.
    """
    counts = [results.studies_of(optimizer) for optimizer in results.optimizers]
    resamples = resamples if min(counts) > 1 else 0
    draws = np.random.default_rng(0).random((resamples, len(results.workloads), max(counts)))
    tables = []
    for optimizer, count in zip(results.optimizers, counts, strict=True):
        studies = [study_times(results, optimizer, workload, measure) for workload in results.workloads]
        drawn = (draws[..., :count] * count).astype(int)
        tables.append(np.median(np.take_along_axis(np.array([studies]), drawn, axis=-1), axis=-1))
    return np.stack(tables, axis=1)


def interval(value: float, replicas: Array, tail: float = _TAIL) -> Interval:
    """Returns `value` with the percentiles of its non-NaN replicas; `tail`: fraction below and above."""
    finite = replicas[~np.isnan(replicas)]
    if not finite.size:
        return Interval(value, math.nan, math.nan)
    low, high = np.quantile(finite, [tail, 1 - tail])
    return Interval(value, float(low), float(high))


def small_sample_factor(units: int, draws: int) -> float:
    """Returns by how much bootstrap deviations of a mean over `units` samples of `draws` values each are too small.

    The variance of the draws is too small by (draws - 1) / draws, and their quantiles are those of a normal instead of
    Student's t distribution with units (draws - 1) degrees of freedom (Hesterberg, What teachers should know about the
    bootstrap, The American Statistician 69, 2015).
    """
    from scipy.stats import norm, t

    return float(math.sqrt(draws / (draws - 1)) * t.isf(_TAIL, units * (draws - 1)) / norm.isf(_TAIL))


def symmetric_interval(value: float, replicas: Array, factor: float) -> Interval:
    """Returns `value` plus and minus the 95 % quantile of the replicas' distance from it times `factor`, within 0 to 1.

    Symmetric intervals also cover if the replicas are biased, as replicas of scores are (Hall, On symmetric bootstrap
    confidence intervals, Journal of the Royal Statistical Society B 50, 1988).
    """
    if not replicas.size:
        return Interval(value, math.nan, math.nan)
    half = factor * float(np.quantile(np.abs(replicas - value), 1 - 2 * _TAIL))
    return Interval(value, max(value - half, 0.0), min(value + half, 1.0))


def margin(replicas: Array, factor: float) -> float:
    """Returns the difference of two values that is distinguishable, corrected for the number of comparisons.

    The 95 % quantile of the range of the replicas' deviations from their means times `factor`; `replicas`: [draws,
    values]. It is Tukey's honest significant difference, with the bootstrap in place of the studentized range (Hsu,
    Multiple comparisons, 1996, chapter 5): where all values are equal, at most 5 % of the sets (0 to 2.5 % in
    simulations) have a difference that is larger, whichever pair of them is compared. NaN without replicas.
    """
    if not replicas.size:
        return math.nan
    deviations = replicas - replicas.mean(axis=0)
    return factor * float(np.quantile(np.ptp(deviations, axis=1), 1 - 2 * _TAIL))


def _factor(results: Results) -> float:
    studies = min(map(results.studies_of, results.optimizers))
    return small_sample_factor(len(results.workloads), studies) if studies > 1 else math.nan


def standings(results: Results, measure: Measure, replicas: Array) -> list[Standing]:
    """Returns the optimizers by descending score."""
    table = times(results, measure)
    own, drawn, factor = scores(table), profile_scores(replicas), _factor(results)
    rows = [
        Standing(
            optimizer,
            symmetric_interval(own[optimizer], drawn[:, i], factor),
            sum(math.isfinite(value) for value in table[optimizer].values()),
            _fraction(results, optimizer, lambda record: record.reached),
            _fraction(results, optimizer, lambda record: bool(record.failure)),
            *_cost(results, optimizer),
        )
        for i, optimizer in enumerate(results.optimizers)
    ]
    return sorted(rows, key=lambda row: (-row.score.value, -row.reached, -row.sensitivity, row.optimizer))


def _fraction(results: Results, optimizer: str, condition: Callable[[TrialRecord], bool]) -> float:
    records = results.records(optimizer)
    return sum(map(condition, records)) / len(records) if records else 0.0


def _cost(results: Results, optimizer: str) -> tuple[float | None, float | None]:
    """Returns the mean cost and state; None if a workload whose target was reached has no measured cost."""
    cells = [results.cell(optimizer, workload) for workload in results.workloads]
    costs = [cell.cost for cell in cells if cell.cost is not None]
    if not costs or any(cell.cost is None and any(record.reached for record in cell.records) for cell in cells):
        return None, None
    return math.exp(sum(math.log(cost.time) for cost in costs) / len(costs)), sum(c.state for c in costs) / len(costs)


def comparisons(results: Results, measure: Measure, replicas: Array) -> dict[tuple[str, str], Interval]:
    """Returns the difference of scores of each pair (first minus second), with simultaneous intervals for all pairs."""
    own, half = scores(times(results, measure)), margin(profile_scores(replicas), _factor(results))
    pairs = {pair: own[pair[0]] - own[pair[1]] for pair in permutations(results.optimizers, 2)}
    return {pair: Interval(value, value - half, value + half) for pair, value in pairs.items()}


def ranks(times: Times, workload: str) -> dict[str, float | None]:
    """Returns the ranks on a workload, ties with their mean rank; None if the target was not reached."""
    from scipy.stats import rankdata

    values = [row[workload] for row in times.values()]
    ranked = zip(times, values, rankdata(values).tolist(), strict=True)
    return {optimizer: rank if math.isfinite(value) else None for optimizer, value, rank in ranked}


# -- all of it


@dataclass(frozen=True)
class Summary:
    """Scores, comparisons and times by measure, for the measures that the results have."""

    measures: Sequence[Measure]
    standings: Mapping[Measure, Sequence[Standing]]
    comparisons: Mapping[Measure, Mapping[tuple[str, str], Interval]]
    times: Mapping[Measure, Times]

    @property
    def order(self) -> list[str]:
        """The optimizers by descending score in updates."""
        return [standing.optimizer for standing in self.standings["updates"]]

    def standing(self, optimizer: str, measure: Measure = "updates") -> Standing:
        return next(each for each in self.standings[measure] if each.optimizer == optimizer)

    def score(self, optimizer: str, measure: Measure) -> Interval | None:
        """Returns the score of an optimizer; None in `time` without measured cost."""
        standing = self.standing(optimizer, measure)
        return None if measure == "time" and standing.cost is None else standing.score

    def is_best(self, optimizer: str, measure: Measure) -> bool:
        """Returns whether the optimizer has the highest score, alone or with others, and reaches a target."""
        score, best = self.score(optimizer, measure), max(each.score.value for each in self.standings[measure])
        return score is not None and score.value == best > 0


def summarize(results: Results) -> Summary:
    """Computes the scores. The results need at least one cell."""
    measures = measured(results)
    replicas = {measure: bootstrap(results, measure) for measure in measures}
    return Summary(
        measures,
        {measure: standings(results, measure, replicas[measure]) for measure in measures},
        {measure: comparisons(results, measure, replicas[measure]) for measure in measures},
        {measure: times(results, measure) for measure in measures},
    )
