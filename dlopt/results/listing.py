"""The list of runs: selects them, sorts them, and shows the columns that fit a terminal."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dlopt.basics import formats
from dlopt.basics.formats import format_value as text
from dlopt.basics.formats import printable
from dlopt.config.keys import LABELS
from dlopt.metrics.measures import MEASURES
from dlopt.metrics.names import Metric, column_of, mode_of
from dlopt.metrics.shown import format_metric, listed_in
from dlopt.results import reading
from dlopt.results.leaderboard import modes_of
from dlopt.results.reading import Condition, Damaged, Record, RunReader, value_of
from dlopt.tracking.terminal_text import FittedTable, plain_table, short_path

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
        for key in [*([] if self.sort is None else [self.sort]), *(self.columns or [])]:
            reading.check_key(key, f"{'sort' if key == self.sort else 'columns'}={key}", records)
        return (matches if self.sort is None else _sorted(matches, self.sort))[: self.limit], damaged


def _sorted(records: list[Record], key: str) -> list[Record]:
    """Sorts numbers before strings, runs without a value last."""
    is_metric = any(column_of(key) in record.metrics for record in records)
    # Without a known direction in the order of the values, like a key of the config.
    sign = -1 if is_metric and mode_of(key, modes_of(records)) == "max" else 1

    def order(record: Record) -> tuple[int, float, str]:
        value = value_of(record, key)
        if value is None:
            return 2, 0.0, ""
        return (0, sign * value, "") if reading.is_number(value) else (1, 0.0, text(value))

    return sorted(records, key=order)


def columns_of(query: Query, records: Sequence[Record]) -> list[str]:
    """Returns the columns after the status: as typed, by default the config keys that differ and the main metrics."""
    if query.columns is not None:
        return [key for key in query.columns if key != "status"]
    keys = reading.varying_keys([record.config for record in records])
    keys += [term.key for term in query.conditions if term.key != "status"]
    keys += [query.sort] if query.sort not in (None, "status") else []
    if len({record.config.get("seed") for record in records}) > 1:
        keys.append("seed")
    keys += [key for key in LABELS if any(record.config.get(key) for record in records)]
    known = {name for record in records for name in record.metrics}
    return list(dict.fromkeys([*keys, *(name for name in _METRICS if name in known)]))


def print_values(query: Query, records: Sequence[Record]) -> None:
    """Prints all columns and digits of the runs as tab-separated values."""
    keys = columns_of(query, records)
    print("\t".join(["run", "status", *keys]))
    for record in records:
        values = ["" if (value := value_of(record, key)) is None else text(value) for key in keys]
        print("\t".join(map(printable, [short_path(record.path), record.status, *values])))


def show_table(query: Query, records: Sequence[Record]) -> None:
    """Prints one line per run. By default shows only the columns that differ, and of these the ones that fit."""
    if not records:
        return
    console = Console(highlight=False)
    columns, hidden = columns_of(query, records), list[str]()
    is_chosen = query.columns is not None
    if not is_chosen:
        differing = ["status", *columns]
        if len(records) > 1:
            differing = [key for key in differing if len({text(value_of(record, key)) for record in records}) > 1]
        columns, hidden = _fitting(query, records, differing, console)
    console.print(FittedTable(_table(records, ["status", *columns] if is_chosen else columns)))
    counts = Counter(record.status.replace("_", " ") for record in records)
    statuses = ", ".join(f"{count} {status}" for status, count in counts.most_common())
    console.print(f"{formats.format_count('runs', len(records))}: {statuses}", style="dim")
    if hidden:
        console.print(f"hidden: {', '.join(map(printable, hidden))}; show with columns=[KEY,...]", style="dim")


def _fitting(
    query: Query, records: Sequence[Record], columns: Sequence[str], console: Console
) -> tuple[list[str], list[str]]:
    """Returns the columns that fit on one line per run, and the others.

    Tries in order: the main metric, columns that the user named, the status, keys of the config (those that vary most
    first), the other metrics.
    """
    main = next((name for name in _METRICS if any(name in record.metrics for record in records)), "status")
    typed = [*([] if query.sort is None else [query.sort]), *(term.key for term in query.conditions)]
    named = [key for key in typed if key in columns]
    last = [key for key in ("seed", *_METRICS) if key in columns]
    keys = sorted((key for key in columns if key not in last), key=lambda key: _most_common(key, records))
    shown: list[str] = []
    for key in dict.fromkeys([main, *named, *(["status"] if "status" in columns else []), *keys, *last]):
        if not shown or FittedTable(_table(records, [*shown, key])).fits(console, console.width):
            shown.append(key)
    ordered = dict.fromkeys([*columns, main])
    return [key for key in ordered if key in shown], [key for key in columns if key not in shown]


def _most_common(key: str, records: Sequence[Record]) -> int:
    """Returns how many runs have the most frequent value of a key."""
    return max(Counter(text(value_of(record, key)) for record in records).values())


def _table(records: Sequence[Record], columns: Sequence[str]) -> Table:
    table = plain_table(fold=["run"])
    for key in columns:
        is_right = any(reading.is_number(value_of(record, key)) for record in records)
        # The last component of a key if it is unique; metrics as words, which may wrap.
        title = key.replace("_", " ") if Metric.of(key) is not None else reading.short_key(key, columns)
        table.add_column(Text(printable(title)), justify="right" if is_right else "left")
    for record in records:
        table.add_row(Text(printable(short_path(record.path))), *(_cell(key, record) for key in columns))
    return table


def _cell(key: str, record: Record) -> Text:
    value = value_of(record, key)
    if key == "status":
        return Text(record.status.replace("_", " "), _STYLES.get(record.status, "yellow"))
    if value is None or (key == "tags" and not value):
        return Text("-")
    is_duration = key in MEASURES and MEASURES[key].format is formats.format_duration
    if (Metric.of(key) is not None or is_duration) and reading.is_number(value):
        return Text(format_metric(key, value))
    content = printable(",".join(reading.tags_of(record)) if key == "tags" else formats.brief(value))
    half = _MAX_CELL // 2
    return Text(content if len(content) <= _MAX_CELL else f"{content[: half - 1]}…{content[-half:]}")
