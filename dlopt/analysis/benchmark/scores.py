"""Scores of a benchmark: performance profiles and their integral (Dolan & More 2002; Dahl et al. 2023, AlgoPerf).

The time of an optimizer on a workload is the median over its studies of the time of the study's fastest trial. The
performance ratio is this time over that of the fastest optimizer; a ratio above `MAX_RATIO` counts as not reached. The
profile at tau is the fraction of workloads with a ratio of at most tau, and the score is the normalized integral of the
profile over tau in [1, MAX_RATIO]: 1 for the fastest optimizer on all workloads, 0 for one that reaches no target.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from dlopt.analysis.benchmark.results import Cell, Measure, Record, Results

MAX_RATIO = 4.0
RESAMPLES = 1000
_INTERVAL = (2.5, 97.5)  # percentiles
Times = Mapping[str, Mapping[str, float]]
"""optimizer -> workload -> time to the target; infinity: not reached."""


@dataclass(frozen=True)
class Interval:
    """A value with its bootstrap interval (95 %)."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """How often `optimizer` is faster than `other`, as a fraction of the workloads that at least one of them reaches.

    A tie counts as half a win. `wins` is NaN if neither reaches any target.
    """

    optimizer: str
    other: str
    wins: Interval

    @property
    def distinguishable(self) -> bool:
        """Whether the interval excludes one half."""
        return self.wins.low > 0.5 or self.wins.high < 0.5


@dataclass(frozen=True)
class Standing:
    """Summary of an optimizer: its score with interval, and what the score does not show.

    Attributes:
        reached: workloads whose target at least half of the studies reach.
        sensitivity: fraction of all trials that reach their target.
        failed: fraction of the trials that failed (diverged, for example).
        cost: geometric mean over workloads of the time of an update relative to SGD's; None: not measured.
        state: mean memory of the state relative to the parameters; None: not measured.
    """

    optimizer: str
    score: Interval
    reached: int
    sensitivity: float
    failed: float
    cost: float | None
    state: float | None


# -- times


def trial_time(record: Record, cell: Cell, measure: Measure) -> float:
    """Returns the time of a trial to its target; in `time`, the unit is an update of SGD on the same workload."""
    if measure == "evaluations":
        return record.evaluations
    if measure == "updates":
        return record.updates
    return math.inf if cell.cost is None else record.updates * cell.cost.time


def study_times(results: Results, optimizer: str, workload: str, measure: Measure) -> list[float]:
    """Returns the time of the fastest trial of each study; infinity for a study without a successful trial."""
    cell = results.cell(optimizer, workload)
    return [
        min((trial_time(record, cell, measure) for record in cell.study(study)), default=math.inf)
        for study in range(results.studies)
    ]


def times(results: Results, measure: Measure) -> dict[str, dict[str, float]]:
    """Returns the median over studies by optimizer and workload. With an even number, the upper of the middle two."""
    return {
        optimizer: {
            workload: _median(study_times(results, optimizer, workload, measure)) for workload in results.workloads
        }
        for optimizer in results.optimizers
    }


def _median(values: Sequence[float]) -> float:
    if not values:
        return math.inf
    middle = sorted(values)[len(values) // 2]
    return median(values) if math.isfinite(middle) else math.inf


# -- profiles and scores


def ratios(times: Times) -> dict[str, dict[str, float]]:
    """Returns the performance ratios; infinity where the target was not reached, or the ratio is above `MAX_RATIO`."""
    workloads = {workload for row in times.values() for workload in row}
    fastest = {name: min(row.get(name, math.inf) for row in times.values()) for name in workloads}
    return {
        optimizer: {name: _ratio(value, fastest[name]) for name, value in row.items()}
        for optimizer, row in times.items()
    }


def _ratio(time: float, fastest: float) -> float:
    if not math.isfinite(time):
        return math.inf
    ratio = time / fastest
    return ratio if ratio <= MAX_RATIO else math.inf


def profile(ratios: Mapping[str, float], taus: Sequence[float]) -> list[float]:
    """Returns the fraction of workloads with a ratio of at most tau, for each tau."""
    return [sum(ratio <= tau for ratio in ratios.values()) / len(ratios) for tau in taus]


def score(ratios: Mapping[str, float]) -> float:
    """Returns the integral of the profile over [1, MAX_RATIO] / (MAX_RATIO - 1), in closed form.

    The profile is a sum of steps: a workload with ratio r contributes (MAX_RATIO - r) / (MAX_RATIO - 1).
    """
    return sum(max(MAX_RATIO - ratio, 0.0) for ratio in ratios.values()) / (MAX_RATIO - 1) / len(ratios)


def scores(times: Times) -> dict[str, float]:
    return {optimizer: score(row) for optimizer, row in ratios(times).items()}


# -- bootstrap over studies


def bootstrap(results: Results, measure: Measure, seed: int = 0, resamples: int = RESAMPLES) -> list[Times]:
    """Returns tables of times whose studies are drawn with replacement, for each workload anew.

    All optimizers share the drawn studies, because trial k of study s has the same initial weights for all of them.
    """
    rng = np.random.default_rng(seed)
    table = {
        (optimizer, workload): study_times(results, optimizer, workload, measure)
        for optimizer in results.optimizers
        for workload in results.workloads
    }
    replicas: list[Times] = []
    for _ in range(resamples):
        drawn = {workload: rng.integers(results.studies, size=results.studies) for workload in results.workloads}
        replicas.append(
            {
                optimizer: {
                    workload: _median([table[optimizer, workload][study] for study in drawn[workload]])
                    for workload in results.workloads
                }
                for optimizer in results.optimizers
            }
        )
    return replicas


def interval(value: float, replicas: Sequence[float]) -> Interval:
    """Returns `value` with the percentiles of its replicas, without those that are NaN."""
    finite = [each for each in replicas if not math.isnan(each)]
    if not finite:
        return Interval(value, math.nan, math.nan)
    low, high = np.percentile(finite, _INTERVAL)
    return Interval(value, float(low), float(high))


def standings(results: Results, measure: Measure, replicas: Sequence[Times]) -> list[Standing]:
    """Returns the optimizers by descending score."""
    table = times(results, measure)
    own, drawn = scores(table), [scores(replica) for replica in replicas]
    rows = [
        Standing(
            optimizer,
            interval(own[optimizer], [each[optimizer] for each in drawn]),
            sum(math.isfinite(value) for value in table[optimizer].values()),
            _fraction(results, optimizer, lambda record: record.reached),
            _fraction(results, optimizer, lambda record: bool(record.failure)),
            *_cost(results, optimizer),
        )
        for optimizer in results.optimizers
    ]
    return sorted(rows, key=lambda row: (-row.score.value, -row.reached, -row.sensitivity, row.optimizer))


def _fraction(results: Results, optimizer: str, condition: Callable[[Record], bool]) -> float:
    records = [record for workload in results.workloads for record in results.cell(optimizer, workload).records]
    return sum(map(condition, records)) / len(records) if records else 0.0


def _cost(results: Results, optimizer: str) -> tuple[float | None, float | None]:
    costs = [cell.cost for workload in results.workloads if (cell := results.cell(optimizer, workload)).cost]
    if not costs:
        return None, None
    times = [cost.time for cost in costs if cost is not None]
    states = [cost.state for cost in costs if cost is not None]
    return math.exp(sum(map(math.log, times)) / len(times)), sum(states) / len(states)


def comparisons(results: Results, measure: Measure, replicas: Sequence[Times]) -> dict[tuple[str, str], Comparison]:
    """Compares each pair of optimizers."""
    table, pairs = times(results, measure), {}
    for optimizer in results.optimizers:
        for other in results.optimizers:
            if optimizer != other:
                drawn = [_wins(replica[optimizer], replica[other]) for replica in replicas]
                wins = interval(_wins(table[optimizer], table[other]), drawn)
                pairs[optimizer, other] = Comparison(optimizer, other, wins)
    return pairs


def _wins(own: Mapping[str, float], other: Mapping[str, float]) -> float:
    decided = [name for name in own if math.isfinite(own[name]) or math.isfinite(other[name])]
    if not decided:
        return math.nan
    return sum(1.0 if own[name] < other[name] else 0.5 * (own[name] == other[name]) for name in decided) / len(decided)


def ranks(times: Times, workload: str) -> dict[str, float | None]:
    """Returns the ranks on a workload, ties with their mean rank; None: the target was not reached."""
    values = {optimizer: row[workload] for optimizer, row in times.items()}
    finite = {optimizer: value for optimizer, value in values.items() if math.isfinite(value)}
    return {
        optimizer: None
        if optimizer not in finite
        else 1 + sum(other < finite[optimizer] for other in finite.values())
        + 0.5 * (sum(other == finite[optimizer] for other in finite.values()) - 1)
        for optimizer in values
    }  # fmt: skip
