"""Expected best result against the number of trials: how much tuning an optimizer takes (Dodge et al. 2019).

Dodge et al., Show Your Work: Improved Reporting of Experimental Results, EMNLP 2019, equation 2, in the exact form for
draws without replacement, which is unbiased (Tang et al. 2020, Showing Your Work Doesn't Always Work). The trials of
all studies of an optimizer on a workload are one sample: N trials, best first. The i-th of them is the best of n trials
with probability C(N - i, n - 1) / C(N, n).

The best of few of many trials has a bootstrap interval over the trials. The best of many has no interval, and no
comparison: a resample cannot beat the best trial, and the interval of the best of 10 of 30 trials would cover 86 %
instead of 95 %, that of the best of 30 only 47 %.

A trial that failed, or that never improved on the median first validation of the workload, counts with that median: a
single diverged trial would decide the mean otherwise.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from dlopt.basics.formats import format_count
from dlopt.extend import lower_is_better
from dlopt.lab.benchmark import formats
from dlopt.lab.benchmark.results import Cell, Results, WorkloadTarget
from dlopt.lab.benchmark.scores import MAX_RATIO, RESAMPLES, Array, Interval, interval, margin, small_sample_factor
from dlopt.lab.report import sentences
from dlopt.results.tables import Bold

BUDGETS = (1, 3, 10, 30)
PER_TRY = 10
"""The best of n trials has an interval if the optimizer has at least PER_TRY * n."""


@dataclass(frozen=True)
class Tuning:
    """Expected best results, with bootstrap intervals over the trials where N is small.

    The score of a trial is 1 for the fastest trial of all optimizers on the workload. It falls with the ratio of their
    updates to the target, to 0 at MAX_RATIO; a trial that misses the target has 0. The score of several trials is that
    of the best, averaged over the workloads.

    Attributes:
        budgets: numbers of trials of the league.
        scores: optimizer -> expected score for each budget; None if it has fewer trials.
        open: for each budget, the optimizers that are not distinguishable from the first one, corrected for the number
            of comparisons; None if there is no comparison.
        metrics: (optimizer, workload) -> expected best metric of 1, 2, ... trials. Only where trials trained to the
            end: the metric of others is that at their target.
        lower_is_better: of the metric of each workload.
    """

    budgets: Sequence[int]
    scores: Mapping[str, Sequence[Interval | None]]
    open: Sequence[Sequence[str] | None]
    metrics: Mapping[tuple[str, str], Sequence[float]]
    lower_is_better: Mapping[str, bool]

    def leader(self, budget: int) -> str:
        """Returns the optimizer with the highest expected score; `budget`: its index."""

        def value(name: str) -> float:
            score = self.scores[name][budget]
            return -1.0 if score is None else score.value

        return max(self.scores, key=value)

    def best(self, workload: str, budget: int) -> tuple[str, float] | None:
        """Returns the optimizer with the best expected metric on a workload; `budget`: its index."""
        tries = self.budgets[budget]
        metrics = {}
        for (name, each), row in self.metrics.items():
            if each == workload and len(row) >= tries:
                metrics[name] = row[tries - 1]
        if not metrics:
            return None
        choose = min if self.lower_is_better[workload] else max
        name = choose(metrics, key=metrics.__getitem__)
        return name, metrics[name]


@dataclass(frozen=True)
class _Sample:
    """The trials of an optimizer.

    Attributes:
        count: trials per workload; the fewest, where workloads differ.
        costs: of each workload, 1 - score of each trial, [trials].
        resampled: of each workload, the costs drawn with replacement, [RESAMPLES, trials]; none if `count` is 0.
    """

    count: int
    costs: Sequence[Array]
    resampled: Sequence[Array]


@dataclass(frozen=True)
class _Score:
    """Expected score of an optimizer for one budget. `replicas`: [RESAMPLES], or empty if there is no interval."""

    value: float
    replicas: Array


def tuning(results: Results) -> Tuning:
    """Computes the expected best results. Without trials, targets or a search, there are no budgets."""
    if results.track == "self_tuning":
        return Tuning([], {name: [] for name in results.optimizers}, [], {}, {})

    samples = _samples(results)
    counts = [sample.count for sample in samples.values()]
    budgets: list[int] = []
    if results.has_targets:
        budgets = [tries for tries in BUDGETS if tries <= max(counts, default=0)]

    factor = small_sample_factor(len(results.workloads), max(min(counts, default=0), 2))
    scores: dict[str, list[Interval | None]] = {name: [] for name in results.optimizers}
    not_distinguishable = []
    for tries in budgets:
        row = {name: _score(sample, tries) for name, sample in samples.items() if sample.count >= tries}
        for name in results.optimizers:
            score = row.get(name)
            scores[name].append(None if score is None else interval(score.value, score.replicas))
        not_distinguishable.append(_not_distinguishable(row, factor))

    lower = {name: lower_is_better(spec.metric) for name, spec in results.workloads.items()}
    return Tuning(budgets, scores, not_distinguishable, _metrics(results), lower)


# -- scores


def _samples(results: Results) -> dict[str, _Sample]:
    """Returns the trials of each optimizer, and draws their resamples."""
    rng = np.random.default_rng(0)
    samples = {}
    for name in results.optimizers:
        costs = [_costs(results, name, workload) for workload in results.workloads]
        count = min(map(len, costs), default=0)
        resampled = []
        if count:
            resampled = [each[rng.integers(len(each), size=(RESAMPLES, len(each)))] for each in costs]
        samples[name] = _Sample(count, costs, resampled)
    return samples


def _costs(results: Results, optimizer: str, workload: str) -> Array:
    """Returns 1 - score of each trial: 0 for the fastest of all optimizers, 1 from MAX_RATIO on."""
    updates = [record.updates for name in results.optimizers for record in results.cell(name, workload).records]
    fastest = min(updates, default=math.inf)
    costs = []
    for record in results.cell(optimizer, workload).records:
        cost = 1.0
        if record.reached:
            ratio = record.updates / fastest
            cost = min((ratio - 1) / (MAX_RATIO - 1), 1.0)
        costs.append(cost)
    return np.array(costs)


def _score(sample: _Sample, tries: int) -> _Score:
    """Returns the expected score of the best of `tries` trials, which the sample has."""
    cost = float(np.mean([expected_best(each, tries) for each in sample.costs]))
    replicas = np.array([])
    if sample.count >= PER_TRY * tries:
        replicas = 1 - np.mean([expected_best(each, tries) for each in sample.resampled], axis=0)
    return _Score(1 - cost, replicas)


def expected_best(values: Array, tries: int) -> Array:
    """Returns the expected smallest of `tries` of the values, drawn without replacement; `values`: [..., count]."""
    return np.sort(values, axis=-1) @ weights(values.shape[-1], tries)


def weights(count: int, tries: int) -> Array:
    """Returns the probability that the i-th best of `count` values is the best of `tries` drawn without replacement."""
    total = math.comb(count, tries)
    return np.array([math.comb(count - 1 - i, tries - 1) / total for i in range(count)])


def _not_distinguishable(row: Mapping[str, _Score], factor: float) -> list[str] | None:
    """Returns the optimizers whose score is not distinguishable from the highest; None if one has no interval.

    `row`: the scores for one budget; `factor`: of the bootstrap deviations, for small samples.
    """
    if not all(score.replicas.size for score in row.values()):
        return None
    least = margin(np.stack([score.replicas for score in row.values()], axis=1), factor)
    leader = max(row, key=lambda name: row[name].value)
    others = [name for name in row if name != leader]
    return [name for name in others if row[leader].value - row[name].value <= least]


# -- metrics


def _metrics(results: Results) -> dict[tuple[str, str], list[float]]:
    """Returns the expected best metric of 1, 2, ... trials, by (optimizer, workload)."""
    metrics = {}
    for workload, spec in results.workloads.items():
        start = _start(results, workload)
        for name in results.optimizers:
            cell = results.cell(name, workload)
            if _trained_to_the_end(cell, spec):
                metrics[name, workload] = _expected_metrics(cell, spec, start)
    return metrics


def _start(results: Results, workload: str) -> float:
    """Returns the median first validation of all trials; NaN without a finite one."""
    firsts = []
    for name in results.optimizers:
        for record in results.cell(name, workload).records:
            if record.first is not None and math.isfinite(record.first):
                firsts.append(record.first)
    return median(firsts) if firsts else math.nan


def _trained_to_the_end(cell: Cell, workload: WorkloadTarget) -> bool:
    """Returns whether the trials also train after their target: the best one has, as its curve shows."""
    return bool(cell.records and cell.curve) and cell.curve[-1][0] >= workload.updates


def _expected_metrics(cell: Cell, workload: WorkloadTarget, start: float) -> list[float]:
    """Returns the expected best metric of 1, 2, ... trials.

    Trials that failed, or that are worse than `start`, count as `start`.
    """
    sign = 1 if lower_is_better(workload.metric) else -1  # the smallest value is the best one
    values = []
    for record in cell.records:
        value = sign * start
        if record.best is not None and math.isfinite(record.best):
            value = min(sign * record.best, value)
        values.append(value)
    return [sign * float(expected_best(np.array(values), tries)) for tries in range(1, len(values) + 1)]


# -- texts


def heads(found: Tuning) -> list[str]:
    """Returns the column heads of the budgets."""
    return [format_count("trials", tries) for tries in found.budgets]


def league_rows(
    found: Tuning,
    optimizers: Sequence[str],
    name: Callable[[str], str] = str,
    form: Callable[[Interval | None], str] = formats.interval,
) -> list[list[str]]:
    """Returns a row per optimizer: its expected score for each budget, the highest in bold."""
    leaders = [found.leader(budget) for budget in range(len(found.budgets))]
    rows = []
    for optimizer in optimizers:
        row = [name(optimizer)]
        for score, leader in zip(found.scores[optimizer], leaders, strict=True):
            text = form(score)
            row.append(Bold(text) if optimizer == leader else text)
        rows.append(row)
    return rows


def best_results(found: Tuning, workloads: Iterable[str], width: int = 100) -> list[list[str]]:
    """Returns a row per workload: for each budget, the best expected metric and its optimizer (`width` characters).

    Omits workloads without expected metrics.
    """
    rows = []
    for workload in workloads:
        cells = []
        for budget in range(len(found.budgets)):
            best = found.best(workload, budget)
            if best is None:
                cells.append(formats.NONE)
            else:
                optimizer, metric = best
                cells.append(f"{metric:.3g} {formats.abbreviated(optimizer, width)}")
        if any(cell != formats.NONE for cell in cells):
            rows.append([workload, *cells])
    return rows


def leaders(found: Tuning) -> list[str]:
    """Says for each budget which optimizer has the highest expected score."""
    if len(found.scores) < 2:
        return []
    rows = []
    for budget, tries in enumerate(found.budgets):
        leader = found.leader(budget)
        score = found.scores[leader][budget]
        if score is not None and score.value:
            rows.append({"tries": tries, "optimizer": leader, "score": score, "open": found.open[budget]})
    others = len(found.scores) - 1
    template = Path(__file__).with_name("tuning.txt")
    return sentences(template, leaders=rows, others=others, per_try=PER_TRY, formats=formats)
