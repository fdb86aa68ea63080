"""What `--json` prints of runs, of a report and of a sweep: plain values of the records that the tables show.

Their keys are documented in docs/howto/json.md. Folders are absolute paths.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dlopt.basics.names import Names
from dlopt.metrics.names import column_of, direction_of
from dlopt.results.best_run import best_of
from dlopt.results.columns import metric_columns, test_columns
from dlopt.results.intervals import Statistic
from dlopt.results.leaderboard import ParetoFront, Row, directions_of
from dlopt.results.published import PublishedRow, against_published
from dlopt.results.ranking import AXES, Configuration, Ranking, command, time_to_target
from dlopt.results.reading import Damaged, Record, diagnostics, tags_of
from dlopt.results.remarks import texts
from dlopt.results.verdict import findings


def run_entry(record: Record, keys: Sequence[str] | None = None) -> dict[str, Any]:
    """Describes a run with its config. `keys`: of the config and the metrics to show (None for all)."""
    entry = {**job_entry(record), "commit": record.commit, "config": record.config}
    if keys is not None:
        names = {name for key in keys for name in (key, column_of(key))}
        entry |= {each: {k: v for k, v in entry[each].items() if k in names} for each in ("metrics", "config")}
    return entry


def job_entry(record: Record) -> dict[str, Any]:
    """Describes a run by what distinguishes it from others of its sweep."""
    return {
        "folder": os.path.abspath(record.path),
        "status": record.status,
        "reason": record.reason,
        "overrides": list(record.overrides),
        "metrics": record.metrics,
    }


def curves_document(records: Sequence[Record], damaged: Iterable[Damaged], metric: str, points: int) -> dict[str, Any]:
    """Describes how a metric, or a diagnostic by its tag, went in each run, with at most `points` of its values.

    These are the first, the last, the best, and others evenly spaced. Raises `UserError` for one that no run has.
    """
    metric, directions = column_of(metric), directions_of(records)
    is_diagnostic = not any(metric in line for record in records for line in record.history)
    direction = None if is_diagnostic else direction_of(metric, directions)
    histories = [[*record.history, *diagnostics(record)] for record in records]
    names = dict.fromkeys(name for history in histories for line in history for name in line)
    if records:
        Names("metric of these runs", [name for name in names if name not in AXES], prefix="curve=").check(metric)
    runs = []
    for record, history in zip(records, histories, strict=True):
        lines = [line for line in history if metric in line]
        kept = [round(i * (len(lines) - 1) / (points - 1)) for i in range(points)]
        if direction is not None and lines:
            sign = 1 if direction == "min" else -1
            best = min(range(len(lines)), key=lambda i: sign * lines[i][metric])
            if best not in kept:
                kept[min(range(1, points - 1), key=lambda i: abs(kept[i] - best))] = best
        if len(lines) <= points:
            kept = [*range(len(lines))]
        shown = [{"epoch": lines[i]["epoch"], "step": lines[i]["step"], "value": lines[i][metric]} for i in kept]
        folder, status = os.path.abspath(record.path), record.status
        runs.append({"folder": folder, "status": status, "evaluations": len(lines), "points": shown})
    content = {"metric": metric, "direction": direction and f"{direction}imize", "runs": runs}
    return {**content, "skipped": skipped_entries(damaged)}


def skipped_entries(damaged: Iterable[Damaged]) -> list[dict[str, Any]]:
    """Describes the folders that cannot be read."""
    return [{"folder": os.path.abspath(each.path), "reason": each.reason} for each in damaged]


def report_document(ranking: Ranking, target: float | None, files: Iterable[Path], *, test: bool) -> dict[str, Any]:
    """Describes a report; as in its table, the test metrics of all rows only with `test`, else those of the best."""
    published = {id(each.row): each for each in against_published(ranking)}
    metrics, tests = metric_columns(ranking), test_columns(ranking)
    rows = []
    for rank, row in enumerate(ranking.rows, 1):
        shown = [*metrics, *(tests if test or row.is_first else [])]
        entry = _configuration(row, shown, ranking, target, published.get(id(row)))
        rows.append({**entry, "remarks": texts(ranking.remarks, rank)})
    return {
        "by": ranking.by,
        "direction": "minimize" if ranking.lower else "maximize",
        "target": target,
        "keys": list(ranking.keys),
        "configurations": rows,
        **_conclusion(ranking),
        "statuses": ranking.counts(),
        "failures": [job_entry(record) for record in ranking.failed],
        "skipped": skipped_entries(ranking.damaged),
        "files": [os.path.abspath(file) for file in files],
    }


def _configuration(
    row: Configuration,
    metrics: Sequence[str],
    ranking: Ranking,
    target: float | None,
    published: PublishedRow | None,
) -> dict[str, Any]:
    reached = None if target is None else time_to_target(row, ranking.by, target, ranking.lower)
    return {
        **_row(row),
        "values": row.values,
        "tags": list(dict.fromkeys(tag for run in row.runs for tag in tags_of(run))),
        "metrics": {name: _statistic(row.statistic(name)) for name in metrics},
        "time_to_target": None
        if reached is None
        else {
            "reached": reached.count,
            "runs": reached.runs,
            "steps": _statistic(reached.steps),
            "seconds": _statistic(reached.seconds),
        },
        "published": None
        if published is None
        else {
            "error_percent": published.published,
            "measured_error_percent": _statistic(published.measured),
            "median_error_percent": published.median,
        },
        "command": row.command,
    }


def leaderboard_entry(ranking: Ranking) -> dict[str, Any]:
    """Describes the leaderboard of a sweep."""
    rows = []
    for position, row in enumerate(ranking.rows, 1):
        rows.append({**_row(row), "value": _statistic(row.value), "remarks": texts(ranking.remarks, position)})
    direction = ranking.board.direction
    return {"metric": ranking.by, "direction": direction, "rows": rows, **_conclusion(ranking)}


def _conclusion(ranking: Ranking) -> dict[str, Any]:
    """Describes the verdict, in words and as data, and the best run."""
    best, found = best_of(ranking.board), findings(ranking.board)
    return {
        "verdict": ranking.verdict,
        "findings": {"first": ranking.rows[0].label, **found} if found else None,
        "best_run": None if best is None else {**job_entry(best), "command": command(best)},
    }


def front_entry(front: ParetoFront) -> dict[str, Any]:
    """Describes the Pareto front of a search, whose values are in the order of its metrics."""
    rows = [
        {"label": label, "folder": os.path.abspath(folder), "values": list(values)}
        for label, folder, values in front.rows
    ]
    return {"metrics": list(front.metrics), "directions": list(front.directions), "rows": rows}


def _row(row: Row) -> dict[str, Any]:
    return {
        "rank": row.rank,
        "label": row.label,
        "overrides": list(row.overrides),
        "folders": [os.path.abspath(run.path) for run in row.runs],
        "ended": sum(run.has_ended for run in row.runs),
        "failed": row.failed,
        "difference": None if row.difference is None else vars(row.difference),
    }


def _statistic(statistic: Statistic | None) -> dict[str, Any] | None:
    return None if statistic is None else vars(statistic)
