"""Computes the content of a report page. Its script draws these numbers and texts, and averages and smooths curves.

Shows test metrics only for the first row unless `test` is true, because comparing them would select on the test set.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dlopt.basics.formats import brief, printable
from dlopt.basics.formats import format_value as text
from dlopt.basics.plain_values import regular_tail
from dlopt.metrics.names import in_words, mode_of
from dlopt.metrics.shown import expendable_in, format_metric, is_percent, listed_in, words
from dlopt.results import drawing
from dlopt.results.columns import (
    FIRST,
    difference_text,
    failure_text,
    metric_columns,
    statistic_text,
    tags_text,
    test_columns,
)
from dlopt.results.history import columns
from dlopt.results.leaderboard import ENDED, Record, modes_of, student_t
from dlopt.results.plots import SPREADS, AxisScale
from dlopt.results.ranking import (
    AXES,
    Configuration,
    Ranking,
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
from dlopt.results.reading import is_number, short_key
from dlopt.results.tables import Section
from dlopt.tracking.terminal_text import short_path

_POINTS = 120_000  # values of curves per page; curves are thinned above it
_FEWEST_POINTS = 12
_FINE, _FINER = 50, 4  # the best configurations, and how many times more points their curves have
_LOG, _ALL_LOGS = 4_000, 200_000  # characters of a run's log, and of all of them
_LONGEST = 300  # characters of a line or a value
_MOST_AXES = 9  # keys of the parallel coordinates
_TEST = re.compile(r"^test +\S.*|\btest_\w+[ =:]+\S+( %)?")  # metrics in a log
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")  # colours and the like, in the log of a terminal


def page_data(
    ranking: Ranking, *, target: float | None, test: bool, refresh: float | None, sections: Sequence[Section] = ()
) -> dict[str, Any]:
    """Returns the JSON data of the page's script."""
    metrics, tests = metric_columns(ranking), test_columns(ranking)
    curves = _curve_names(ranking)
    labels = {run.path: row.label for row in ranking.rows for run in row.runs}
    shared = _shared_config(ranking)
    points = _points_per_curve(ranking, curves)
    rows = []
    for rank, row in enumerate(ranking.rows, 1):
        data = _row(ranking, row, rank, metrics, tests if test or rank == 1 else [], is_all=test)
        distinct, count = set(map(id, row.distinct)), max(points * (_FINER if rank <= _FINE else 1), _FEWEST_POINTS)
        for run, each in zip(row.runs, data["runs"], strict=True):
            log = _log(run, _ALL_LOGS // len(ranking.records), is_test_shown=test or rank == 1)
            each |= {"distinct": id(run) in distinct, **_curves(run, curves, count), "log": log,
                     "config": _own_config(run, shared), "sections": _sections(run, sections)}  # fmt: skip
        rows.append(data)
    return {
        "refresh": refresh,
        "by": ranking.by,
        "lower": ranking.lower,
        "titles": {name: words(name) for name in (ranking.by, *curves)},
        "percent": [name for name in (ranking.by, *curves) if is_percent(name)],
        "keys": list(ranking.keys),
        "columns": _columns(ranking, metrics, tests if test else []),
        # Hidden, the first ones first, until the table fits the page; the reader may choose others.
        "expendable": [name for name in expendable_in("leaderboard") if name in metrics and name != ranking.by],
        "ranked": _ranked_by(ranking),
        "rows": rows,
        "curves": curves,
        "config": shared,
        "spreads": {**SPREADS, "none": "none"},
        "quantiles": [round(student_t(0.95, degrees), 6) for degrees in range(1, len(ranking.records))],
        "spread": default_spread(ranking),
        "repeated": any(len(row.runs) > 1 for row in ranking.rows),
        "sensitivity": _sensitivity(ranking),
        "tolerance": tolerance_text(ranking),
        "parallel": _parallel(ranking),
        "times": [] if target is None or ranking.by not in curves else _times(ranking, target),
        "failed": [_failure(run, labels[run.path]) for run in ranking.failed],
    }  # fmt: skip


# -- the leaderboard


def _columns(ranking: Ranking, metrics: Sequence[str], tests: Sequence[str]) -> list[dict[str, Any]]:
    columns: list[dict[str, Any]] = [{"id": "rank", "name": "#", "number": True}]
    for key in ranking.keys:
        numbers = all(is_number(row.values.get(key, 0)) for row in ranking.rows)
        columns.append({"id": f"key {key}", "name": short_key(key, ranking.keys), "full": key, "number": numbers})
    columns.append({"id": "runs", "name": "runs", "number": True})
    modes = modes_of(ranking.records)
    for name in (*metrics, *tests):
        higher = not ranking.lower if name == ranking.by else mode_of(name, modes) == "max"
        columns.append({"id": name, "name": words(name), "number": True, "higher": higher})
        if name == ranking.by and any(row.difference is not None for row in ranking.rows):
            unit = " (points)" if is_percent(name) else ""
            columns.append({"id": "difference", "name": f"difference to #1{unit}", "number": True})
    return columns


def _row(
    ranking: Ranking, row: Configuration, rank: int, metrics: Sequence[str], tests: Sequence[str], *, is_all: bool
) -> dict[str, Any]:
    """Returns a configuration. `cells`: by column, the value to sort by and the text; `facts`: title and text."""
    statistics = {name: row.statistic(name) for name in (*metrics, *tests)}
    cells: dict[str, list[Any]] = {"rank": [rank, str(rank)], "runs": [len(row.runs), str(len(row.runs))]}
    for key in ranking.keys:
        known = key in row.values
        cells[f"key {key}"] = [_value(row.values[key]), printable(brief(row.values[key]))] if known else [None, "-"]
    for name in (*metrics, *(tests if is_all else ())):
        found = statistics[name]
        cells[name] = [None if found is None else found.mean, statistic_text(name, found)]
    difference = row.difference
    shown = difference_text(ranking.by, difference) if difference else "" if rank == 1 else "-"
    cells["difference"] = [None if difference is None else difference.mean, shown]
    named = dict.fromkeys([ranking.by, *listed_in("details")])
    names = [name for name in named if any(name in run.metrics for run in row.runs)]
    if not tests:
        about = "Test metrics are shown for the first row only, to avoid selection on the test set. Show all with "
        about += "dlopt report test=true."
    else:
        about = "" if is_all else "Test metrics are shown for #1 only, which was selected on the validation set."
    return {
        "rank": rank,
        "label": row.label,
        "values": {key: _value(value) for key, value in row.values.items()},
        "ranked": row.value is not None,
        "cells": cells,
        "note": ", ".join(f"{count} {status}" for status, count in _not_ended(row).items()),
        "bad": row.failed > 0,
        "facts": [[words(name), statistic_text(name, found)]
                  for name, found in statistics.items() if found is not None or name in metrics] + _labels(row),
        "about": about if tests or rank > 1 else "",
        "command": row.command,
        "heads": [words(name) for name in names],
        "runs": [
            {
                "id": printable(short_path(run.path)),
                "seed": printable(brief(run.config.get("seed"))),
                "status": run.status.replace("_", " "),
                "metrics": [format_metric(name, run.metrics.get(name)) for name in names],
                "command": command(run),
                "from": command_from(run),
            }
            for run in row.runs
        ],
    }  # fmt: skip


def _shared_config(ranking: Ranking) -> dict[str, str]:
    """Returns the keys and values that all runs have."""
    configs = [run.config for run in ranking.records]
    if not configs:
        return {}
    shared = {key: value for key, value in configs[0].items() if all(key in each for each in configs)}
    same = [key for key, value in shared.items() if len({text(each[key]) for each in configs}) == 1]
    return {printable(key): _setting(shared[key]) for key in same}


def _own_config(run: Record, shared: Mapping[str, str]) -> dict[str, str]:
    own = {printable(key): value for key, value in run.config.items()}
    return {key: _setting(value) for key, value in own.items() if key not in shared}


def _setting(value: Any) -> str:
    return _cut(printable(text(value)))


def _cut(line: str) -> str:
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}…"


def _log(run: Record, share: int, *, is_test_shown: bool) -> list[str]:
    """Returns the last lines of output.log, which runs of a sweep have, or of train.log; [] if there is none.

    `share`: characters. Test metrics are hidden where the tables hide them.
    """
    count = min(_LOG, share)
    for name in ("output.log", "train.log"):
        try:
            content = regular_tail(run.path / name, count)
        except (OSError, ValueError):
            continue
        lines = content.decode(errors="replace").splitlines()
        plain = [printable(_CONTROL.sub("", line)) for line in lines[len(content) == count :]]  # without a part of one
        return [_cut(line if is_test_shown else _TEST.sub("(test metrics hidden)", line)) for line in plain]
    return []


def _sections(run: Record, sections: Sequence[Section]) -> list[dict[str, Any]]:
    """Returns the notes of packages about a run."""
    found = []
    for section in sections:
        if (own := section.runs.get(run.path)) is None:
            continue
        found.append({
            "title": printable(section.title),
            "urgent": own.is_urgent,
            "lines": [_cut(printable(line)) for line in own.lines],
            "command": command_with(run, own.arguments, own.keys) if own.arguments else None,
            "heads": [] if own.table is None else [printable(head) for head in own.table.heads],
            "texts": 0 if own.table is None else own.table.texts,
            "rows": [] if own.table is None else [[_cut(printable(cell)) for cell in row] for row in own.table.rows],
        })  # fmt: skip
    return found


def _labels(row: Configuration) -> list[list[str]]:
    """Returns the tags and the notes of the runs, with their titles."""
    notes = dict.fromkeys(printable(str(note)) for run in row.runs if (note := run.config.get("note")))
    texts = {"tags": tags_text(row), "note": "; ".join(notes)}
    return [[title, text] for title, text in texts.items() if text]


def _not_ended(row: Configuration) -> dict[str, int]:
    statuses = [run.status for run in row.runs if run.status not in ENDED]
    return {status: statuses.count(status) for status in dict.fromkeys(statuses)}


def _value(value: Any) -> Any:
    return value if is_number(value) else printable(brief(value))


def _ranked_by(ranking: Ranking) -> str:
    spread = ": mean ± standard deviation over seeds" if any(len(row.runs) > 1 for row in ranking.rows) else ""
    paired = any(row.difference is not None and row.difference.low is not None for row in ranking.rows)
    note = " Differences to #1 are paired over seeds, with 95 % confidence intervals." if paired else ""
    return f"Ranked by {in_words(ranking.by)} of the best epoch{spread}.{note}"


def _failure(run: Record, label: str) -> list[str | None]:
    seed = printable(brief(run.config.get("seed")))
    return [printable(short_path(run.path)), label, seed, failure_text(run), command(run) or command_from(run)]


# -- curves


def _curve_names(ranking: Ranking) -> list[str]:
    """Returns the metrics logged per epoch, the metrics in `FIRST` first."""
    lines = [record.history[i] for i in (0, -1) for record in ranking.records if record.history]
    names = dict.fromkeys(name for line in lines for name in line)
    ordered = dict.fromkeys([*(name for name in FIRST if name in names), *names])
    return [name for name in ordered if name not in AXES]


def _points_per_curve(ranking: Ranking, names: Sequence[str]) -> int:
    """Returns how many points the curves of a run may have in a page of `_POINTS` values; the best have more."""
    shares = sum(len(row.runs) * (_FINER if rank <= _FINE else 1) for rank, row in enumerate(ranking.rows, 1))
    return _POINTS // max(1, shares * (len(names) + 1))


def _curves(run: Record, names: Sequence[str], count: int) -> dict[str, Any]:
    """Returns the curves of a run: by metric, the index of its positions in `x` and its values.

    Curves of more than `count` epochs are thinned to evenly spaced ones. Metrics of the same epochs share `x`: the
    positions on each axis on which all of them are known.
    """
    positions: dict[bytes, int] = {}
    x: list[dict[str, list[float]]] = []
    curves: dict[str, list[Any]] = {}
    known = columns(run.history, (*AXES, *names)) if run.history else np.empty((0, len(AXES) + len(names)))
    for name, values in zip(names, known.T[len(AXES) :], strict=True):
        at = np.flatnonzero(np.isfinite(values))
        if not len(at):
            continue
        at = at[np.unique(np.linspace(0, len(at) - 1, min(count, len(at))).round().astype(int))]
        if at.tobytes() not in positions:
            positions[at.tobytes()] = len(x)
            axes = {axis: known[at, i] for i, axis in enumerate(AXES)}
            x.append({axis: _rounded(each, 5 if axis == "seconds" else 9) for axis, each in axes.items()
                      if np.isfinite(each).all()})  # fmt: skip
        curves[name] = [positions[at.tobytes()], _rounded(values[at], 4 if len(values) > count else 6)]
    return {"x": x, "curves": curves}


def _rounded(values: np.ndarray, digits: int) -> list[float]:
    """Rounds numbers to a number of digits; integers have no decimal point."""
    rounded = [float(f"{value:.{digits}g}") for value in values.tolist()]
    return [int(value) if value.is_integer() and abs(value) < 1e9 else value for value in rounded]


# -- the learning rate, parallel coordinates, time to targets


def _sensitivity(ranking: Ranking) -> dict[str, Any]:
    found = sensitivities(ranking)
    means = [value.mean for item in found for _, value, _ in item.points]
    optimizers = [
        {
            "name": printable(item.optimizer),
            "row": min(row for _, _, row in item.points),
            "points": [[lr, value.mean] for lr, value, _ in item.points],
            "best": [[lr, value.mean, value.mean - (value.std or 0.0), value.mean + (value.std or 0.0), value.count]
                     for lr, value in item.best],
            "good": item.good,
            "good_text": " to ".join(dict.fromkeys(f"{rate:.4g}" for rate in item.good)),
            "failed": list(item.failed),
        }
        for item in found
    ]  # fmt: skip
    return {"optimizers": optimizers, "log": ranking.lower and drawing.spans_decades(means)}


def _parallel(ranking: Ranking) -> dict[str, Any] | None:
    """Returns the axes with their ticks, and the positions of each row on them (None if it has no value)."""
    rows = ranking.ranked
    if len(ranking.keys) < 2 or len(rows) < 2:
        return None
    keys = list(ranking.keys)[:_MOST_AXES]
    values: list[list[Any]] = [[row.values.get(key) for row in rows] for key in keys]
    values.append([row.value.mean for row in rows if row.value is not None])
    scales = dict(zip([*keys, ranking.by], map(AxisScale, values), strict=True))
    axes = [
        {
            "id": name,
            "name": words(name) if name == ranking.by else short_key(name, ranking.keys),
            "full": name,
            "ticks": [[at, format_metric(name, value) if name == ranking.by else printable(text)]
                      for at, text, value in scale.ticks],
        }
        for name, scale in scales.items()
    ]  # fmt: skip
    columns = [[scale(value) for value in values] for scale, values in zip(scales.values(), values, strict=True)]
    lines = [[None if math.isnan(at) else round(at, 4) for at in line] for line in zip(*columns, strict=True)]
    return {"axes": axes, "lines": lines}


def _times(ranking: Ranking, target: float) -> list[dict[str, Any]]:
    """Returns for each target the order of the configurations, beginning with those that reach it."""
    rank = {id(row): i for i, row in enumerate(ranking.rows)}
    results = []
    for goal in dict.fromkeys([target, *targets(ranking)]):
        first = fastest(ranking, goal)
        reached = {id(row) for row, _ in first}
        others = [row for row in ranking.rows if id(row) not in reached]
        late = [(row, time_to_target(row, ranking.by, goal, ranking.lower)) for row in others]
        longest = {name: max((getattr(each, name).mean for _, each in first if getattr(each, name)), default=0.0) or 1.0
                   for name in ("steps", "seconds")}  # fmt: skip
        entries = []
        for row, each in (*first, *late):
            bars = [
                None if value is None else [statistic_text(name, value), value.mean / longest[name]]
                for name, value in (("steps", each.steps), ("seconds", each.seconds))
            ]
            is_pale = each.count < each.runs
            entries.append([rank[id(row)], each.count, f"{each.count} of {each.runs}", is_pale, *bars])
        results.append({"target": format_metric(ranking.by, goal), "entries": entries})
    return results
