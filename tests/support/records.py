"""Records of runs for tests, without folders."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dlopt.basics.plain_values import flatten
from dlopt.metrics.names import column_of
from dlopt.results.leaderboard import Record


def record(
    path: Path,
    config: Mapping[str, Any],
    summary: Mapping[str, Any],
    overrides: Sequence[str] = (),
    origin: Mapping[str, Any] | None = None,
) -> Record:
    """Returns the record that `reading.read` makes of a run with this summary.json."""
    metrics = {column_of(key): value for key, value in summary.items()}
    status = str(summary.get("status", "unfinished"))
    return Record(path, status, flatten(config), metrics, overrides=overrides, origin=origin or {})
