"""`dlopt runs`: lists and finds runs by config, status and figure; `dlopt runs clean` removes checkpoints."""

import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from dlopt.analysis.report.keys import printable, text, varying
from dlopt.analysis.report.reading import Record, is_number
from dlopt.analysis.report.selecting import value_of
from dlopt.commands.clean import clean
from dlopt.commands.finding import Asked, chosen, parse
from dlopt.job import DONE, complain
from dlopt.tracking import layout
from dlopt.tracking.layout import Fitted, plain_table

USAGE = """\
dlopt runs [DIR...] [condition...] [sort=KEY] [columns=[KEY,...]] [limit=N] [--paths]
dlopt runs clean [DIR...] [condition...] [--yes]

Lists the runs in and below DIR (outputs) that fulfil all conditions; piped, as lines of values between tabs.

  dlopt runs                                        every run below outputs
  dlopt runs optimizer=adamw status=finished        by choice and status
  dlopt runs outputs/night 'val_accuracy>0.9' 'optimizer.lr<=0.01' sort=val_accuracy
  dlopt runs 'model=resnet*' columns=[optimizer.lr,val_loss,seconds] limit=10

  conditions       KEY=VALUE, KEY!=VALUE (* and ? are wild), KEY>N, KEY>=N, KEY<N, KEY<=N. A key is one of the config,
                   a figure (val_accuracy, val_loss: of the best epoch; steps, seconds, ...), or status: finished,
                   stopped_early, running, interrupted, unfinished (killed), failed
  sort=KEY         best figure first; keys of the config upwards
  columns=[...]    keys and figures shown (those in which the runs differ, and the figures of the best epoch)
  limit=N          the first N
  --paths          the folders alone, for other commands: dlopt report $(dlopt runs optimizer=sgd --paths)

dlopt runs clean shows the checkpoints step-N.pt of those runs that can go (neither best.pt nor last.pt, and none of
runs that are running or whose last.pt is damaged), asks, and removes them. --yes does not ask.
"""

_OWN = ("sort", "columns", "limit")
_MOST_COLUMNS = 6  # of the config, where none are named


def runs(arguments: list[str]) -> int:
    """Lists, or cleans. Raises `UserError`."""
    if {"-h", "--help"} & set(arguments):
        print(USAGE, end="")
        return DONE
    if arguments[:1] == ["clean"]:
        return clean(arguments[1:])
    paths_only = "--paths" in arguments
    asked = parse([each for each in arguments if each != "--paths"], _OWN)
    found, damaged = chosen(asked)
    if paths_only:
        for record in found:
            print(layout.short_path(record.path))
    elif sys.stdout.isatty():
        _show_table(found, _columns(asked, found))
    else:
        columns = _columns(asked, found)
        print("\t".join(["run", "status", *columns]))
        for record in found:
            values = [printable(_plain(value_of(record, key))) for key in columns]
            print("\t".join([printable(layout.short_path(record.path)), record.status, *values]))
    for each in damaged:
        complain(printable(f"{layout.short_path(each.path)}: skipped: {each.reason}"))
    return DONE


def _columns(asked: Asked, records: Sequence[Record]) -> list[str]:
    if asked.columns is not None:
        return asked.columns
    keys = varying([record.config for record in records])[:_MOST_COLUMNS]
    keys += [each.key for each in asked.conditions if each.key != "status" and each.key not in keys]
    if len({record.config.get("seed") for record in records}) > 1:
        keys.append("seed")
    figures = ["val_accuracy", "val_loss", "epochs", "seconds"]
    known = {name for record in records for name in record.figures}
    return list(dict.fromkeys([*keys, *(name for name in figures if name in known)]))


_STYLES = {"finished": "green", "stopped_early": "green", "running": "cyan", "failed": "red"}


def _show_table(records: Sequence[Record], columns: Sequence[str]) -> None:
    table = plain_table()
    table.add_column("run", overflow="fold")
    table.add_column("status")
    for key in columns:
        is_right = any(is_number(value_of(record, key)) for record in records)
        table.add_column(
            Text(printable(key)), justify="right" if is_right else "left", overflow="ellipsis" if is_right else "fold"
        )
    for record in records:
        cells = [Text(printable(_cell(key, value_of(record, key)))) for key in columns]
        status = Text(record.status.replace("_", " "), _STYLES.get(record.status, "yellow"))
        table.add_row(Text(printable(layout.short_path(record.path))), status, *cells)
    console = Console(highlight=False)
    console.print(Fitted(table))
    console.print(f"{len(records)} run{'' if len(records) == 1 else 's'}", style="dim")


def _cell(key: str, value: Any) -> str:
    """As short as a table wants it."""
    if value is None:
        return "-"
    if key == "seconds" and is_number(value):
        return layout.duration(value)
    if key.startswith(("val_", "train_", "test_", "best_val_")) and is_number(value):
        return layout.figure(key, value)
    return text(value)


def _plain(value: Any) -> str:
    return "" if value is None else text(value)
