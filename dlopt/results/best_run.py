"""The best run of a sweep: of the configuration that ranks first, the run with the best value."""

from collections.abc import Sequence
from pathlib import Path

from dlopt.basics.errors import UserError
from dlopt.basics.folders import SPACE, short_path
from dlopt.basics.formats import format_count
from dlopt.metrics.shown import format_metric
from dlopt.results.leaderboard import Record, Row
from dlopt.results.ranking import gather
from dlopt.results.reading import RunReader


def best_of(rows: Sequence[Row], metric: str, *, lower: bool) -> Record | None:
    """Returns the best run of the first row; None if none has a value. `lower`: whether smaller values are better."""
    runs = rows[0].counted(metric) if rows else ()

    def value(run: Record) -> float:
        found = run.metric(metric)
        assert found is not None
        return found if lower else -found

    return min(runs, key=value, default=None)


def best_run(folder: Path, key: str) -> tuple[Path, str] | None:
    """Returns the folder of the best run of the sweep `folder`, and a line that says which; None if it is no sweep.

    Raises `UserError`, for `key`, if none of them has a value to rank by.
    """
    if not (folder / SPACE).is_file():
        return None
    records, damaged = RunReader().read([folder])
    runs = format_count("runs", len(records))
    ranking = gather(records, damaged)
    best = best_of(ranking.ranked, ranking.by, lower=ranking.lower)
    if best is None:
        raise UserError(f"{key}={folder}: none of its {runs} has finished with a {ranking.by}; name a run")
    row = ranking.ranked[0]
    value = format_metric(ranking.by, best.metric(ranking.by))
    label = "" if len(ranking.rows) == 1 else f", {row.label}"
    return best.path, f"best of {runs}: {short_path(best.path)} ({ranking.by} {value}{label})"
