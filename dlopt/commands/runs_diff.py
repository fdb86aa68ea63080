"""`dlopt runs diff`: compares the configs and the metrics of two runs."""

import sys
from pathlib import Path

from rich.text import Text

from dlopt.command_line.line import take_own
from dlopt.errors import DONE, UserError
from dlopt.formats import format_metric, printable
from dlopt.formats import format_value as text
from dlopt.results import reading
from dlopt.results.leaderboard import Record
from dlopt.tracking.layout import plain_table, short_path, show_table

Row = tuple[str, str, str]


def diff(arguments: list[str]) -> int:
    """Prints the keys in which two runs differ, and their metrics. Raises `UserError`."""
    _, folders = take_own(_no_keys, arguments, "runs")
    missing = next((folder for folder in folders if not Path(folder).is_dir()), None)
    if missing is not None:
        raise UserError(f"{missing}: no such folder")
    if len(folders) != 2:
        raise UserError(f"runs diff: needs two run folders, not {len(folders)}: dlopt runs diff outputs/a outputs/b")
    first, second = (reading.read_intact(Path(folder)) for folder in folders)
    is_terminal = sys.stdout.isatty()
    config, metrics = config_rows(first, second), metric_rows(first, second, brief=is_terminal)
    status = ("status", first.status, second.status)
    heads = [printable(short_path(record.path)) for record in (first, second)]
    if is_terminal:
        table = plain_table(left=[""], fold=heads)
        for row in [*config, status, *metrics]:
            table.add_row(*map(Text, map(printable, row)))
        show_table(table)
    else:
        for row in [("", heads[0], heads[1]), *config, status, *metrics]:
            print("\t".join(map(printable, row)))
    if not config:
        print("the configs are equal", file=sys.stderr)
    return DONE


def _no_keys() -> int:
    return DONE


def config_rows(first: Record, second: Record) -> list[Row]:
    """Returns the keys with different values, in the configs' order; "-" where a run has no such key."""

    def cell(key: str, record: Record) -> str:
        return text(record.config[key]) if key in record.config else "-"

    keys = dict.fromkeys([*first.config, *second.config])
    rows = [(key, cell(key, first), cell(key, second)) for key in keys]
    return [row for row in rows if row[1] != row[2]]


def metric_rows(first: Record, second: Record, *, brief: bool) -> list[Row]:
    """Returns the metrics of both runs, the main ones first; "-" where a run has no such metric."""
    from dlopt.results.columns import FIRST  # imports NumPy, which the help does not need

    known = dict.fromkeys([*first.metrics, *second.metrics])
    names = dict.fromkeys([*(name for name in FIRST if name in known), *known])

    def cell(name: str, record: Record) -> str:
        value = record.metrics.get(name)
        return "-" if value is None else format_metric(name, value) if brief else text(value)

    return [(name, cell(name, first), cell(name, second)) for name in names]
