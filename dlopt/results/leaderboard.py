"""Ranks configurations over seeds: means, standard deviations, paired differences, Pareto fronts.

Pure functions from `Record`s to `Row`s, without files or output. Rows are ranked by a validation metric: ranking by
test metrics would select on the test set.
"""

import hashlib
import math
import statistics
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeGuard

from dlopt.basics.folders import ENDED
from dlopt.basics.plain_values import flatten, is_below
from dlopt.basics.roles import Role
from dlopt.config.keys import is_seed, role_of
from dlopt.config.overrides import key_of
from dlopt.metrics.names import (
    NONE,
    VAL_ACCURACY,
    VAL_LOSS,
    Direction,
    Directions,
    Goal,
    Metric,
    common_directions,
    lower_is_better,
    split_of,
)
from dlopt.metrics.shown import is_percent
from dlopt.results.intervals import FEWEST, Comparison, Difference, Statistic, statistic

Seeds = tuple[tuple[str, Any], ...]

# Modes equal a single process only without local batch norm, gradient compression and the like; and they are compared
# by their speed: unlike others where a run executes. The handling of errors changes the runs that meet one.
FOLDS, FOLD = "data.folds", "data.fold"
ORIGINS = {
    "data": "data", "code": "code of allow_packages", "versions": "versions of dlopt or torch",
}  # fmt: skip
"""Of `Record.origin`: what makes the metrics of two runs not comparable."""
OTHER_FOLDS = "folds"
"""Of `Row.apart`: a mean over some folds, or folds of another division, is not one over all."""
_ALSO_COMPARED = ("parallel", "on_divergence", "on_out_of_memory")


@dataclass(frozen=True)
class Search:
    """What a search says of its jobs in its sweep.yaml: the metric and direction, and the runs (seeds) of a trial."""

    objective: str | None
    direction: Goal | None
    seeds: int


@dataclass(frozen=True)
class Record:
    """One run.

    Attributes:
        path: its folder; a name for a run without one.
        status: one of `reading.STATUSES`.
        config: of config.yaml, nested or with dotted keys; in records that `reading.read` returns, dotted, with each
            group's choice under the group's name.
        metrics: of the best epoch (`val_loss`, `val_accuracy`), of the run (`epochs`, `steps`, `seconds`, `parameters`)
            and of the test (`test_loss`, `test_accuracy`), without missing or non-finite values.
        history: the evaluated epochs.
        overrides: of the command line.
        origin: inputs of the run beside its config: the `data` by content, the `code` of the user's packages, the
            `versions`; what its validation counts (`validation`: `count` and `unit`), and the `device` by its name.
        search: the search that it is a job of; None for another run.
    """

    path: Path
    status: str
    config: Mapping[str, Any]
    metrics: Mapping[str, Any]
    history: Sequence[Mapping[str, float]] = ()
    overrides: Sequence[str] = ()
    reason: str | None = None
    commit: str | None = None
    origin: Mapping[str, Any] = field(default_factory=dict)
    search: Search | None = None

    @property
    def has_ended(self) -> bool:
        """Whether the run finished and was not pruned, so that its metrics count."""
        return self.status in ENDED and not self.metrics.get("pruned")

    def metric(self, key: str) -> float | None:
        """Returns a metric, or None if missing or non-finite."""
        value = self.metrics.get(key)
        return float(value) if is_number(value) else None

    @property
    def seeds(self) -> Seeds:
        """Values of all seed keys, and the fold that validates; pairs runs of two configurations."""
        flat = sorted(flatten(self.config).items())
        return tuple((k, value) for k, value in flat if is_seed(k) or (k == FOLD and value is not None))

    @property
    def fold(self) -> int | None:
        """The fold of a cross-validation that validates; None without one."""
        return dict(self.seeds).get(FOLD)


@dataclass(frozen=True)
class Row:
    """One configuration: runs that differ only in their seeds."""

    label: str
    overrides: Sequence[str]
    runs: Sequence[Record]
    value: Statistic | None = None  # of the ranking metric; None if no run has it
    rank: int | None = None  # from 1; equal values share it
    is_tied: bool = False  # whether another row has the same rank
    difference: Difference | None = None  # to the first row over common seeds; None for the first row
    apart: str = ""  # what forbids a comparison with the first row, such as other data
    data: str = ""  # where other rows differ in their data only: which one it is
    key: str = ""  # of its config without seeds, the same in each table

    @property
    def place(self) -> str:
        """Its rank as shown: "1", "1=" if it is tied, "-" without a value."""
        return "-" if self.rank is None else f"{self.rank}{'=' * self.is_tied}"

    @property
    def is_first(self) -> bool:
        """Whether it ranks first, alone or tied."""
        return self.rank == 1

    def statistic(self, metric: str) -> Statistic | None:
        """Computes mean, standard deviation and count of a metric over ended runs, one per seed, or over folds."""
        return statistic([*self.by_seeds(metric).values()])

    @property
    def folds(self) -> int | None:
        """The parts of its cross-validation; None without one."""
        folds = flatten(self.runs[0].config).get(FOLDS)
        return folds if isinstance(folds, int) and folds > 1 else None

    @property
    def overlap(self) -> float:
        """Validation samples of a fold divided by its training samples; 0 without folds."""
        return 0.0 if self.folds is None else 1 / (self.folds - 1)

    def folds_with(self, metric: str) -> set[int | None]:
        return {run.fold for run in self.counted(metric)}

    @property
    def distinct(self) -> tuple[Record, ...]:
        """The runs without repetitions: the last one of each seed, one that has ended before one that has not."""
        return distinct(self.runs)

    @property
    def failed(self) -> int:
        return sum(run.status == "failed" for run in self.runs)

    @property
    def is_pruned(self) -> bool:
        """Whether a search has pruned its runs, or the trial that they are seeds of."""
        pruned = [run.status == "pruned" or bool(run.metrics.get("pruned")) for run in self.runs]
        return all(pruned) or (any(pruned) and any(run.search for run in self.runs))

    @property
    def has_lost(self) -> bool:
        """Whether a seed has failed or diverged: the other ones are no fair sample."""
        return any(run.status == "failed" for run in self.distinct)

    def count(self, metric: str) -> str:
        """Formats the number of runs: 3, "2 of 3" if the statistics of `metric` cover two, "pruned" if all were."""
        if self.is_pruned:
            return "pruned" if len(self.runs) == 1 else f"{len(self.runs)} pruned"
        counted, runs = len(self.counted(metric)), len(self.runs)
        if self.folds is not None:
            return self._count_folds(metric)
        return str(runs) if counted == runs else f"{counted} of {runs}"

    def _count_folds(self, metric: str) -> str:
        """Formats "5 folds", "3 of 5 folds", "5 folds × 2 seeds", or "5 folds, 7 runs" if their seeds differ."""
        counts = Counter(run.fold for run in self.counted(metric))
        shown = f"{self.folds} folds" if len(counts) == self.folds else f"{len(counts)} of {self.folds} folds"
        sizes = set(counts.values())
        if len(sizes) > 1:
            return f"{shown}, {counts.total()} runs"
        return shown if sizes <= {1} else f"{shown} × {sizes.pop()} seeds"

    def count_with_failed(self, metric: str) -> str:
        """Formats "2 of 3, 1 failed"; see `count`."""
        return f"{self.count(metric)}, {self.failed} failed" if self.failed else self.count(metric)

    def by_seeds(self, metric: str) -> dict[Seeds, float]:
        """Returns the values by seed; of a cross-validation the means over seeds by fold."""
        counted = self.counted(metric)
        if self.folds is None:
            return {run.seeds: run.metric(metric) or 0.0 for run in counted}
        values: dict[Seeds, list[float]] = {}
        for run in counted:
            values.setdefault(((FOLD, run.fold),), []).append(run.metric(metric) or 0.0)
        return {fold: statistics.fmean(each) for fold, each in values.items()}

    def counted(self, metric: str) -> tuple[Record, ...]:
        """Returns the distinct runs whose metric counts; none of a trial of a search that lacks a seed."""
        found = distinct([run for run in self.runs if run.has_ended and run.metric(metric) is not None])
        return () if any(run.search and len(found) < run.search.seeds for run in self.runs) else found

    def repeated(self, metric: str) -> int:
        """Returns the number of runs that do not count because a later run has the same seeds."""
        ended = [run for run in self.runs if run.has_ended and run.metric(metric) is not None]
        return len(ended) - len(distinct(ended))


def distinct(runs: Sequence[Record]) -> tuple[Record, ...]:
    """Returns one run for each seed: a repetition tells nothing of the spread over seeds, whatever its value is.

    The last one that has ended, else the last one. Runs without a seed are distinct.
    """
    kept: dict[object, Record] = {}
    for run in runs:
        is_known = bool(run.seeds) and all(value is not None for _, value in run.seeds)
        key: object = run.seeds if is_known else run.path
        if run.has_ended or key not in kept or not kept[key].has_ended:
            kept[key] = run
    return tuple(kept.values())


@dataclass(frozen=True)
class Leaderboard:
    """Ranked rows. `comparison`: of the rows with the first one."""

    metric: str
    direction: Goal
    rows: Sequence[Row] = ()
    comparison: Comparison = field(default_factory=Comparison)

    @property
    def blocks(self) -> str:
        """What the runs of a row differ in, over which it is averaged and compared: "seeds" or "folds"."""
        return "folds" if any(row.folds for row in self.rows) else "seeds"


Look = Mapping[str, int]
"""What an earlier reader of a table has seen: the counted runs of each row, by `Row.key`."""


@dataclass(frozen=True)
class ParetoFront:
    """Of a search with several objectives. `rows`: label, folder, and values in the order of `metrics`."""

    metrics: Sequence[str]
    directions: Sequence[Goal]
    rows: Sequence[tuple[str, Path, Sequence[float]]]


def goal_of(metric: str, directions: Directions = NONE) -> Goal:
    """Returns what a search does with the metric; `directions`: of users' metrics. Raises `UserError` if unknown."""
    return "minimize" if lower_is_better(metric, directions) else "maximize"


def directions_of(records: Iterable[Record]) -> dict[str, Direction]:
    """Returns the directions of the user's metrics on which the runs that monitor them agree."""
    return common_directions(flatten(record.config) for record in records)


def monitored(records: Iterable[Record]) -> str | None:
    """Returns the validation metric that `monitor` names in all runs; None if they differ, or it is `auto`."""
    names = {str(flatten(record.config).get("monitor")) for record in records}
    name = names.pop() if len(names) == 1 else "auto"
    return name if split_of(name) == "val" else None


def leaderboard(
    entries: Sequence[Record], *, metric: str | None = None, direction: Goal | None = None, looks: Sequence[Look] = ()
) -> Leaderboard:
    """Ranks configurations by the mean of `metric` over seeds: best first, configurations without a value last.

    `metric`: by default that of `monitored`, else `val_accuracy` if any run has it, else `val_loss`. `looks`: at tables
    with fewer seeds. Raises `UserError` if the direction of the metric is unknown.
    """
    if metric is None:
        names = [name for name in (monitored(entries), VAL_ACCURACY.column) if name is not None]
        has = (name for name in names if any(entry.metric(name) is not None for entry in entries))
        metric = next(has, VAL_LOSS.column)
    direction = goal_of(metric, directions_of(entries)) if direction is None else direction
    sign = -1.0 if direction == "maximize" else 1.0
    rows = [replace(row, value=row.statistic(metric)) for row in _grouped(entries)]
    most = max((_part_of_folds(row, metric) for row in rows), default=1.0)

    def order(row: Row) -> tuple[float, float, float]:
        loss = row.statistic(VAL_LOSS.column)  # orders rows that are tied
        return (
            # A mean over some of the folds may be that of the easy ones.
            math.inf if row.value is None else float(_part_of_folds(row, metric) < most),
            math.inf if row.value is None else sign * row.value.mean,
            math.inf if loss is None else loss.mean,
        )

    rows.sort(key=order)
    return Leaderboard(metric, direction, *_compared(_with_ranks(rows), metric, looks))


def _part_of_folds(row: Row, metric: str) -> float:
    """Returns the fraction of the folds that have a value; 1 without folds."""
    return 1.0 if row.folds is None or row.value is None else len(row.folds_with(metric)) / row.folds


def _with_ranks(rows: Iterable[Row]) -> list[Row]:
    """Numbers sorted rows from 1; means that are equal up to rounding share a rank."""
    ranked: list[Row] = []
    for position, row in enumerate(rows, 1):
        before = ranked[-1].value if ranked else None
        is_tied = row.value and before and math.isclose(row.value.mean, before.mean, rel_tol=1e-12)
        rank = None if row.value is None else ranked[-1].rank if is_tied else position
        ranked.append(replace(row, rank=rank))
    counts = Counter(row.rank for row in ranked)
    return [replace(row, is_tied=row.rank is not None and counts[row.rank] > 1) for row in ranked]


def _compared(rows: Sequence[Row], metric: str, looks: Sequence[Look]) -> tuple[Sequence[Row], Comparison]:
    """Returns the rows with their differences to the first one, and the comparison.

    A row with other data or code than the first one has no difference, and one that has lost a seed no interval.
    """
    if not rows or rows[0].value is None:
        return rows, Comparison()
    from dlopt.results.simultaneous import compare  # imports NumPy, which the help does not need

    first, step = rows[0], resolution(rows, metric)
    rows = [first, *(replace(row, apart=_apart(first, row, metric)) for row in rows[1:])]
    known = [i for i, row in enumerate(rows) if row.value is not None and not row.apart]
    values = of_common_seeds([rows[i].by_seeds(metric) for i in known])
    enters = [not rows[i].has_lost and not first.has_lost for i in known]
    counts = {rows[i].key: len(rows[i].counted(metric)) for i, is_in in zip(known, enters, strict=True) if is_in}
    comparison = compare(
        values,
        enters=enters,
        seen=_seen(looks, counts),
        resolution=0.0 if step is None else step.size,
        overlap=first.overlap,
    )
    found = dict(zip(known[1:], comparison.differences, strict=True))
    return [replace(row, difference=found.get(i)) for i, row in enumerate(rows)], comparison


def _seen(looks: Sequence[Look], counts: Mapping[str, int]) -> list[int]:
    """Returns the numbers of runs of a row at which others have looked at these rows, before some of them got more."""
    found = set()
    for look in looks:
        before = {key: look[key] for key in counts if look.get(key, 0) >= FEWEST}
        if any(count < counts[key] for key, count in before.items()):
            found.add(max(before.values()))
    return sorted(found)


def look_of(board: Leaderboard) -> Look:
    """Returns what a reader of this table sees; {} if no row was compared."""
    shown = [row for row in board.rows if row.difference is not None and row.difference.low is not None]
    return {row.key: len(row.counted(board.metric)) for row in (board.rows[0], *shown)} if shown else {}


def _apart(one: Row, other: Row, metric: str) -> str:
    """Names what differs between the runs of two rows, so that they are not comparable; "" if nothing does.

    Runs of the same seed are compared: all rows may have later seeds of a later version.
    """
    has_value = other.value is not None
    if one.folds != other.folds or (has_value and one.folds_with(metric) != other.folds_with(metric)):
        return OTHER_FOLDS
    own = {run.seeds: run for run in one.distinct}
    pairs = [(own[run.seeds], run) for run in other.distinct if run.seeds in own]
    pairs = pairs or [(one.runs[0], run) for run in other.runs]
    for key, name in ORIGINS.items():
        if key == "data" and not all(_has_same_data(*pair) for pair in pairs):
            return name
        if key != "data" and any(differs(a.origin.get(key), b.origin.get(key)) for a, b in pairs):
            return name
    return ""


@dataclass(frozen=True)
class Resolution:
    """One of the `count` samples (`unit`: "samples", "images", "tokens") of which an accuracy is a fraction."""

    count: int
    unit: str

    @property
    def size(self) -> float:
        return 1 / self.count


def resolution(rows: Iterable[Row], metric: str) -> Resolution | None:
    """Returns the resolution of a validation metric, of several the coarsest; None if a run is no such fraction."""
    named = Metric.of(metric)
    if named is None or named.split != "val" or not is_percent(metric):
        return None
    found = []
    for run in (run for row in rows for run in row.counted(metric)):
        validation, value = run.origin.get("validation"), run.metric(metric) or 0.0
        if validation is None:
            return None
        correct = value * validation["count"]
        if abs(correct - round(correct)) > 1e-6:
            return None
        found.append(Resolution(validation["count"], validation["unit"]))
    return min(found, key=lambda each: each.count, default=None)


def _grouped(entries: Sequence[Record]) -> list[Row]:
    """Groups runs by configuration and data, in order of first appearance."""
    found: dict[str, list[list[Record]]] = {}
    for entry in entries:
        flat = flatten(entry.config)
        # null is as good as no key: configs of older versions have other ones.
        kept = {key: canonical(value) for key, value in flat.items() if distinguishes(key) and value is not None}
        key = hashlib.sha256(repr(sorted(kept.items(), key=lambda pair: pair[0])).encode()).hexdigest()[:16]
        same = found.setdefault(key, [])
        group = next((group for group in same if _has_same_data(group[0], entry)), None)
        group.append(entry) if group is not None else same.append([entry])
    groups = [(key, group, _data_labels(same)[i]) for key, same in found.items() for i, group in enumerate(same)]
    common = set.intersection(*(set(entry.overrides) for entry in entries)) if len(entries) > 1 else set()
    rows = []
    for key, runs, data in groups:
        own = [line for line in runs[0].overrides if line not in common and not line.startswith("--")]
        # A recipe is compared by the keys that it sets, and shown by its name.
        typed = [line for line in own if distinguishes(key_of(line)) or key_of(line) in ("experiment", "debug")]
        label = " ".join([*typed, *([f"({data})"] if data else [])])
        label = label or (str(runs[0].path) if len(groups) > 1 else "as configured")
        rows.append(Row(label, typed, runs, data=data, key=key))
    return rows


def _has_same_data(one: Record, other: Record) -> bool:
    """Compares the data by content, or by folder if a run did not record the content."""
    data = one.origin.get("data"), other.origin.get("data")
    if None in data:
        return _root(one) == _root(other)
    return not differs(*data)


def _root(run: Record) -> str:
    return str(flatten(run.config).get("data.root"))


def _data_labels(groups: Sequence[Sequence[Record]]) -> list[str]:
    """Names the data of groups of runs that differ in them only: by folder, or by number; "" for a single group."""
    if len(groups) == 1:
        return [""]
    roots = [f"data.root={_root(group[0])}" for group in groups]
    return roots if len(set(roots)) == len(roots) else [f"data {number}" for number in range(1, len(roots) + 1)]


def differs(one: Any, other: Any) -> bool:
    """Compares the keys that both have: a run may have read more splits than another."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return any(differs(one[key], other[key]) for key in one.keys() & other.keys())
    return one is not None and other is not None and one != other


def canonical(value: Any) -> Any:
    """Returns the hashable form that equal settings share: 1.0 as 1, as `optimizer.lr=1` is saved.

    Lists become tuples, mappings tuples of pairs, other YAML types (dates) text.
    """
    if isinstance(value, list | tuple):
        return tuple(map(canonical, value))
    if isinstance(value, Mapping):
        return tuple((str(key), canonical(item)) for key, item in value.items())
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    return value if value is None or isinstance(value, str | int | float) else str(value)


def distinguishes(key: str) -> bool:
    """Returns whether runs with different values of this key are different configurations."""
    if is_below(key, _ALSO_COMPARED):
        return True
    return role_of(key) in (Role.IDENTITY, Role.PROTOCOL, Role.LENGTH)


def is_number(value: object) -> TypeGuard[float]:
    """Returns whether the value is a finite number that can be averaged: sums of larger ones than 1e300 overflow."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e300


def of_common_seeds(rows: Sequence[Mapping[Seeds, float]]) -> list[Mapping[Seeds, float]]:
    """Reduces the seeds of each row to those with a name that all rows have."""
    names: Collection[str] = ()
    if rows and all(rows):
        names = set.intersection(*({name for name, _ in seeds} for row in rows for seeds in row))
    return [_at(names, row) for row in rows]


def _at(names: Collection[str], values: Mapping[Seeds, float]) -> Mapping[Seeds, float]:
    """Reduces the seeds to the named ones, unless runs differ in the others."""
    reduced = {tuple(pair for pair in seeds if pair[0] in names): value for seeds, value in values.items()}
    return reduced if len(reduced) == len(values) else values


def front(points: Sequence[Sequence[float]], directions: Sequence[Goal]) -> list[int]:
    """Returns the indices of the Pareto front: points that no other point dominates."""
    signs = [-1.0 if direction == "maximize" else 1.0 for direction in directions]
    costs = [tuple(sign * value for sign, value in zip(signs, point, strict=True)) for point in points]
    return [
        i
        for i, point in enumerate(costs)
        if not any(rival != point and all(x <= y for x, y in zip(rival, point, strict=True)) for rival in costs)
    ]
