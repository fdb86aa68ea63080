"""The list of runs: selects them, sorts them, and shows the columns that fit a terminal."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dlopt.basics import formats
from dlopt.basics.folders import short_path
from dlopt.basics.formats import format_value as text
from dlopt.basics.formats import printable
from dlopt.config.keys import LABELS
from dlopt.metrics.measures import MEASURES
from dlopt.metrics.names import Metric, column_of, direction_of
from dlopt.metrics.shown import format_metric, listed_in
from dlopt.results import reading
from dlopt.results.leaderboard import FOLD, directions_of
from dlopt.results.reading import Condition, Damaged, Record, RunReader, value_of
from dlopt.tracking.terminal_text import FittedTable, plain_table

_REPEATED = ("seed", FOLD)  # in which the runs of a configuration differ
_METRICS = listed_in("runs")  # default columns, the most important first
_MAX_CELL = 24  # characters of a config value in a terminal
_STYLES = {"finished": "green", "stopped_early": "green", "running": "cyan", "failed": "red"}


@dataclass(frozen=True)
class Query:
    """Which runs to list, and their columns."""

    folders: list[Path]
    conditions: list[Condition]
    sort: str | None = None
    columns: list[str] | None = None
    limit: int | None = None

    def find(self) -> tuple[list[Record], list[Damaged]]:
        """Returns the matching runs in order, and the unreadable folders."""
        records, damaged = RunReader().read(self.folders)
        matches = reading.select(records, self.conditions)
        if self.sort is not None:
            reading.check_key(self.sort, f"sort={self.sort}", records)
            matches = _sorted(matches, self.sort)
        for key in self.columns or []:
            reading.check_key(key, f"columns={key}", records)
        return matches[: self.limit], damaged


def _sorted(records: list[Record], key: str) -> list[Record]:
    """Sorts numbers before strings, runs without a value last."""
    is_metric = any(column_of(key) in record.metrics for record in records)
    # Without a known direction in the order of the values, like a key of the config.
    sign = -1 if is_metric and direction_of(key, directions_of(records)) == "max" else 1

    def order(record: Record) -> tuple[int, float, str]:
        value = value_of(record, key)
        if value is None:
            return 2, 0.0, ""
        if reading.is_number(value):
            return 0, sign * value, ""
        return 1, 0.0, text(value)

    return sorted(records, key=order)


def print_values(query: Query, records: Sequence[Record]) -> None:
    """Prints all columns and digits of the runs as tab-separated values."""
    keys = columns_of(query, records)
    print("\t".join(["run", "status", *keys]))
    for record in records:
        cells = [short_path(record.path), record.status]
        for key in keys:
            value = value_of(record, key)
            cells.append("" if value is None else text(value))
        print("\t".join(map(printable, cells)))


def show_table(query: Query, records: Sequence[Record]) -> None:
    """Prints one line per run. By default shows only the columns that differ, and of these the ones that fit."""
    if not records:
        return
    console = Console(highlight=False)
    columns = ["status", *columns_of(query, records)]
    hidden: list[str] = []
    if query.columns is None:
        columns, hidden = _fitting(query, records, _differing(columns, records), console)
    console.print(FittedTable(_table(records, columns)))
    counts = Counter(record.status.replace("_", " ") for record in records)
    statuses = ", ".join(f"{count} {status}" for status, count in counts.most_common())
    console.print(f"{formats.format_count('runs', len(records))}: {statuses}", style="dim")
    if hidden:
        console.print(f"hidden: {', '.join(map(printable, hidden))}; show with columns=[KEY,...]", style="dim")


# -- columns


def columns_of(query: Query, records: Sequence[Record]) -> list[str]:
    """Returns the columns after the status: as typed, by default the config keys that differ and the main metrics."""
    if query.columns is not None:
        return [key for key in query.columns if key != "status"]
    keys = reading.varying_keys([record.config for record in records])
    keys += [condition.key for condition in query.conditions]
    if query.sort is not None:
        keys.append(query.sort)
    keys += [key for key in _REPEATED if len({record.config.get(key) for record in records}) > 1]
    for key in LABELS:
        if any(record.config.get(key) for record in records):
            keys.append(key)
    keys += _known_metrics(records)
    return [key for key in dict.fromkeys(keys) if key != "status"]


def _known_metrics(records: Sequence[Record]) -> list[str]:
    """Returns the main metrics that some runs have."""
    known = {name for record in records for name in record.metrics}
    return [name for name in _METRICS if name in known]


def _differing(columns: Sequence[str], records: Sequence[Record]) -> list[str]:
    """Returns the columns whose values differ between runs; all columns for a single run."""
    if len(records) == 1:
        return list(columns)
    return [key for key in columns if len(_counts(key, records)) > 1]


def _fitting(
    query: Query, records: Sequence[Record], columns: Sequence[str], console: Console
) -> tuple[list[str], list[str]]:
    """Returns the columns that fit on one line per run, and the others."""
    candidates = _by_importance(query, records, columns)
    shown = candidates[:1]
    for key in candidates[1:]:
        if FittedTable(_table(records, [*shown, key])).fits(console, console.width):
            shown.append(key)
    main = candidates[0]
    ordered = list(columns) if main in columns else [*columns, main]
    return [key for key in ordered if key in shown], [key for key in columns if key not in shown]


def _by_importance(query: Query, records: Sequence[Record], columns: Sequence[str]) -> list[str]:
    """Sorts columns by importance; the first is shown in any case.

    The main metric, columns that the user named, the status, keys of the config (those that vary most first), the seed,
    the other metrics.
    """
    metrics = _known_metrics(records)
    main = metrics[0] if metrics else "status"
    typed = [] if query.sort is None else [query.sort]
    typed += [condition.key for condition in query.conditions]
    named = [key for key in typed if key in columns]
    status = ["status"] if "status" in columns else []
    last = [key for key in (*_REPEATED, *_METRICS) if key in columns]
    keys = [key for key in columns if key not in last]
    keys.sort(key=lambda key: max(_counts(key, records).values()))
    return list(dict.fromkeys([main, *named, *status, *keys, *last]))


def _counts(key: str, records: Sequence[Record]) -> Counter[str]:
    """Counts the runs with each value of a key."""
    return Counter(text(value_of(record, key)) for record in records)


# -- the table


def _table(records: Sequence[Record], columns: Sequence[str]) -> Table:
    table = plain_table(fold=["run"])
    for key in columns:
        is_right = any(reading.is_number(value_of(record, key)) for record in records)
        # The last component of a key if it is unique; metrics as words, which may wrap.
        title = reading.short_key(key, columns) if Metric.of(key) is None else key.replace("_", " ")
        table.add_column(Text(printable(title)), justify="right" if is_right else "left")
    for record in records:
        cells = [_cell(key, record) for key in columns]
        table.add_row(Text(printable(short_path(record.path))), *cells)
    return table


def _cell(key: str, record: Record) -> Text:
    if key == "status":
        return Text(record.status.replace("_", " "), _STYLES.get(record.status, "yellow"))
    value = value_of(record, key)
    if value is None:
        return Text("-")
    if key == "tags":
        return Text(_shortened(",".join(reading.tags_of(record))) if value else "-")
    if _is_formatted(key) and reading.is_number(value):
        return Text(format_metric(key, value))
    return Text(_shortened(formats.brief(value)))


def _is_formatted(key: str) -> bool:
    """Returns whether a number is shown as a metric, which rounds it: metrics of a split, and durations."""
    is_duration = key in MEASURES and MEASURES[key].format is formats.format_duration
    return is_duration or Metric.of(key) is not None


def _shortened(content: str) -> str:
    """Returns the content of a cell; a long one without its middle."""
    content = printable(content)
    half = _MAX_CELL // 2
    return content if len(content) <= _MAX_CELL else f"{content[: half - 1]}…{content[-half:]}"
