"""Computes the content of a report page. Its script draws these numbers and texts, and averages and smooths curves.

Shows test metrics only for the first row unless `test` is true, because comparing them would select on the test set.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dlopt.basics.folders import ENDED, short_path
from dlopt.basics.formats import brief, printable
from dlopt.basics.formats import format_value as text
from dlopt.basics.plain_values import regular_tail
from dlopt.metrics.names import direction_of, in_words
from dlopt.metrics.shown import expendable_in, format_metric, is_percent, listed_in, unit_of, words
from dlopt.results import drawing
from dlopt.results.columns import (
    COSTS,
    FIRST,
    difference_text,
    failure_text,
    metric_columns,
    on_named_sets,
    statistic_text,
    tags_text,
    test_columns,
)
from dlopt.results.history import History, columns
from dlopt.results.intervals import Statistic, half_width
from dlopt.results.leaderboard import Record, directions_of
from dlopt.results.page_tests import test_of
from dlopt.results.plots import AxisScale
from dlopt.results.ranking import (
    AXES,
    SPREADS,
    TIMES,
    Configuration,
    Ranking,
    Reached,
    Sensitivity,
    command,
    command_from,
    command_with,
    default_spread,
    fastest,
    sensitivities,
    targets,
    time_to_target,
    tolerance_text,
)
from dlopt.results.reading import diagnostics, is_number, short_key
from dlopt.results.remarks import lines, mark, texts
from dlopt.results.tables import Section, Table

_POINTS = 120_000  # values of curves per page; curves are thinned above it
_FEWEST_POINTS = 12
_FINE, _FINER = 50, 4  # the best configurations, and how many times more points their curves have
_LOG, _ALL_LOGS = 4_000, 200_000  # characters of a run's log, and of all of them
_LOG_READ = 16_000  # bytes: the result of a run, which may be hidden, is longer than what is shown
_LONGEST = 300  # characters of a line or a value
_MOST_AXES = 9  # keys of the parallel coordinates
_MOST_TESTS = 4  # runs, the first ones, whose tests are shown with samples of the data
_TEST = re.compile(r"^test +\S.*|\btest_\w+[ =:]+\S+( %)?")  # metrics in a log
_RESULT = re.compile(r"\w+ after [\d,.]+ epochs?, [\d,]+ steps?( in |$)")  # the line above the metrics of a test
_HIDDEN = "(test metrics hidden)"
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")  # colours and the like, in the log of a terminal


def page_data(
    ranking: Ranking, *, target: float | None, test: bool, refresh: float | None, sections: Sequence[Section] = ()
) -> dict[str, Any]:
    """Returns the JSON data of the page's script."""
    metrics = _Metrics(metric_columns(ranking), test_columns(ranking), is_test_of_all=test)
    observed = {run.path: found for run in ranking.records if (found := diagnostics(run))}
    most_first = sorted((found.latest() for found in observed.values()), key=len, reverse=True)  # layers in their order
    tags = dict.fromkeys(name for latest in most_first for name in latest if name not in AXES)
    curves = [*_curve_names(ranking), *tags]
    shared = _shared_config(ranking)
    expendable = [*on_named_sets(ranking, FIRST), *expendable_in("leaderboard")]
    return {
        "refresh": refresh,
        "by": ranking.by,
        "lower": ranking.lower,
        "titles": {name: name if name in tags else words(name) for name in (ranking.by, *curves)},
        "percent": [name for name in (ranking.by, *curves) if is_percent(name)],
        "points": [name for name in (ranking.by, *curves) if unit_of(name) == "points"],
        "keys": list(ranking.keys),
        "columns": _columns(ranking, metrics.of_table),
        # Hidden, the first ones first, until the table fits the page; the reader may choose others.
        "expendable": [name for name in expendable if name in metrics.known and name != ranking.by],
        "ranked": _ranked_by(ranking),
        "remarks": lines(ranking.remarks, len(ranking.rows)),
        "searched": any(run.search for run in ranking.records),
        "rows": _rows(ranking, metrics, curves, observed, shared, sections),
        "curves": curves,
        "tags": [*tags],
        "config": shared,
        "spreads": {**SPREADS, "none": "none"},
        # By the number of values; one value has no band.
        "half_widths": [0, 0, *(round(half_width(count), 6) for count in range(2, len(ranking.records) + 1))],
        "spread": default_spread(ranking),
        "repeated": any(len(row.runs) > 1 for row in ranking.rows),
        "sensitivity": _sensitivity(ranking),
        "tolerance": tolerance_text(ranking),
        "parallel": _parallel(ranking),
        "times": [] if target is None or ranking.by not in curves else _times(ranking, target),
        "failed": _failures(ranking),
    }


# -- the leaderboard


@dataclass(frozen=True)
class _Metrics:
    """The metrics of the leaderboard.

    Attributes:
        known: of training and validation, and costs.
        tests: of the test set.
        is_test_of_all: whether `tests` are shown of all rows, or of #1 only.
    """

    known: Sequence[str]
    tests: Sequence[str]
    is_test_of_all: bool

    @property
    def of_table(self) -> list[str]:
        """The metrics that are columns."""
        return [*self.known, *self.tests] if self.is_test_of_all else list(self.known)

    def tests_of(self, row: Configuration) -> Sequence[str]:
        """Returns the test metrics that are shown of a row."""
        return self.tests if self.is_test_of_all or row.is_first else []


def _ranked_by(ranking: Ranking) -> str:
    has_spread = any(len(row.runs) > 1 for row in ranking.rows)
    blocks = ranking.board.blocks
    spread = f": mean ± standard deviation over {blocks}" if has_spread else ""
    is_paired = any(row.difference is not None and row.difference.low is not None for row in ranking.rows)
    note = f" “vs. best” is paired over {blocks}, with 95 % intervals for the whole table." if is_paired else ""
    epoch = "best" if blocks == "seeds" else "last"
    return (
        f"Ranked by {in_words(ranking.by)}{spread}. All metrics are of the {epoch} epoch, costs of the whole run.{note}"
    )


def _columns(ranking: Ranking, metrics: Sequence[str]) -> list[dict[str, Any]]:
    """Returns the columns in their order; `_cells` has their cells by `id`."""
    columns: list[dict[str, Any]] = [{"id": "rank", "name": "#", "number": True}]
    for key in ranking.keys:
        are_numbers = all(is_number(row.values.get(key, 0)) for row in ranking.rows)
        name = short_key(key, ranking.keys)
        columns.append({"id": _key_id(key), "name": name, "full": key, "number": are_numbers})
    columns.append({"id": "runs", "name": "runs", "number": True})
    directions = directions_of(ranking.records)
    is_compared = any(row.difference is not None for row in ranking.rows)
    for name in metrics:
        is_higher_better = not ranking.lower if name == ranking.by else direction_of(name, directions) == "max"
        columns.append({"id": name, "name": words(name), "number": True, "higher": is_higher_better})
        if name == ranking.by and is_compared:
            unit = " (points)" if is_percent(name) else ""
            columns.append({"id": "difference", "name": f"vs. best{unit}", "number": True})
    return columns


def _cells(
    ranking: Ranking, row: Configuration, rank: int, statistics: Mapping[str, Statistic | None]
) -> dict[str, list[Any]]:
    """Returns by `id` of a column the value to sort by and the text. `statistics`: of the metrics."""
    place = [None if row.rank is None else rank, row.place]
    cells: dict[str, list[Any]] = {"rank": place, "runs": [len(row.runs), row.count(ranking.by)]}
    for key in ranking.keys:
        if key in row.values:
            cells[_key_id(key)] = [_value(row.values[key]), printable(brief(row.values[key]))]
        else:
            cells[_key_id(key)] = [None, "-"]
    for name, statistic in statistics.items():
        is_unknown = statistic is None and row.value is not None and name in COSTS  # of an older run
        shown = "unknown" if is_unknown else _minus(statistic_text(name, statistic))
        cells[name] = [None if statistic is None else statistic.mean, shown]
    if row.difference is None:
        cells["difference"] = [None, "" if rank == 1 else "-"]
    else:
        cells["difference"] = [row.difference.mean, _minus(difference_text(ranking.by, row.difference))]
    return cells


def _minus(text: str) -> str:
    """Replaces the hyphen before a number by a minus sign, except in 1e-05."""
    return re.sub(r"(?<!\w)-(?=\d)", "−", text)


def _key_id(key: str) -> str:
    """Returns the `id` of the column of a config key, which may have the name of a metric."""
    return f"key {key}"


def _rows(
    ranking: Ranking,
    metrics: _Metrics,
    curves: Sequence[str],
    observed: Mapping[Path, History],
    shared: Mapping[str, str],
    sections: Sequence[Section],
) -> list[dict[str, Any]]:
    """Returns the configurations with their runs. `observed`: their diagnostics; `shared`: the config that all have."""
    points = _points_per_curve(ranking, curves)
    log_size = _ALL_LOGS // max(1, len(ranking.records))
    rows, tests = [], 0
    for rank, row in enumerate(ranking.rows, 1):
        is_test_shown = metrics.is_test_of_all or row.is_first
        count = max(points * (_FINER if rank <= _FINE else 1), _FEWEST_POINTS)
        details = [name for name in dict.fromkeys([ranking.by, *listed_in("details")]) if _has(row, name)]
        distinct = {id(run) for run in row.distinct}
        runs = []
        for run in row.runs:
            data = _run(run, details)
            data["distinct"] = id(run) in distinct
            history = History([*run.history, *observed[run.path]]) if run.path in observed else run.history
            data |= _curves(history, curves, count)
            data["log"] = _log(run, log_size, is_test_shown=is_test_shown)
            data["config"] = _own_config(run, shared)
            data["sections"] = _sections(run, sections)
            if tests < _MOST_TESTS and (test := test_of(run.path, is_test_shown=is_test_shown)) is not None:
                tests += 1
                data["test"] = test
            runs.append(data)
        entry = _row(ranking, row, rank, metrics)
        rows.append({**entry, "heads": [words(name) for name in details], "runs": runs})
    return rows


def _has(row: Configuration, name: str) -> bool:
    """Returns whether any run of the configuration has a metric."""
    return any(name in run.metrics for run in row.runs)


def _row(ranking: Ranking, row: Configuration, rank: int, metrics: _Metrics) -> dict[str, Any]:
    """Returns a configuration without its runs. `facts`: title and text; `tested`: titles of those of the test."""
    tests = metrics.tests_of(row)
    statistics = {name: row.statistic(name) for name in (*metrics.known, *tests)}
    facts = []
    for name, statistic in statistics.items():
        if statistic is not None or name in metrics.known:
            facts.append([words(name), _minus(statistic_text(name, statistic))])
    return {
        "rank": rank,
        "label": row.in_words,
        "typed": row.label,
        "mark": mark(ranking.remarks, rank),
        "difference": None
        if row.difference is None
        else [row.difference.mean, row.difference.low, row.difference.high],
        "values": {key: _value(value) for key, value in row.values.items()},
        "ranked": row.value is not None,
        "cells": _cells(ranking, row, rank, {name: statistics[name] for name in metrics.of_table}),
        "note": _not_ended(row),
        "bad": row.failed > 0,
        "facts": facts + _labels(row),
        "tested": [words(name) for name in tests],
        "remarks": texts(ranking.remarks, rank),
        "about": _about_tests(ranking, row, is_shown=bool(tests), is_all=metrics.is_test_of_all),
        "command": row.command,
    }


def _about_tests(ranking: Ranking, row: Configuration, *, is_shown: bool, is_all: bool) -> str:
    """Says why test metrics are hidden, or shown for #1 only."""
    if is_shown:
        chosen = "The only unbiased values: #1 was selected on the validation set."
        return "" if is_all or len(ranking.records) == 1 else chosen
    if row.is_first:
        return ""
    return (
        "Test metrics are shown for the first row only, to avoid selection on the test set. Show all with "
        "dlopt report test=true."
    )


def _not_ended(row: Configuration) -> str:
    """Counts the runs that have not ended by their status: 1 failed, 2 running. Not if the count says that already."""
    if row.is_pruned:
        return ""
    counts = Counter(run.status for run in row.runs if run.status not in ENDED)
    return ", ".join(f"{count} {status}" for status, count in counts.items())


def _labels(row: Configuration) -> list[list[str]]:
    """Returns the tags and the notes of the runs, and what their command leaves out, with their titles."""
    notes = [printable(str(run.config["note"])) for run in row.runs if run.config.get("note")]
    texts = {"tags": tags_text(row), "note": "; ".join(dict.fromkeys(notes)), "command needs": row.needs}
    return [[title, text] for title, text in texts.items() if text]


def _value(value: Any) -> Any:
    return value if is_number(value) else printable(brief(value))


def _failures(ranking: Ranking) -> list[list[str | None]]:
    """Returns the failed runs: folder, configuration, seed, reason and command."""
    labels = {run.path: row.label for row in ranking.rows for run in row.runs}
    failures = []
    for run in ranking.failed:
        line = command(run) or command_from(run)
        failures.append([_path(run), labels[run.path], _seed(run), failure_text(run), line])
    return failures


# -- runs


def _run(run: Record, metrics: Sequence[str]) -> dict[str, Any]:
    return {
        "id": _path(run),
        "seed": _seed(run),
        "status": run.status.replace("_", " "),
        "metrics": [_minus(format_metric(name, run.metrics.get(name))) for name in metrics],
        "command": command(run),
        "from": command_from(run),
    }


def _path(run: Record) -> str:
    return printable(short_path(run.path))


def _seed(run: Record) -> str:
    fold = "" if run.fold is None else f", fold {run.fold}"
    return printable(f"{brief(run.config.get('seed'))}{fold}")


def _shared_config(ranking: Ranking) -> dict[str, str]:
    """Returns the keys and values that all runs have."""
    configs = [run.config for run in ranking.records]
    if not configs:
        return {}
    shared = {}
    for key, value in configs[0].items():
        is_shared = all(key in each for each in configs)
        if is_shared and len({text(each[key]) for each in configs}) == 1:
            shared[printable(key)] = _setting(value)
    return shared


def _own_config(run: Record, shared: Mapping[str, str]) -> dict[str, str]:
    """Returns the keys and values of a run without those in `shared`."""
    own = {}
    for key, value in run.config.items():
        if printable(key) not in shared:
            own[printable(key)] = _setting(value)
    return own


def _setting(value: Any) -> str:
    return _cut(printable(text(value)))


def _cut(line: str) -> str:
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}…"


def _log(run: Record, limit: int, *, is_test_shown: bool) -> list[str]:
    """Returns the last lines of output.log, which runs of a sweep have, or of train.log; [] if there is none.

    `limit`: characters. Test metrics are hidden where the tables hide them.
    """
    for name in ("output.log", "train.log"):
        try:
            content = regular_tail(run.path / name, _LOG_READ)
        except (OSError, ValueError):
            continue
        shown = []
        for line in content.decode(errors="replace").splitlines()[len(content) == _LOG_READ :]:  # not the end of a line
            plain = printable(_CONTROL.sub("", line))
            shown.append(_cut(plain if is_test_shown else _TEST.sub(_HIDDEN, plain)))
            if not is_test_shown and _RESULT.search(plain):
                shown.append(_HIDDEN)
                break
        while sum(map(len, shown)) > min(_LOG, limit):
            del shown[0]
        return shown
    return []


def _sections(run: Record, sections: Sequence[Section]) -> list[dict[str, Any]]:
    """Returns the notes of packages about a run."""
    found = []
    for section in sections:
        own = section.runs.get(run.path)
        if own is None:
            continue
        table = Table([], [], texts=0) if own.table is None else own.table
        found.append(
            {
                "title": printable(section.title),
                "urgent": own.is_urgent,
                "lines": [_cut(printable(line)) for line in own.lines],
                "command": command_with(run, own.arguments, own.keys) if own.arguments else None,
                "heads": [printable(head) for head in table.heads],
                "texts": table.texts,
                "rows": [[_cut(printable(cell)) for cell in row] for row in table.rows],
            }
        )
    return found


# -- curves


def _curve_names(ranking: Ranking) -> list[str]:
    """Returns the metrics logged per epoch, the metrics in `FIRST` first."""
    logged: dict[str, None] = {}  # in order
    for record in ranking.records:
        if record.history:
            logged |= dict.fromkeys(record.history[0])
            logged |= dict.fromkeys(record.history[-1])
    ordered = [name for name in FIRST if name in logged]
    ordered += [name for name in logged if name not in FIRST]
    return [name for name in ordered if name not in AXES]


def _points_per_curve(ranking: Ranking, names: Sequence[str]) -> int:
    """Returns how many points the curves of a run may have in a page of `_POINTS` values; the best have more."""
    shares = 0
    for rank, row in enumerate(ranking.rows, 1):
        shares += len(row.runs) * (_FINER if rank <= _FINE else 1)
    return _POINTS // max(1, shares * (len(names) + 1))


def _curves(history: Sequence[Mapping[str, float]], names: Sequence[str], count: int) -> dict[str, Any]:
    """Returns the curves of a run: by metric, the index of its positions in `x` and its values.

    Curves of more than `count` epochs are thinned to evenly spaced ones. Metrics of the same epochs share `x`: the
    positions on each axis on which all of them are known.
    """
    x: list[dict[str, list[float]]] = []
    curves: dict[str, list[Any]] = {}
    if not history:
        return {"x": x, "curves": curves}
    known = columns(history, (*AXES, *names)).T
    positions = dict(zip(AXES, known, strict=False))
    indices: dict[bytes, int] = {}  # in `x`, by the epochs
    for name, values in zip(names, known[len(AXES) :], strict=True):
        epochs = _thinned(np.flatnonzero(np.isfinite(values)), count)
        if not len(epochs):
            continue
        if epochs.tobytes() not in indices:
            indices[epochs.tobytes()] = len(x)
            x.append(_known_positions(positions, epochs))
        digits = 4 if len(values) > count else 6
        curves[name] = [indices[epochs.tobytes()], _rounded(values[epochs], digits)]
    return {"x": x, "curves": curves}


def _thinned(epochs: np.ndarray, count: int) -> np.ndarray:
    """Returns at most `count` evenly spaced epochs, with the first and the last."""
    if not len(epochs):
        return epochs
    kept = np.linspace(0, len(epochs) - 1, min(count, len(epochs))).round().astype(int)
    return epochs[np.unique(kept)]


def _known_positions(positions: Mapping[str, np.ndarray], epochs: np.ndarray) -> dict[str, list[float]]:
    """Returns the positions of epochs on the axes on which all of them are known."""
    known = {}
    for axis, values in positions.items():
        if np.isfinite(values[epochs]).all():
            known[axis] = _rounded(values[epochs], 5 if axis == "seconds" else 9)
    return known


def _rounded(values: np.ndarray, digits: int) -> list[float]:
    """Rounds numbers to a number of digits; integers have no decimal point."""
    rounded = [float(f"{value:.{digits}g}") for value in values.tolist()]
    return [int(value) if value.is_integer() and abs(value) < 1e9 else value for value in rounded]


# -- the learning rate, parallel coordinates, time to targets


def _sensitivity(ranking: Ranking) -> dict[str, Any]:
    found = sensitivities(ranking)
    means = [value.mean for item in found for _, value, _ in item.points]
    optimizers = [_sensitivity_of_optimizer(each) for each in found]
    return {"optimizers": optimizers, "log": ranking.lower and drawing.spans_decades(means)}


def _sensitivity_of_optimizer(item: Sensitivity) -> dict[str, Any]:
    """Returns the points (rate, mean), the best ones (also the mean minus and plus std, runs), and the good rates."""
    best = []
    for lr, value in item.best:
        deviation = value.std or 0.0
        best.append([lr, value.mean, value.mean - deviation, value.mean + deviation, value.count])
    low, high = (f"{rate:.4g}" for rate in item.good)
    return {
        "name": printable(item.optimizer),
        "row": min(row for _, _, row in item.points),
        "points": [[lr, value.mean] for lr, value, _ in item.points],
        "best": best,
        "good": item.good,
        "good_text": low if low == high else f"{low} to {high}",
        "failed": list(item.failed),
    }


def _parallel(ranking: Ranking) -> dict[str, Any] | None:
    """Returns the axes with their ticks, and the positions of each row on them (None if it has no value)."""
    rows = ranking.ranked
    if len(ranking.keys) < 2 or len(rows) < 2:
        return None
    axes = []
    positions: list[list[float]] = []  # of all rows on each axis
    for key in list(ranking.keys)[:_MOST_AXES]:
        values = [row.values.get(key) for row in rows]
        scale = AxisScale(values)
        ticks = [[at, printable(label)] for at, label, _ in scale.ticks]
        axes.append({"id": key, "name": short_key(key, ranking.keys), "full": key, "ticks": ticks})
        positions.append(list(map(scale, values)))
    means = [row.value.mean for row in rows if row.value is not None]
    scale = AxisScale(means)
    ticks = [[at, format_metric(ranking.by, value)] for at, _, value in scale.ticks]
    axes.append({"id": ranking.by, "name": words(ranking.by), "full": ranking.by, "ticks": ticks})
    positions.append(list(map(scale, means)))
    lines = []
    for line in zip(*positions, strict=True):
        lines.append([None if math.isnan(at) else round(at, 4) for at in line])
    return {"axes": axes, "lines": lines}


def _times(ranking: Ranking, target: float) -> list[dict[str, Any]]:
    """Returns for each target the order of the configurations, beginning with those that reach it."""
    return [_times_to(ranking, goal) for goal in dict.fromkeys([target, *targets(ranking)])]


def _times_to(ranking: Ranking, target: float) -> dict[str, Any]:
    """Returns a target and its entries: configuration, runs that reach it, as text, whether others do not, bars."""
    first = fastest(ranking, target)
    fast = {id(row) for row, _ in first}
    others = [row for row in ranking.rows if id(row) not in fast]
    slow = [(row, time_to_target(row, ranking.by, target, ranking.lower)) for row in others]
    longest = {name: _longest(name, [reached for _, reached in first]) for name in TIMES}
    index = {id(row): i for i, row in enumerate(ranking.rows)}
    entries = []
    for row, reached in (*first, *slow):
        bars = [_bar(name, reached, longest[name]) for name in TIMES]
        is_pale = reached.count < reached.runs
        is_pruned = row.is_pruned and not reached.count
        runs = row.count(ranking.by) if is_pruned else f"{reached.count} of {reached.runs}"
        entries.append([index[id(row)], reached.count, runs, is_pale, *bars])
    return {"target": format_metric(ranking.by, target), "entries": entries}


def _longest(name: str, reached: Sequence[Reached]) -> float:
    """Returns the largest mean; 1 if there is none."""
    known: list[Statistic] = [getattr(each, name) for each in reached if getattr(each, name) is not None]
    return max((each.mean for each in known), default=0.0) or 1.0


def _bar(name: str, reached: Reached, longest: float) -> list[Any] | None:
    """Returns the text and the relative length of a bar; None if no run reaches the target."""
    value: Statistic | None = getattr(reached, name)
    return None if value is None else [statistic_text(name, value), value.mean / longest]
