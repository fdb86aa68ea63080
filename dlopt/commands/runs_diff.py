"""`dlopt runs diff`: compares the configs and the metrics of two runs."""

import sys
from pathlib import Path

from rich.text import Text

from dlopt.basics.errors import DONE, FileError, UserError
from dlopt.basics.folders import short_path
from dlopt.basics.formats import printable
from dlopt.commands.shared.command_line import take_command_keys
from dlopt.results import reading
from dlopt.results.differences import config_rows, metric_rows
from dlopt.tracking.terminal_text import plain_table, show_table


def diff(arguments: list[str]) -> int:
    """Prints the keys and metrics in which two runs differ. Raises `UserError`."""
    _, folders = take_command_keys(lambda: None, arguments, "runs")
    missing = next((folder for folder in folders if not Path(folder).is_dir()), None)
    if missing is not None:
        raise FileError(f"{missing}: no such folder")
    if len(folders) != 2:
        raise UserError(f"runs diff: needs two run folders, not {len(folders)}: dlopt runs diff outputs/a outputs/b")
    first, second = (reading.read_intact(Path(folder)) for folder in folders)
    is_terminal = sys.stdout.isatty()
    config = config_rows(first, second)
    status = ("status", first.status, second.status)
    rows = [row for row in (*config, status, *metric_rows(first, second, brief=is_terminal)) if row[1] != row[2]]
    heads = [printable(short_path(record.path)) for record in (first, second)]
    if is_terminal:
        parents = {record.path.parent for record in (first, second)}
        names = [record.path.name for record in (first, second)] if len(parents) == 1 else heads
        table = plain_table(left=[""])
        for name in names:
            table.add_column(Text(printable(name)), justify="right", overflow="fold")
        for row in rows:
            table.add_row(*map(Text, map(printable, row)))
        if rows:
            show_table(table)
    else:
        for row in [("", heads[0], heads[1]), *rows]:
            print("\t".join(map(printable, row)))
    if not config:
        print("the configs are equal", file=sys.stderr)
    return DONE
