"""What a report computes from a table: curves over seeds, importance of keys, good learning rates, time to a target."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from dlopt.analysis.leaderboard import Statistic, direction_of, statistic, student_t
from dlopt.analysis.report.keys import text
from dlopt.analysis.report.reading import Record, is_number
from dlopt.analysis.report.table import Configuration, Table

LR = "optimizer.lr"
_GRID = 80  # points of a curve against seconds, where the runs of a configuration have no points in common
_FEWEST = 6  # configurations from which importance is estimated


@dataclass(frozen=True)
class Band:
    """A mean over runs, and its confidence interval where there are two or more."""

    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    count: np.ndarray


def band(runs: Sequence[Record], figure: str, against: str, confidence: float = 0.95) -> Band | None:
    """Pointwise mean of `figure` against `epoch`, `step` or `seconds`, with Student's interval of the mean.

    Between its epochs a run's curve is linear. A point is shown where at least half of the runs reach it.
    """
    curves = [np.array([(line[against], line[figure]) for line in run.metrics if figure in line and against in line])
              for run in runs]  # fmt: skip
    curves = [curve for curve in curves if len(curve)]
    if not curves:
        return None
    if against == "seconds":
        x = np.linspace(min(curve[0, 0] for curve in curves), max(curve[-1, 0] for curve in curves), _GRID)
    else:
        x = np.unique(np.concatenate([curve[:, 0] for curve in curves]))
    values = np.stack([np.interp(x, curve[:, 0], curve[:, 1], left=np.nan, right=np.nan) for curve in curves])
    count = np.isfinite(values).sum(0)
    kept = 2 * count >= len(curves)
    x, values, count = x[kept], values[:, kept], count[kept]
    mean = np.nanmean(values, 0)
    deviation = np.sqrt(np.nansum((values - mean) ** 2, 0) / np.maximum(count - 1, 1))
    half = np.array([student_t(confidence, n - 1) if n > 1 else 0.0 for n in count]) * deviation / np.sqrt(count)
    return Band(x, mean, mean - half, mean + half, count)


@dataclass(frozen=True)
class Importance:
    """Shares of a forest's variance over the configurations: of each key alone, and with its interactions.

    `fit`: how much of the figure's variance the forest explains for configurations that it has not seen.
    """

    alone: Mapping[str, float]
    total: Mapping[str, float]
    fit: float


@lru_cache(maxsize=1)  # for the picture and the page
def importance(table: Table, trees: int = 100) -> Importance | None:
    """First-order and total Sobol indices (Saltelli et al. 2010) of a random forest fitted to the configurations'
    means, as functional ANOVA does for hyperparameters (Hutter, Hoos, Leyton-Brown 2014).

    Keys are drawn independently of each other from their values in the table. None for too few configurations.
    """
    keys, rows = table.keys, table.ranked
    if len(rows) < _FEWEST or not keys:
        return None
    from sklearn.ensemble import RandomForestRegressor

    columns = [_columns([row.values.get(key) for row in rows]) for key in keys]
    data = np.concatenate(columns, 1)
    target = np.array([row.value.mean for row in rows if row.value is not None])
    if np.ptp(target) == 0:
        return None
    forest = RandomForestRegressor(trees, oob_score=True, random_state=0)
    forest.fit(data, target)
    starts = np.cumsum([0, *(column.shape[1] for column in columns)])
    parts = {key: slice(a, b) for key, a, b in zip(keys, starts[:-1], starts[1:], strict=True)}
    alone, total = _sobol(forest.predict, data, parts)
    return Importance(alone, total, float(forest.oob_score_))


def _columns(values: Sequence[Any]) -> np.ndarray:
    """A number as it is (nan where a configuration lacks the key), anything else one column per value."""
    if all(is_number(value) or value is None for value in values):
        return np.array([[math.nan if value is None else float(value)] for value in values])
    names = [text(value) for value in values]
    return np.array([[float(name == each) for each in sorted(set(names))] for name in names])


def _sobol(
    predict: Any, data: np.ndarray, parts: Mapping[str, slice], samples: int = 2048
) -> tuple[dict[str, float], dict[str, float]]:
    """Saltelli's estimators on two independent samples of the product of the keys' distributions."""
    random = np.random.default_rng(0)

    def draw() -> np.ndarray:
        drawn = np.empty((samples, data.shape[1]))
        for part in parts.values():
            drawn[:, part] = data[random.integers(len(data), size=samples), part]
        return drawn

    a, b = draw(), draw()
    of_a, of_b = predict(a), predict(b)
    variance = np.var(np.concatenate([of_a, of_b]))
    alone, total = {}, {}
    for key, part in parts.items():
        mixed = a.copy()
        mixed[:, part] = b[:, part]
        of_mixed = predict(mixed)
        scale = variance if variance > 0 else 1.0
        alone[key] = float(np.clip(np.mean((of_b - of_b.mean()) * (of_mixed - of_a)) / scale, 0, 1))
        total[key] = float(np.clip(np.mean((of_a - of_mixed) ** 2) / 2 / scale, 0, 1))
    return {key: min(share, total[key]) for key, share in alone.items()}, total


@dataclass(frozen=True)
class Sensitivity:
    """One optimizer's figure against its learning rate: every configuration, the best at each rate, the good rates."""

    optimizer: str
    points: Sequence[tuple[float, Statistic, int]]  # learning rate, figure, row of the table
    best: Sequence[tuple[float, Statistic]]  # by learning rate
    good: tuple[float, float]  # the lowest and the highest good rate around the best
    tolerance: float
    failed: Sequence[float]  # learning rates at which runs failed


def sensitivities(table: Table) -> list[Sensitivity]:
    """For each optimizer with several learning rates.

    Good are the rates next to the best whose figure is at most `tolerance` worse: 0.01 for an accuracy, 5 % of the best
    for other figures, or the standard deviation over seeds (pooled) where that is larger.
    """
    found = []
    groups = dict.fromkeys(text(row.values.get("optimizer", "")) for row in table.rows)
    for group in groups:
        rows = [(i, row) for i, row in enumerate(table.rows) if text(row.values.get("optimizer", "")) == group]
        rates = [(row.runs[0].config.get(LR), row.value, i) for i, row in rows]
        points = sorted(
            ((float(lr), value, i) for lr, value, i in rates if is_number(lr) and lr > 0 and value is not None),
            key=lambda point: point[0],
        )
        if len({lr for lr, _, _ in points}) < 2:
            continue
        runs = [run for _, row in rows for run in row.runs if run.status == "failed"]
        failed = sorted({float(lr) for run in runs if is_number(lr := run.config.get(LR)) and lr > 0})
        name = group or text(rows[0][1].runs[0].config.get("optimizer", "optimizer"))
        found.append(_sensitivity(name, points, failed, table))
    return found


def _sensitivity(
    name: str, points: Sequence[tuple[float, Statistic, int]], failed: Sequence[float], table: Table
) -> Sensitivity:
    sign = 1 if table.lower else -1
    best: dict[float, Statistic] = {}
    for lr, value, _ in points:
        if lr not in best or sign * value.mean < sign * best[lr].mean:
            best[lr] = value
    spread = [(value.std, value.count) for _, value, _ in points if value.std is not None]
    pooled = math.sqrt(sum((n - 1) * s * s for s, n in spread) / sum(n - 1 for _, n in spread)) if spread else 0.0
    rates = list(best)
    top = min(range(len(rates)), key=lambda i: sign * best[rates[i]].mean)
    least = 0.01 if direction_of(table.by) == "maximize" else 0.05 * abs(best[rates[top]].mean)
    tolerance = max(pooled, least)

    def is_good(i: int) -> bool:
        return sign * (best[rates[i]].mean - best[rates[top]].mean) <= tolerance

    low = high = top
    while low > 0 and is_good(low - 1):
        low -= 1
    while high + 1 < len(rates) and is_good(high + 1):
        high += 1
    return Sensitivity(name, points, list(best.items()), (rates[low], rates[high]), tolerance, failed)


@dataclass(frozen=True)
class Reached:
    """Where the runs of a configuration first met the target; means over those that did."""

    count: int
    runs: int
    steps: Statistic | None
    seconds: Statistic | None


def time_to_target(row: Configuration, by: str, target: float) -> Reached:
    lower = direction_of(by) == "minimize"
    lines = [first_at(run, by, target, lower) for run in row.runs]
    met = [line for line in lines if line is not None]
    seconds = [line["seconds"] for line in met if "seconds" in line]
    return Reached(len(met), len(row.runs), statistic([line["step"] for line in met]), statistic(seconds))


def first_at(run: Record, by: str, target: float, lower: bool) -> Mapping[str, float] | None:
    """The first evaluated epoch whose figure is at least as good as the target."""
    good = (line for line in run.metrics if by in line and (line[by] <= target if lower else line[by] >= target))
    return next(good, None)


def default_target(table: Table) -> float | None:
    """A figure that half of the configurations reach, rounded to the easier side."""
    means = sorted(row.value.mean for row in table.ranked if row.value is not None)
    if not means:
        return None
    median = means[len(means) // 2] if table.lower else means[(len(means) - 1) // 2]
    scale = 10.0 ** (2 - math.floor(math.log10(abs(median)))) if median else 1.0
    rounded = math.ceil(median * scale) if table.lower else math.floor(median * scale)
    return rounded / scale
