"""Finds symptoms of a wrong optimizer, or of a search space that does not fit it, in the trials of a benchmark."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import combinations
from statistics import median
from typing import Any

from hydra.core.override_parser.types import IntervalSweep

from dlopt.config.overrides import parse_overrides
from dlopt.extend import UserError, lower_is_better
from dlopt.lab.benchmark import formats
from dlopt.lab.benchmark.reading import best_trials
from dlopt.lab.benchmark.results import Results, TrialRecord
from dlopt.lab.benchmark.scores import times

RISING = 0.9
"""Fraction of trials with a rising loss from which on the optimizer is suspicious."""
EQUAL = 0.9
"""Fraction of pairs of trials with equal results from which on their hyperparameters have no effect."""
FAILED = 0.3
"""Fraction of failed trials that is mentioned."""
SIDES = ("lowest", "highest")
_END = 0.1  # fraction of a search range that is its end
RANGE_HEADS = ("Optimizer", "Key", "Range", *(f"In the {side} {formats.percent(_END)}" for side in SIDES))
_FEWEST = 2  # workloads with the best trials there: one may be luck
_TOLERANCE = 0.1  # of the progress since the first validation, for results that are nearly equal
_RATE = "optimizer.lr"
_FAR = 10.0  # ratio of learning rates that should make a difference
_NEAR = 3.0  # ratio of other hyperparameters that should make little difference
_ALONE = 0.05  # of the pairs of trials differ in one hyperparameter only, if the others are chosen from a list
_DIVERGENCE = ("the loss became", "is not finite", "are not finite")  # in the reasons of failures
Pair = tuple[TrialRecord, TrialRecord]
Symptom = dict[str, Any]
"""The `optimizer`, the `rule` that found it, and the values of the sentence in findings.txt."""


def symptoms(results: Results, optimizer: str) -> list[Symptom]:
    """Returns a row per symptom of an optimizer."""
    if not results.records(optimizer):
        return []
    rising, ignored = [*_rising(results, optimizer)], [*_without_effect(results, optimizer)]
    found = [*(rising or _no_target(results, optimizer)), *ignored]
    if not rising:
        useless = {key for row in ignored for key in row["hyperparameters"]}
        found += [row for row in _range_ends(results, optimizer) if row["key"] not in useless]
        found += _failures(results, optimizer)
    return [{"optimizer": optimizer, **row} for row in found]


def _no_target(results: Results, optimizer: str) -> Iterator[Symptom]:
    if results.has_targets and all(map(math.isinf, times(results, "updates")[optimizer].values())):
        records = results.records(optimizer)
        yield {"rule": "no target", "count": sum(record.reached for record in records), "total": len(records)}


def _failures(results: Results, optimizer: str) -> Iterator[Symptom]:
    records = results.records(optimizer)
    failures = Counter(record.failure for record in records if record.failure)
    if failures.total() >= FAILED * len(records):
        reason = formats.abbreviated(failures.most_common(1)[0][0], 150)
        yield {"rule": "failures", "count": failures.total(), "total": len(records), "reason": reason}


# -- a wrong sign


def _rising(results: Results, optimizer: str) -> Iterator[Symptom]:
    counts = {}
    for name, workload in results.workloads.items():
        trials = [each for each in results.cell(optimizer, name).records if _has_diverged(each) or not each.failure]
        if trials:
            counts[name] = sum(_gets_worse(each, workload.metric) for each in trials), len(trials)
    rising, total = (sum(count[i] for count in counts.values()) for i in (0, 1))
    if total and rising >= RISING * total:
        parts = [f"{name} {worse}/{number}" for name, (worse, number) in counts.items()]
        yield {"rule": "rising", "count": rising, "total": total, "parts": parts}


def _has_diverged(record: TrialRecord) -> bool:
    return record.last is None and (not record.failure or any(part in record.failure for part in _DIVERGENCE))


def _gets_worse(record: TrialRecord, metric: str) -> bool:
    if record.last is None or record.first is None:
        return _has_diverged(record)
    return record.last > record.first if lower_is_better(metric) else record.last < record.first


# -- hyperparameters without effect


def _without_effect(results: Results, optimizer: str) -> Iterator[Symptom]:
    """Yields a row for the hyperparameters with no effect, and one for a learning rate with little."""
    equal: dict[tuple[int, int], list[str]] = {}  # (equal pairs, all pairs) -> hyperparameters
    little: list[Symptom] = []
    for key in dict.fromkeys(key for record in results.records(optimizer) for key in record.values):
        pairs = _pairs(results, optimizer, key)
        count = sum((a.updates, a.best, a.last) == (b.updates, b.best, b.last) for a, b in pairs)
        if pairs and count >= EQUAL * len(pairs):
            equal.setdefault((count, len(pairs)), []).append(key)
        elif key == _RATE:
            far = [pair for pair in pairs if _ratio(pair, key) >= _FAR and _differ_only_in(key, pair)]
            similar = sum(_are_similar(*pair) for pair in far)
            if far and similar >= EQUAL * len(far):
                row = {"rule": "little effect", "hyperparameters": [key], "count": similar, "total": len(far)}
                little.append({**row, "ratio": f"{_FAR:.0f}", "tolerance": _TOLERANCE})
    for (count, total), keys in equal.items():
        yield {"rule": "without effect", "hyperparameters": keys, "count": count, "total": total}
    yield from little


def _pairs(results: Results, optimizer: str, key: str) -> list[Pair]:
    """Returns the pairs of trials of a study that differ in `key`: only in it, if enough pairs do."""
    pairs = []
    for name in results.workloads:
        cell = results.cell(optimizer, name)
        for study in range(results.studies_of(optimizer)):
            ended = [record for record in cell.study(study) if key in record.values and record.last is not None]
            pairs += [(a, b) for a, b in combinations(ended, 2) if a.values[key] != b.values[key]]
    alone = [pair for pair in pairs if _differ_only_in(key, pair, 1.0)]
    return alone if len(alone) >= _ALONE * len(pairs) else pairs


def _differ_only_in(key: str, pair: Pair, factor: float = _NEAR) -> bool:
    """Returns whether all values but `key` are equal, or numbers with a ratio of at most `factor`."""
    a, b = (record.values for record in pair)
    others = (a.keys() | b.keys()) - {key}
    return all(a.get(name) == b.get(name) or 0 < _ratio(pair, name) <= factor for name in others)


def _ratio(pair: Pair, key: str) -> float:
    """Returns the ratio of the larger to the smaller value; 0 if they are no positive numbers."""
    a, b = (record.values.get(key) for record in pair)
    if not all(isinstance(value, int | float) and not isinstance(value, bool) and value > 0 for value in (a, b)):
        return 0.0
    return float(max(a, b) / min(a, b))  # type: ignore[type-var, operator]


def _are_similar(a: TrialRecord, b: TrialRecord) -> bool:
    """Returns whether the updates to the target, and the metrics relative to the progress, differ little."""
    if a.first is None or a.best is None or a.last is None or b.best is None or b.last is None or b.first is None:
        return False
    progress = max(abs(a.first - a.best), abs(b.first - b.best))
    close = max(abs(a.best - b.best), abs(a.last - b.last)) <= _TOLERANCE * progress
    return close and (a.updates == b.updates or abs(a.updates - b.updates) <= _TOLERANCE * min(a.updates, b.updates))


# -- search ranges


def _range_ends(results: Results, optimizer: str) -> Iterator[Symptom]:
    """Yields a row for each end of a search range with the best trials of at least half of the workloads."""
    for row in range_ends(results, optimizer):
        for side in SIDES:
            if len(row[side]) >= max(0.5 * row["total"], _FEWEST):
                yield {**row, "rule": "end of range", "side": side, "workloads": row[side], "end": _END}


def range_ends(results: Results, optimizer: str) -> Iterator[dict[str, Any]]:
    """Yields each key with best trials at an end of its search range: the workloads at each of the `SIDES`.

    A workload is at an end by the median over studies; `total`: workloads with trials.
    """
    for key, space in results.spaces.get(optimizer, {}).items():
        if bounds := search_range(space):
            positions = _positions(results, optimizer, key, bounds)
            low = [name for name, position in positions.items() if position <= _END]
            high = [name for name, position in positions.items() if position >= 1 - _END]
            if low or high:
                found = {"key": key, "range": f"{bounds[0]:g} to {bounds[1]:g}", "total": len(positions)}
                yield {**found, SIDES[0]: low, SIDES[1]: high}


def range_rows(results: Results, optimizers: Sequence[str]) -> list[list[str]]:
    """Returns the rows of a table with the heads `RANGE_HEADS`."""
    return [
        [optimizer, row["key"], row["range"], *(", ".join(row[side]) or formats.NONE for side in SIDES)]
        for optimizer in optimizers
        for row in range_ends(results, optimizer)
    ]


def search_range(space: str) -> tuple[float, float, bool] | None:
    """Returns (low, high, whether it is logarithmic) of a range in Hydra's notation; None if it is none."""
    try:
        [override] = parse_overrides([f"key={space}"])
    except (UserError, ValueError):
        return None
    value = override.value()
    if not isinstance(value, IntervalSweep) or value.start is None or value.end is None:
        return None
    low, high, is_log = float(value.start), float(value.end), "log" in value.tags
    return (low, high, is_log) if low < high and (low > 0 or not is_log) else None


def _positions(results: Results, optimizer: str, key: str, bounds: tuple[float, float, bool]) -> dict[str, float]:
    """Returns the median position of the studies' best trials in the range (0: low, 1: high), by workload."""
    low, high, is_log = bounds
    found = {}
    for name, workload in results.workloads.items():
        best = best_trials(results.cell(optimizer, name).records, workload.metric).values()
        values = [record.values.get(key) for record in best]
        known = [each for each in values if isinstance(each, int | float) and (each > 0 or not is_log)]
        if known:
            found[name] = median(
                math.log(each / low) / math.log(high / low) if is_log else (each - low) / (high - low) for each in known
            )
    return found
