"""Which configuration is best, over seeds: means, deviations, paired differences, fronts of several objectives.

Pure: what runs left behind goes in as `Entry`s, `Row`s come out; nothing here reads files or prints. Rows are ranked by
a validation metric: a leaderboard ranked by test metrics would choose on the test set.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeGuard

from dlopt.plain import flatten

Direction = Literal["maximize", "minimize"]
Seeds = tuple[tuple[str, Any], ...]

ENDED = ("finished", "stopped_early")
HOUSEKEEPING = (
    "name", "resume", "allow_packages", "dry_run", "device", "threads", "checkpoint", "tracking", "log_every_steps",
    "data.workers", "data.memory", "data.root", "published",
)  # fmt: skip
"""Keys in which runs of one configuration may differ: where they run and what they write."""


@dataclass(frozen=True)
class Entry:
    """One run: `config` as config.yaml holds it (nested or flat), `overrides` as typed, `metrics` of summary.json."""

    name: str
    config: Mapping[str, Any]
    metrics: Mapping[str, Any]
    overrides: Sequence[str] = ()

    @property
    def status(self) -> str:
        return str(self.metrics.get("status", "unfinished"))

    @property
    def has_ended(self) -> bool:
        """Whether its metrics count: trained to its end, and not cut short by a pruner."""
        return self.status in ENDED and not self.is_pruned

    @property
    def is_pruned(self) -> bool:
        return bool(self.metrics.get("pruned", False))

    def metric(self, key: str) -> float | None:
        """A finite metric, or None."""
        value = self.metrics.get(key)
        return float(value) if is_number(value) else None

    @property
    def seeds(self) -> Seeds:
        """The values of all keys that are seeds: with these runs of two configurations are paired."""
        return tuple((key, value) for key, value in sorted(flatten(self.config).items()) if is_seed(key))


@dataclass(frozen=True)
class Statistic:
    """`std` is the sample's, with count - 1 below; None for a single value."""

    mean: float
    std: float | None
    count: int


@dataclass(frozen=True)
class Difference:
    """`mean` of the paired differences with its confidence interval; None where one pair gives none."""

    mean: float
    low: float | None
    high: float | None
    count: int


@dataclass(frozen=True)
class Row:
    """One configuration: its runs, which differ in their seeds only."""

    label: str
    overrides: Sequence[str]
    runs: Sequence[Entry]
    value: Statistic | None = None  # of the metric that ranks; None where no run has it
    difference: Difference | None = None  # to the first row, over the seeds that both have; None for the first

    def statistic(self, metric: str) -> Statistic | None:
        """Mean, deviation and count of any metric over the runs that have ended and have it."""
        return statistic([v for run in self.runs if run.has_ended and (v := run.metric(metric)) is not None])

    @property
    def failed(self) -> int:
        return sum(run.status == "failed" for run in self.runs)

    def by_seeds(self, metric: str) -> dict[Seeds, float]:
        return {run.seeds: v for run in self.runs if run.has_ended and (v := run.metric(metric)) is not None}


@dataclass(frozen=True)
class Leaderboard:
    metric: str
    direction: Direction
    rows: Sequence[Row] = field(default_factory=tuple)

    @property
    def best(self) -> Row | None:
        return self.rows[0] if self.rows and self.rows[0].value is not None else None


def default_metric(entries: Sequence[Entry]) -> str:
    """`best_val_accuracy` where any run has it, else `best_val_loss`."""
    has_accuracy = any(entry.metric("best_val_accuracy") is not None for entry in entries)
    return "best_val_accuracy" if has_accuracy else "best_val_loss"


def direction_of(metric: str) -> Direction:
    """Accuracies are to be large; losses, seconds, parameters and all others small."""
    return "maximize" if "accuracy" in metric else "minimize"


def leaderboard(
    entries: Sequence[Entry],
    *,
    metric: str | None = None,
    direction: Direction | None = None,
    confidence: float = 0.95,
) -> Leaderboard:
    """Rows by the mean of `metric` over seeds, the best first, those without a value last."""
    metric = default_metric(entries) if metric is None else metric
    direction = direction_of(metric) if direction is None else direction
    sign = -1.0 if direction == "maximize" else 1.0
    rows = [replace(row, value=row.statistic(metric)) for row in _grouped(entries)]
    rows.sort(key=lambda row: math.inf if row.value is None else sign * row.value.mean)
    if not rows:
        return Leaderboard(metric, direction)
    first = rows[0].by_seeds(metric)
    compared = [replace(row, difference=paired_difference(row.by_seeds(metric), first, confidence)) for row in rows[1:]]
    return Leaderboard(metric, direction, [rows[0], *compared])


def _grouped(entries: Sequence[Entry]) -> list[Row]:
    """A row for each configuration, in the order in which they first appear."""
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        flat = flatten(entry.config)
        kept = {key: value for key, value in flat.items() if not _is_aside(key)}
        groups.setdefault(repr(sorted(kept.items(), key=lambda pair: pair[0])), []).append(entry)
    common = set.intersection(*(set(entry.overrides) for entry in entries)) if len(entries) > 1 else set()
    rows = []
    for runs in groups.values():
        keys = {line: line.lstrip("+~").partition("=")[0] for line in runs[0].overrides}
        typed = [line for line, key in keys.items() if line not in common and not _is_aside(key)]
        label = " ".join(typed) or (runs[0].name if len(groups) > 1 else "as configured")
        rows.append(Row(label, typed, runs))
    return rows


def _is_aside(key: str) -> bool:
    return is_seed(key) or is_one_of(key, HOUSEKEEPING)


def is_one_of(key: str, names: Sequence[str]) -> bool:
    """Whether `key` is one of `names` or lies below one (data.root is below data)."""
    return any(key == each or key.startswith(f"{each}.") for each in names)


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_seed(key: str) -> bool:
    """`seed`, `init_seed`, `data.seed`, ..."""
    name = key.rpartition(".")[2]
    return name == "seed" or name.endswith("_seed")


def statistic(values: Sequence[float]) -> Statistic | None:
    """None for no values."""
    if not values:
        return None
    mean, count = math.fsum(values) / len(values), len(values)
    squares = math.fsum((value - mean) ** 2 for value in values)
    return Statistic(mean, math.sqrt(squares / (count - 1)) if count > 1 else None, count)


def paired_difference(
    a: Mapping[Seeds, float], b: Mapping[Seeds, float], confidence: float = 0.95
) -> Difference | None:
    """a - b over the keys that both have, with the confidence interval of Student's t; None where they share none.

    Pairing takes away what a seed does to both: the interval is that of the mean of the differences.
    """
    differences = statistic([a[key] - b[key] for key in a if key in b])
    if differences is None:
        return None
    if differences.std is None:
        return Difference(differences.mean, None, None, 1)
    half = student_t(confidence, differences.count - 1) * differences.std / math.sqrt(differences.count)
    return Difference(differences.mean, differences.mean - half, differences.mean + half, differences.count)


def student_t(confidence: float, degrees: int) -> float:
    """The half width, in standard errors, of a two-sided interval (2.776 for 95 % and 4 degrees of freedom)."""
    from scipy.special import stdtrit

    return float(stdtrit(degrees, 0.5 + confidence / 2))


def front(points: Sequence[Sequence[float]], directions: Sequence[Direction]) -> list[int]:
    """The Pareto front: numbers of the points that no other is at least as good as everywhere and better somewhere."""
    signs = [-1.0 if each == "maximize" else 1.0 for each in directions]
    costs = [tuple(sign * value for sign, value in zip(signs, point, strict=True)) for point in points]
    return [
        i
        for i, own in enumerate(costs)
        if not any(other != own and all(x <= y for x, y in zip(other, own, strict=True)) for other in costs)
    ]
