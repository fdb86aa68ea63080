"""Groups runs into ranked configurations and computes the data of the report.

Computes curves over seeds, importance of keys, good learning rates, time to target.
"""

import math
import re
import shlex
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from dlopt.basics.errors import UserError, install
from dlopt.basics.folders import short_path
from dlopt.basics.formats import brief, printable
from dlopt.basics.formats import format_value as text
from dlopt.basics.names import Names
from dlopt.basics.plain_values import is_below
from dlopt.config.overrides import group_of, key_of
from dlopt.metrics.measures import MEASURES
from dlopt.metrics.names import column_of, direction_of, split_of
from dlopt.results.history import columns
from dlopt.results.intervals import Statistic, half_width, statistic
from dlopt.results.leaderboard import (
    FOLD,
    FOLDS,
    Leaderboard,
    Look,
    Row,
    directions_of,
    goal_of,
    is_number,
    leaderboard,
)
from dlopt.results.looks import looks
from dlopt.results.reading import OPEN, Damaged, Record, RunReader, short_key, varying_keys
from dlopt.results.remarks import Remark, remarks
from dlopt.results.verdict import verdict

DATA = "data read"
"""A key of `Configuration.values`: names the data of rows that differ in nothing else."""
_NOT_RANKED = [name for name, each in MEASURES.items() if not each.ranks]
_LR = "optimizer.lr"
_MIN_CONFIGURATIONS = 6  # for an estimate of importance
_MIN_EXPLAINED = 0.3  # of the variance of held-out configurations; noise alone rarely reaches it
_SMALLEST = 1e-300  # of a target that is rounded; the reciprocals of smaller numbers are out of range
_MAX_POINTS = 20_000  # of a curve; a plot cannot show more
_MANY_SEEDS = 5  # the 95 % confidence interval of three runs is 2.5 standard deviations to each side
_LISTED = 5  # seeds in a command; more of them are a range
_OVERRIDE = re.compile(r"([+~]{0,2}|--config-(?=dir=|name=))\w[\w./@-]*(=.*)?")
# How one run is stored and started. Other keys of these roles are needed to repeat it (device, experiment).
# `allow_packages`: whoever pastes the command of a run of others must not trust its packages by that.
_NOT_REPEATED = ("hydra", "name", "resume", "dry_run", "allow_packages")


@dataclass(frozen=True, kw_only=True)
class Configuration(Row):
    """A row of the leaderboard."""

    values: Mapping[str, Any]  # of the keys in which configurations differ, and `DATA`

    @property
    def in_words(self) -> str:
        """Its label for headlines and charts: adamw lr 0.01 no nesterov."""
        words = [_in_words(key, short_key(key, self.values), value) for key, value in self.values.items()]
        return printable(" ".join(words)) or self.label

    @property
    def command(self) -> str | None:
        """Shell command that repeats these runs; None if unknown."""
        if self.folds is not None:
            return self._command_of_folds()
        overrides = [_repeatable(run.overrides, "seed") for run in self.runs]
        seeds = sorted({seed for run in self.runs if isinstance(seed := run.config.get("seed"), int)})
        are_equal = all(lines == overrides[0] for lines in overrides) and 1 < len(seeds) == len(self.runs)
        if overrides[0] is None or not are_equal:
            return command(self.runs[0])
        return _shell(["-m", *overrides[0], f"seed={_values(seeds)}"])

    def _command_of_folds(self) -> str | None:
        """Returns the command of all its folds and seeds; None unless each fold has the same seeds."""
        overrides = [_repeatable(run.overrides, "seed", FOLD) for run in self.runs]
        pairs = {(run.config.get("seed"), run.fold) for run in self.runs}
        seeds, folds = ({value for pair in pairs if isinstance(value := pair[i], int)} for i in (0, 1))
        if overrides[0] is None or len(self.runs) == 1 or len({*map(str, overrides)}) > 1:
            return command(self.runs[0])
        if not len(seeds) * len(folds) == len(pairs) == len(self.runs):
            return command(self.runs[0])
        return _shell(["-m", *overrides[0], f"seed={_values(sorted(seeds))}", f"{FOLD}={_values(sorted(folds))}"])

    @property
    def needs(self) -> str:
        """Names the packages that `command` leaves out, for the reader to trust; "" if there are none."""
        typed = [each for each in self.runs[0].overrides if re.fullmatch(r"allow_packages=\[[\w.,]+\]", each)]
        return f"{typed[-1]}, if you trust this code" if typed else ""


@dataclass(frozen=True, eq=False)
class Ranking:
    """Data of the plots and the page. Rows without a value (failed or running) come last."""

    board: Leaderboard
    keys: Sequence[str]
    records: Sequence[Record]
    damaged: Sequence[Damaged]
    seen: Sequence[Look] = ()  # what was shown of the rows before

    @property
    def by(self) -> str:
        return self.board.metric

    @property
    def lower(self) -> bool:
        """Whether smaller values of `by` are better."""
        return self.board.direction == "minimize"

    @property
    def rows(self) -> Sequence[Configuration]:
        return cast("Sequence[Configuration]", self.board.rows)

    @property
    def verdict(self) -> str:
        """One sentence on the rows; "" if there is nothing to compare."""
        return verdict(self.board)

    @property
    def headline(self) -> tuple[str, str]:
        """The verdict with configurations in words, and what follows from it; "" if there is nothing to compare."""
        rows = [replace(row, label=row.in_words) for row in self.rows]
        sentence = verdict(replace(self.board, rows=rows)).removeprefix("verdict: ")
        head, _, rest = sentence.partition(": ")
        if head.startswith("#1 "):  # of labels that are too long for a list of them
            head = f"#1 ({rows[0].label}){head[2:]}"
        is_open = head.startswith("after")  # the last run
        return f"Verdict {head}" if is_open else head, rest[:1].upper() + rest[1:]

    @property
    def failed(self) -> list[Record]:
        return [record for record in self.records if record.status in ("failed", "unfinished")]

    @property
    def ranked(self) -> list[Configuration]:
        return [row for row in self.rows if row.value is not None]

    @property
    def best(self) -> Configuration | None:
        """The row that ranks first; None if several are tied: none of them is chosen by chance."""
        first = [row for row in self.rows if row.is_first]
        return first[0] if len(first) == 1 else None

    @cached_property
    def remarks(self) -> list[Remark]:
        return remarks(self.board)

    @property
    def most_seeds(self) -> int:
        """The distinct runs of the configuration that has most."""
        return max((len(row.distinct) for row in self.rows), default=0)

    def counts(self) -> dict[str, int]:
        """Returns status -> number of runs, most frequent first."""
        return dict(Counter(record.status for record in self.records).most_common())


def gather(
    records: Sequence[Record], damaged: Sequence[Damaged], by: str | None = None, *, seen: Sequence[Look] = ()
) -> Ranking:
    """Groups and ranks runs by metric `by`. Raises `UserError`.

    `by`: None for the objective of a search, else the metric of `monitored`, else val_accuracy, or val_loss if no run
    has it. `seen`: looks at the same rows, see `dlopt.results.looks`.
    """
    searches, direction = {record.search for record in records}, None
    search = searches.pop() if by is None and len(searches) == 1 else None
    if search is not None and search.direction is not None and split_of(search.objective or "test") != "test":
        by, direction = column_of(str(search.objective)), search.direction
    elif by is not None:
        by = _checked(by, records)
    # Runs on several devices form one configuration.
    keys = [key for key in varying_keys([record.config for record in records]) if key != "device"]
    rows = []
    board = leaderboard(records, metric=by, direction=direction, looks=seen)
    for row in board.rows:
        values = {key: row.runs[0].config[key] for key in keys if key in row.runs[0].config}
        values |= {DATA: row.data} if row.data else {}
        label = " ".join(f"{short_key(key, keys)}={brief(value)}" for key, value in values.items())
        label = printable(label or short_path(row.runs[0].path))
        rows.append(Configuration(**vars(row) | {"label": label, "values": values}))
    keys += [DATA] * any(row.data for row in rows)
    return Ranking(replace(board, rows=rows), keys, records, damaged, seen)


def _in_words(key: str, name: str, value: Any) -> str:
    """Returns a key and its value as words: adamw, lr 0.01, no nesterov, default init."""
    name = name.replace("_", " ")
    if value is True:
        return name
    if value is False or value is None or value == "none":
        return f"no {name}"
    if isinstance(value, str) and "." not in key:  # the choice of a group
        return f"{value} {name}" if value in ("default", "auto") else value.replace("_", " ")
    return f"{name} {brief(value)}"


def of_folder(folder: Path, *others: Path) -> Ranking:
    """Ranks the runs in a folder of a sweep, a search or several of them. `others`: further run folders.

    The end of a sweep and of a search, `dlopt sweep wait` and the commands that take a folder for its best run have
    this ranking, and `dlopt report` ranks the same way.
    """
    records, damaged = RunReader().read([folder, *others])
    return gather(records, damaged, seen=looks([folder], records))


def _checked(by: str, records: Sequence[Record]) -> str:
    """Returns the column of a metric by which the runs can be ranked. Raises `UserError` for another one."""
    names = dict.fromkeys(name for record in records for name in record.metrics)
    allowed = [name for name in names if name not in _NOT_RANKED and split_of(name) != "test"]
    by = column_of(by)
    if split_of(by) == "test":
        raise UserError(f"by={by}: ranking by a test metric would select on the test set; set by=val_accuracy")
    Names("metric of these runs", allowed, prefix="by=").check(by)
    if direction_of(by, directions_of(records)) is None:
        raise UserError(
            f"by={by}: no run says whether smaller or larger values of your own metric are better, or the runs "
            f"disagree; train with monitor={by} monitor_mode=min (or max), or rank by another metric"
        )
    return by


def command(run: Record) -> str | None:
    """Returns the shell command that repeats this run; None if unknown."""
    lines = _repeatable(run.overrides)
    return None if lines is None else _shell(lines)


def command_from(run: Record) -> str | None:
    """Returns the command that repeats the run from its folder, even if defaults have changed since."""
    flags = [word for word in run.overrides if word.startswith("--")]
    return _shell([*flags, f"from={short_path(run.path)}"])


def command_with(run: Record, arguments: Sequence[str], keys: Sequence[str]) -> str | None:
    """Returns a dlopt command with the run's overrides of `keys`; None if they are unknown."""
    lines = _repeatable(run.overrides)
    kept = [line for line in lines or () if line.startswith("--") or is_below(key_of(line), keys)]
    return None if lines is None else _shell([*kept, *arguments[1:]], arguments[:1])


def _repeatable(overrides: Iterable[str], *omitted: str) -> list[str] | None:
    """Returns the overrides without the run's location and the keys `omitted`; None if a line is not an override."""
    lines = list(overrides)
    if not lines or not all(_OVERRIDE.fullmatch(line) for line in lines):
        return None
    return [line for line in lines if group_of(line) not in (*_NOT_REPEATED, *omitted) and key_of(line) not in omitted]


def _values(seeds: Sequence[int]) -> str:
    """Formats the sorted values of a sweep: 0,1,2 or, of more than `_LISTED` without a gap, range(0,300)."""
    first, last = seeds[0], seeds[-1]
    if len(seeds) > _LISTED and last - first + 1 == len(seeds):
        return f"range({first},{last + 1})"
    return ",".join(map(str, seeds))


def _shell(words: Sequence[str], command: Sequence[str] = ("train",)) -> str | None:
    line = shlex.join(["dlopt", *command, *words])
    return line if printable(line) == line else None


# -- curves, importance of keys, good learning rates, time to a target


AXES: Mapping[str, str] = {"epoch": "epoch", "step": "update", "seconds": "seconds of training"}
"""Columns of the history against which curves are drawn, with their labels."""
Spread = Literal["range", "std", "error", "confidence"]
SPREADS: Mapping[Spread, str] = {
    "range": "lowest to highest run",
    "std": "± standard deviation",
    "error": "± standard error",
    "confidence": "95 % confidence interval",
}
"""Bands around the mean of a curve, with their labels."""


@dataclass(frozen=True)
class Band:
    """Mean over runs with bands [low, high] by their spread, which have no width for a single run.

    `x`: the positions on each of `AXES`.
    """

    x: Mapping[str, np.ndarray]
    mean: np.ndarray
    spreads: Mapping[Spread, tuple[np.ndarray, np.ndarray]]
    count: np.ndarray


def default_spread(ranking: Ranking) -> Spread:
    """Selects the band: the range for few seeds and for folds, the confidence interval for many seeds."""
    return "confidence" if ranking.board.blocks == "seeds" and ranking.most_seeds >= _MANY_SEEDS else "range"


def band(runs: Sequence[Record], metric: str) -> Band | None:
    """Computes the mean of `metric` at every epoch that at least half of the runs reach.

    The bands: from the lowest to the highest run (`range`), the mean plus and minus the standard deviation (`std`) or
    the standard error (`error`), and Student's 95 % confidence interval of the mean. Epochs are `step` or `seconds`
    apart by their mean over the runs, so that every point averages the same epochs on each axis: averaging at equal
    seconds would jump where a slower run begins or ends.
    """
    names = (*AXES, metric)
    points = (columns(run.history, names) for run in runs)
    curves = [_thinned(known) for curve in points if len(known := curve[~np.isnan(curve[:, -1])])]
    if not curves:
        return None
    epochs = np.unique(np.concatenate([curve[:, 0] for curve in curves]))
    *positions, values = np.moveaxis(np.stack([_at(epochs, curve) for curve in curves]), 2, 0)
    if len(curves) == 1:
        x = {name: each[0] for name, each in zip(AXES, positions, strict=True)}
        return Band(x, values[0], dict.fromkeys(SPREADS, (values[0], values[0])), np.ones(len(epochs), int))
    count = np.isfinite(values).sum(0)
    kept = 2 * count >= len(curves)
    values, count = values[:, kept], count[kept]
    mean = np.nanmean(values, 0)
    # Divided by the largest: a diverged run may have a perplexity of 1e200, whose square is out of range.
    distances = values - mean
    largest = max(float(np.nanmax(np.abs(distances))), np.finfo(float).tiny)
    deviation = largest * np.sqrt(np.nansum((distances / largest) ** 2, 0) / np.maximum(count - 1, 1))
    widths = np.array([half_width(n) if n > 1 else 0.0 for n in count.tolist()])
    folds = runs[0].config.get(FOLDS)
    # Folds share training samples: see `dlopt.results.simultaneous`.
    shared = np.sqrt(1 + count / (folds - 1)) if isinstance(folds, int) and folds > 1 else 1.0
    halves: dict[Spread, np.ndarray] = {
        "std": deviation, "error": shared * deviation / np.sqrt(count), "confidence": shared * widths * deviation,
    }  # fmt: skip
    spreads = {spread: (mean - half, mean + half) for spread, half in halves.items()}
    spreads["range"] = np.nanmin(values, 0), np.nanmax(values, 0)
    x = {name: _mean_positions(each[:, kept]) for name, each in zip(AXES, positions, strict=True)}
    return Band(x, mean, spreads, count)


def _thinned(curve: np.ndarray) -> np.ndarray:
    """Returns evenly spaced lines of a long curve, with the first and the last."""
    if len(curve) <= _MAX_POINTS:
        return curve
    return curve[np.linspace(0, len(curve) - 1, _MAX_POINTS).round().astype(int)]


def _at(epochs: np.ndarray, curve: np.ndarray) -> np.ndarray:
    """Interpolates the columns of a curve (the first column is the epochs); NaN outside of it."""
    if np.array_equal(epochs, curve[:, 0]):
        return curve
    return np.stack([np.interp(epochs, curve[:, 0], column, left=np.nan, right=np.nan) for column in curve.T], 1)


def _mean_positions(positions: np.ndarray) -> np.ndarray:
    """Adds up the mean distances of the epochs; `positions`: [runs, epochs], NaN where a run has none."""
    widths = np.diff(positions, axis=1, prepend=0.0)
    mean = np.cumsum(np.nansum(widths, 0) / np.maximum(np.isfinite(widths).sum(0), 1))
    return np.where(np.isfinite(positions).any(0), mean, np.nan)


@dataclass(frozen=True)
class Importance:
    """Fraction of the metric's variance that each key explains alone; the rest is interactions and noise.

    `explained`: fraction of the variance of held-out configurations that the model explains from the keys.
    `missing`: message if Optuna is not installed.
    """

    fractions: Mapping[str, float]
    explained: float
    missing: str = ""


@lru_cache(maxsize=1)  # the plot and the page share it
def importance(ranking: Ranking) -> Importance | None:
    """Computes the functional ANOVA (Hutter, Hoos & Leyton-Brown 2014) of the configurations' means with Optuna.

    Numbers are replaced by their rank among the key's values, which gives each value the same weight on any scale. Keys
    that some configurations lack are categorical. Returns None for too few configurations, and where a random forest,
    which is the model of this analysis, cannot predict the configurations left out of its trees: the fractions would
    describe noise.
    """
    keys, rows = ranking.keys, ranking.ranked
    means = [row.value.mean for row in rows if row.value is not None]
    if len(rows) < _MIN_CONFIGURATIONS or not keys or min(means) == max(means):
        return None
    # To 0..1, which changes no fraction: the square of a diverged run's 1e200 is out of range.
    means = [(mean - min(means)) / (max(means) - min(means)) for mean in means]
    try:
        import optuna
    except ImportError:
        return Importance({}, 0.0, f"needs Optuna: {install('dlopt[sweep]')}")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    points: list[dict[str, Any]] = [{} for _ in rows]
    distributions: dict[str, optuna.distributions.BaseDistribution] = {}
    for key in keys:
        values: list[Any] = [row.values.get(key) for row in rows]
        if all(map(is_number, values)):
            ranks = {value: float(i) for i, value in enumerate(sorted(set(values)))}
            distributions[key] = optuna.distributions.FloatDistribution(-0.5, len(ranks) - 0.5)
            values = [ranks[value] for value in values]
        else:
            values = list(map(text, values))
            distributions[key] = optuna.distributions.CategoricalDistribution(sorted(set(values)))
        for point, value in zip(points, values, strict=True):
            point[key] = value
    explained = _explained(points, means)
    if explained < _MIN_EXPLAINED:
        return None
    study = optuna.create_study()
    study.add_trials(
        [
            optuna.create_trial(params=point, distributions=distributions, value=mean)
            for point, mean in zip(points, means, strict=True)
        ]
    )
    # Trees of more than 64 leaves do not change main effects, but take minutes for thousands of configurations.
    evaluator = optuna.importance.FanovaImportanceEvaluator(max_depth=6, seed=0)
    fractions = evaluator.evaluate(study, params=list(keys))
    return Importance({key: float(fraction) for key, fraction in fractions.items()}, explained)


def _explained(points: Sequence[Mapping[str, Any]], means: Sequence[float]) -> float:
    """Returns R^2 of a random forest on the configurations that each of its trees leaves out (Breiman 2001)."""
    from sklearn.ensemble import RandomForestRegressor

    names = sorted({(key, point[key]) for point in points for key in point if isinstance(point[key], str)})
    numbers = [key for key in points[0] if not isinstance(points[0][key], str)]
    inputs = [[*(point[key] for key in numbers), *(point[key] == name for key, name in names)] for point in points]
    forest = RandomForestRegressor(n_estimators=100, max_depth=6, oob_score=True, random_state=0)
    return float(forest.fit(np.array(inputs, dtype=float), means).oob_score_)


_WORSE, _WORSE_ACCURACY = 0.05, 0.01  # than the best: the metric of a good learning rate


def tolerance_text(ranking: Ranking) -> str:
    """Formats how much worse than the best a good learning rate may be."""
    return f"{100 * _WORSE:g} %" if ranking.lower else f"{100 * _WORSE_ACCURACY:g} percentage point"


@dataclass(frozen=True)
class Sensitivity:
    """Metric of one optimizer against its learning rate: all configurations, the best at each rate, good rates."""

    optimizer: str
    points: Sequence[tuple[float, Statistic, int]]  # learning rate, metric, row of the ranking
    best: Sequence[tuple[float, Statistic]]  # by learning rate
    good: tuple[float, float]  # the lowest and the highest good rate around the best
    tolerance: float
    failed: Sequence[float]  # learning rates at which runs failed


def sensitivities(ranking: Ranking) -> list[Sensitivity]:
    """Computes the sensitivity of each optimizer with several learning rates.

    Good rates are adjacent to the best rate with a metric at most `tolerance` worse: 5 % of the best for losses, 0.01
    for metrics that are better when larger, or the median standard deviation over seeds of all points if that is
    larger.
    """
    results = []
    by_optimizer: dict[str, list[tuple[int, Configuration]]] = {}
    for i, row in enumerate(ranking.rows):
        by_optimizer.setdefault(text(row.values.get("optimizer", "")), []).append((i, row))
    for group, rows in by_optimizer.items():
        rates = [(row.runs[0].config.get(_LR), row.value, i) for i, row in rows]
        points = sorted(
            ((float(lr), value, i) for lr, value, i in rates if is_number(lr) and lr > 0 and value is not None),
            key=lambda point: point[0],
        )
        if len({lr for lr, _, _ in points}) < 2:
            continue
        runs = [run for _, row in rows for run in row.runs if run.status == "failed"]
        failed = sorted({float(lr) for run in runs if is_number(lr := run.config.get(_LR)) and lr > 0})
        name = group or text(rows[0][1].runs[0].config.get("optimizer", "optimizer"))
        results.append(_sensitivity(name, points, failed, ranking))
    return results


def _sensitivity(
    name: str, points: Sequence[tuple[float, Statistic, int]], failed: Sequence[float], ranking: Ranking
) -> Sensitivity:
    sign = 1 if ranking.lower else -1
    best: dict[float, Statistic] = {}
    for lr, value, _ in points:
        if lr not in best or sign * value.mean < sign * best[lr].mean:
            best[lr] = value
    # The low median, because single rates that diverge for some seeds spread over orders of magnitude.
    spread = statistics.median_low([value.std for _, value, _ in points if value.std is not None] or [0.0])
    rates, costs = list(best), [sign * value.mean for value in best.values()]
    top = costs.index(min(costs))
    tolerance = max(spread, _WORSE * abs(costs[top]) if ranking.lower else _WORSE_ACCURACY)
    low = high = top
    while low > 0 and costs[low - 1] - costs[top] <= tolerance:
        low -= 1
    while high + 1 < len(rates) and costs[high + 1] - costs[top] <= tolerance:
        high += 1
    return Sensitivity(name, points, list(best.items()), (rates[low], rates[high]), tolerance, failed)


@dataclass(frozen=True)
class Reached:
    """First updates and seconds at which runs of a configuration reach the target; statistics over the runs that do.

    Counts all ended runs, including failed ones; running ones may still reach the target.
    """

    count: int
    runs: int
    steps: Statistic | None
    seconds: Statistic | None


TIMES: Mapping[str, str] = {"steps": "updates", "seconds": AXES["seconds"]}
"""The statistics of `Reached`, with their labels."""


def time_to_target(row: Configuration, by: str, target: float, lower: bool | None = None) -> Reached:
    """`lower`: whether smaller values are better; None for the direction of dlopt's metric."""
    lower = goal_of(by) == "minimize" if lower is None else lower
    sign = 1 if lower else -1
    runs = [run for run in row.distinct if run.status not in OPEN]
    good = [(run.history, columns(run.history, [by])[:, 0] * sign <= sign * target) for run in runs]
    reached = [history[int(is_good.argmax())] for history, is_good in good if is_good.any()]
    seconds = [line["seconds"] for line in reached if "seconds" in line]
    return Reached(len(reached), len(runs), statistic([line["step"] for line in reached]), statistic(seconds))


def fastest(ranking: Ranking, target: float) -> list[tuple[Configuration, Reached]]:
    """Returns the configurations that reach the target, by the fraction of runs that do, then by mean updates.

    The mean over a few lucky runs of one configuration is not comparable with the mean over all runs of another.
    """
    results = [(row, time_to_target(row, ranking.by, target, ranking.lower)) for row in ranking.ranked]
    reached = [(-each.count / each.runs, each.steps.mean, i) for i, (_, each) in enumerate(results) if each.steps]
    return [results[i] for *_, i in sorted(reached)]


def default_target(ranking: Ranking) -> float | None:
    """Returns a target that half of the configurations reach, rounded to the easier side."""
    return _target(ranking, 0.5) if ranking.ranked else None


def targets(ranking: Ranking) -> list[float]:
    """Returns targets that 10, 25, 50, 75 and 90 % of the configurations reach, rounded to the easier side."""
    return [_target(ranking, fraction) for fraction in (0.1, 0.25, 0.5, 0.75, 0.9)] if ranking.ranked else []


def _target(ranking: Ranking, fraction: float) -> float:
    means = [row.value.mean for row in ranking.ranked if row.value is not None]  # the best first
    value = means[int(fraction * len(means))]
    if abs(value) < _SMALLEST:
        return value
    scale = 10.0 ** (2 - math.floor(math.log10(abs(value))))
    return (math.ceil(value * scale) if ranking.lower else math.floor(value * scale)) / scale
