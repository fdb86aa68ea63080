"""The best run of a sweep: of the configurations that rank first, the run with the best value."""

import math
from pathlib import Path

from dlopt.basics.errors import StateError
from dlopt.basics.folders import SPACE, short_path
from dlopt.basics.formats import format_count
from dlopt.metrics.names import VAL_LOSS
from dlopt.metrics.shown import format_metric
from dlopt.results.leaderboard import Leaderboard, Record
from dlopt.results.ranking import of_folder


def best_of(board: Leaderboard) -> Record | None:
    """Returns the best run of the rows that rank first, of equal ones that with the smallest validation loss."""
    sign = 1.0 if board.direction == "minimize" else -1.0

    def order(run: Record) -> tuple[float, float]:
        value, loss = run.metric(board.metric), run.metric(VAL_LOSS.column)
        return math.inf if value is None else sign * value, math.inf if loss is None else loss

    return min(
        (run for row in board.rows if row.is_first for run in row.counted(board.metric)), key=order, default=None
    )


def best_run(folder: Path, key: str) -> tuple[Path, str] | None:
    """Returns the folder of the best run of the sweep `folder`, and a line that says which; None if it is no sweep.

    Raises `UserError`, for `key`, if none of them has a value to rank by.
    """
    if not (folder / SPACE).is_file():
        return None
    ranking = of_folder(folder)
    runs = format_count("runs", len(ranking.records))
    best = best_of(ranking.board)
    if best is None:
        raise StateError(f"{key}={folder}: none of its {runs} has finished with a {ranking.by}; name a run")
    tied = [row for row in ranking.rows if row.is_first]
    value = format_metric(ranking.by, best.metric(ranking.by))
    label = "" if len(ranking.rows) == 1 else f", {next(row.label for row in tied if best in row.runs)}"
    note = (
        f"; {len(tied)} configurations are tied: of equal runs, the smallest validation loss" if len(tied) > 1 else ""
    )
    return best.path, f"best of {runs}: {short_path(best.path)} ({ranking.by} {value}{label}{note})"
