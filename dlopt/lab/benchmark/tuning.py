"""Expected best result against the number of trials: how much tuning an optimizer takes (Dodge et al. 2019).

Dodge et al., Show Your Work: Improved Reporting of Experimental Results, EMNLP 2019, equation 2, in the exact form for
draws without replacement, which is unbiased (Tang et al. 2020, Showing Your Work Doesn't Always Work). The trials of
all studies of an optimizer on a workload are one sample: N trials, best first. The i-th of them is the best of n trials
with probability C(N - i, n - 1) / C(N, n).

The best of few of many trials has a bootstrap interval over the trials. A resample cannot beat the best trial, so that
the interval of the best of 10 of 30 trials would cover 86 % instead of 95 %, and that of the best of 30, 47 %: they
have none, and no comparison.

The metric of a trial that failed, or that never improved on the median first validation of the workload, is that
median: a single diverged trial would decide the mean otherwise.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np

from dlopt.extend import lower_is_better
from dlopt.lab.benchmark import formats
from dlopt.lab.benchmark.results import Cell, Results, WorkloadTarget
from dlopt.lab.benchmark.scores import MAX_RATIO, RESAMPLES, Array, Interval, interval, margin, small_sample_factor
from dlopt.lab.report import sentences
from dlopt.results.tables import Bold

BUDGETS = (1, 3, 10, 30)
PER_TRY = 10
"""Trials per try from which on the best of several tries has an interval."""


def weights(count: int, tries: int) -> Array:
    """Returns the probability that the i-th best of `count` values is the best of `tries` drawn without replacement."""
    total = math.comb(count, tries)
    return np.array([math.comb(count - 1 - i, tries - 1) / total for i in range(count)])


def expected_best(values: Array, tries: int) -> Array:
    """Returns the expected smallest of `tries` of the values, drawn without replacement; `values`: [..., count]."""
    return np.sort(values, axis=-1) @ weights(values.shape[-1], tries)


@dataclass(frozen=True)
class Tuning:
    """Expected best results, with bootstrap intervals over the trials where N is small.

    Attributes:
        budgets: numbers of trials of the league.
        scores: optimizer -> expected score for each budget; None if it has fewer trials. The score of a trial is 1 for
            the fastest trial of all on the workload, and falls with the ratio of their updates to the target, to 0 at
            MAX_RATIO and for one that misses it; of several trials, the best counts. Mean over the workloads.
        open: for each budget, the optimizers that are not distinguishable from the first one, corrected for the number
            of comparisons; None if there is no comparison.
        metrics: (optimizer, workload) -> expected best metric of 1, 2, ... trials. Only of trials that trained to the
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
        values = {name: row[budget] for name, row in self.scores.items()}
        return max(values, key=lambda name: -1.0 if (score := values[name]) is None else score.value)

    def best(self, workload: str, budget: int) -> tuple[str, float] | None:
        """Returns the optimizer with the best expected metric on a workload; `budget`: its index."""
        tries, sign = self.budgets[budget], 1 if self.lower_is_better[workload] else -1
        rows = {name: row for (name, each), row in self.metrics.items() if each == workload and len(row) >= tries}
        values = {name: row[tries - 1] for name, row in rows.items()}
        return min(values.items(), key=lambda item: sign * item[1], default=None)


def tuning(results: Results) -> Tuning:
    """Computes the expected best results. Without trials, targets or a search, there are no budgets."""
    if results.track == "self_tuning":
        return Tuning([], {name: [] for name in results.optimizers}, [], {}, {})
    rng = np.random.default_rng(0)
    counts = {
        name: min((len(results.cell(name, workload).records) for workload in results.workloads), default=0)
        for name in results.optimizers
    }
    budgets = [tries for tries in BUDGETS if tries <= max(counts.values(), default=0)] if results.has_targets else []
    costs = {
        (name, workload): _costs(results, results.cell(name, workload), workload)
        for name in results.optimizers
        for workload in results.workloads
    }
    table: dict[str, list[tuple[float, Array] | None]] = {}
    for name in results.optimizers:
        drawn = [_resampled(costs[name, workload], rng) for workload in results.workloads] if counts[name] else []
        table[name] = [
            None
            if tries > counts[name]
            else (
                1 - float(np.mean([expected_best(costs[name, each], tries) for each in results.workloads])),
                1 - np.mean([expected_best(each, tries) for each in drawn], axis=0)
                if PER_TRY * tries <= counts[name]
                else np.array([]),
            )
            for tries in budgets
        ]
    metrics = {
        (name, workload): _expected_metrics(results.cell(name, workload), spec, _start(results, workload))
        for workload, spec in results.workloads.items()
        for name in results.optimizers
        if _is_full(results.cell(name, workload), spec)
    }
    scores = {name: [None if each is None else interval(*each) for each in row] for name, row in table.items()}
    lower = {name: lower_is_better(spec.metric) for name, spec in results.workloads.items()}
    found = Tuning(budgets, scores, [], metrics, lower)
    factor = small_sample_factor(len(results.workloads), max(min(counts.values(), default=0), 2))
    return replace(found, open=[_open(table, found.leader(budget), budget, factor) for budget in range(len(budgets))])


def _costs(results: Results, cell: Cell, workload: str) -> Array:
    """Returns 1 - score of each trial."""
    cells = [results.cell(name, workload) for name in results.optimizers]
    fastest = min((each.updates for other in cells for each in other.records), default=math.inf)
    ratios = [each.updates / fastest if math.isfinite(each.updates) else math.inf for each in cell.records]
    return np.array([min((ratio - 1) / (MAX_RATIO - 1), 1.0) for ratio in ratios])


def _resampled(values: Array, rng: np.random.Generator) -> Array:
    """Returns [RESAMPLES, count] values, drawn with replacement."""
    return values[rng.integers(len(values), size=(RESAMPLES, len(values)))]


def _open(
    table: Mapping[str, Sequence[tuple[float, Array] | None]], leader: str, budget: int, factor: float
) -> list[str] | None:
    """Returns the others whose score is not distinguishable from the leader's; None without intervals."""
    rows = {name: each for name, row in table.items() if (each := row[budget]) is not None}
    if not all(len(replicas) for _, replicas in rows.values()):
        return None
    least = margin(np.stack([replicas for _, replicas in rows.values()], axis=1), factor)
    return [name for name, each in rows.items() if name != leader and rows[leader][0] - each[0] <= least]


def _is_full(cell: Cell, workload: WorkloadTarget) -> bool:
    """Returns whether the trials trained to the end, also after their target: the best one has, as its curve shows."""
    return bool(cell.records and cell.curve) and cell.curve[-1][0] >= workload.updates


def _start(results: Results, workload: str) -> float:
    """Returns the median first validation of all trials."""
    cells = [results.cell(name, workload) for name in results.optimizers]
    firsts = [each.first for cell in cells for each in cell.records if each.first is not None]
    return median([each for each in firsts if math.isfinite(each)] or [math.nan])


def _expected_metrics(cell: Cell, workload: WorkloadTarget, start: float) -> list[float]:
    sign = 1 if lower_is_better(workload.metric) else -1
    known = [sign * (start if each.best is None else each.best) for each in cell.records]
    values = np.array([min(each, sign * start) if math.isfinite(each) else sign * start for each in known])
    return [sign * float(expected_best(values, tries)) for tries in range(1, len(values) + 1)]


# -- texts


def heads(found: Tuning) -> list[str]:
    return [f"{tries} trial{'s' if tries > 1 else ''}" for tries in found.budgets]


def league_rows(
    found: Tuning,
    optimizers: Sequence[str],
    name: Callable[[str], str] = str,
    form: Callable[[Interval | None], str] = formats.interval,
) -> list[list[str]]:
    """Returns a row per optimizer: its expected score for each budget, the highest in bold."""
    leaders = [found.leader(budget) for budget in range(len(found.budgets))]
    return [
        [name(each), *(Bold(form(score)) if each == leader else form(score)
                       for score, leader in zip(found.scores[each], leaders, strict=True))]
        for each in optimizers
    ]  # fmt: skip


def best_results(found: Tuning, workloads: Iterable[str], width: int = 100) -> list[list[str]]:
    """Returns a row per workload: for each budget, the best expected metric and its optimizer (`width` characters)."""
    rows = {each: [found.best(each, budget) for budget in range(len(found.budgets))] for each in workloads}
    return [
        [
            workload,
            *(formats.NONE if not best else f"{best[1]:.3g} {formats.abbreviated(best[0], width)}" for best in row),
        ]
        for workload, row in rows.items()
        if any(row)
    ]


def leaders(found: Tuning) -> list[str]:
    """Says for each budget which optimizer has the highest expected score."""
    if len(found.scores) < 2:
        return []
    rows = [
        {"tries": tries, "optimizer": leader, "score": score, "open": found.open[budget]}
        for budget, tries in enumerate(found.budgets)
        if (score := found.scores[leader := found.leader(budget)][budget]) is not None and score.value
    ]
    others = len(found.scores) - 1
    template = Path(__file__).with_name("tuning.txt")
    return sentences(template, leaders=rows, others=others, per_try=PER_TRY, formats=formats)
