"""`dlopt runs`: lists and finds runs by config, status and metric; `dlopt runs clean` removes checkpoints."""

import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from dlopt.analysis.leaderboard import direction_of
from dlopt.analysis.report.reading import (
    Condition,
    Damaged,
    Reader,
    Record,
    check_key,
    condition,
    is_number,
    printable,
    select,
    text,
    value_of,
    varying_keys,
)
from dlopt.errors import DONE, RunError, UserError
from dlopt.folders import RunFolder
from dlopt.job import complain
from dlopt.tracking import layout
from dlopt.tracking.layout import Fitted, plain_table, short_path

USAGE = """\
dlopt runs [DIR...] [condition...] [sort=KEY] [columns=[KEY,...]] [limit=N] [--paths]
dlopt runs clean [DIR...] [condition...] [--yes]

Lists the runs in and below DIR (outputs) that fulfil all conditions; piped, as lines of values between tabs.

  dlopt runs                                        every run below outputs
  dlopt runs optimizer=adamw status=finished        by choice and status
  dlopt runs outputs/night 'val_accuracy>0.9' 'optimizer.lr<=0.01' sort=val_accuracy
  dlopt runs 'model=resnet*' columns=[optimizer.lr,val_loss,seconds] limit=10

  conditions       KEY=VALUE, KEY!=VALUE (* and ? are wild), KEY>N, KEY>=N, KEY<N, KEY<=N. A key is one of the config,
                   a metric (val_accuracy, val_loss: of the best epoch; steps, seconds, ...), or status: finished,
                   stopped_early, running, interrupted, unfinished (killed), failed
  sort=KEY         best metric first; keys of the config upwards
  columns=[...]    keys and metrics shown (those in which the runs differ, and the metrics of the best epoch)
  limit=N          the first N
  --paths          the folders alone, for other commands: dlopt report $(dlopt runs optimizer=sgd --paths)

dlopt runs clean shows the checkpoints step-N.pt of those runs that can go (neither best.pt nor last.pt, and none of
runs that are running or whose last.pt is damaged), asks, and removes them. --yes does not ask.
"""

_MOST_COLUMNS = 6  # of the config, where none are named
_STYLES = {"finished": "green", "stopped_early": "green", "running": "cyan", "failed": "red"}


@dataclass(frozen=True)
class _Query:
    """Which runs to find, and what to show of them."""

    folders: list[Path]
    conditions: list[Condition]
    sort: str | None = None
    columns: list[str] | None = None
    limit: int | None = None

    def find(self) -> tuple[list[Record], list[Damaged]]:
        """The runs in order, and the folders that cannot be read."""
        records, damaged = Reader().read(self.folders)
        found = select(records, self.conditions)
        for key in [*([] if self.sort is None else [self.sort]), *(self.columns or [])]:
            check_key(key, f"{'sort' if key == self.sort else 'columns'}={key}", records)
        return (found if self.sort is None else _sorted(found, self.sort))[: self.limit], damaged


def runs(arguments: list[str]) -> int:
    """Lists, or cleans. Raises `UserError`."""
    if {"-h", "--help"} & set(arguments):
        print(USAGE, end="")
        return DONE
    if arguments[:1] == ["clean"]:
        return _clean(arguments[1:])
    query, flags = _parse(arguments, ("sort", "columns", "limit"), ("--paths",))
    found, damaged = query.find()
    if flags:
        for record in found:
            print(short_path(record.path))
    elif sys.stdout.isatty():
        _show_table(found, _columns(query, found))
    else:
        columns = _columns(query, found)
        print("\t".join(["run", "status", *columns]))
        for record in found:
            values = ["" if (value := value_of(record, key)) is None else text(value) for key in columns]
            print("\t".join([printable(short_path(record.path)), record.status, *map(printable, values)]))
    for each in damaged:
        complain(printable(f"{short_path(each.path)}: skipped: {each.reason}"))
    return DONE


def _parse(arguments: Sequence[str], own: Sequence[str], flags: Sequence[str]) -> tuple[_Query, set[str]]:
    """Folders, conditions, the keys `own` and the flags that are typed. Raises `UserError`."""
    folders, typed_flags, others = split_folders(arguments, "runs", flags)
    conditions: list[Condition] = []
    values: dict[str, str] = {}
    for line in others:
        key, equals, value = line.partition("=")
        if equals and key in own:
            values[key] = value
        elif (found := condition(line)) is not None:
            conditions.append(found)
        else:
            raise UserError(f"{line}: no such folder")
    if not folders and not Path("outputs").is_dir():
        raise UserError("outputs: no such folder here; name the folders to look in")
    limit, columns = values.get("limit"), values.get("columns")
    if limit is not None and (not limit.isdecimal() or int(limit) == 0):
        raise UserError(f"limit={limit}: a whole number > 0 is needed")
    query = _Query(
        folders=folders or [Path("outputs")],
        conditions=conditions,
        sort=values.get("sort"),
        columns=None if columns is None else [each.strip() for each in columns.strip("[]").split(",") if each.strip()],
        limit=None if limit is None else int(limit),
    )
    return query, typed_flags


def split_folders(
    arguments: Sequence[str], command: str, flags: Sequence[str] = ()
) -> tuple[list[Path], set[str], list[str]]:
    """Separates folders that exist, flags, and the other arguments. Raises `UserError` for an unknown flag."""
    folders = [Path(each) for each in arguments if Path(each).is_dir()]
    others = [each for each in arguments if not Path(each).is_dir()]
    for each in others:
        if each.startswith("-") and each not in flags:
            raise UserError(f"{each}: unknown flag; `dlopt {command} --help` shows what is allowed")
    return folders, {each for each in others if each in flags}, [each for each in others if each not in flags]


def _sorted(records: list[Record], key: str) -> list[Record]:
    """Numbers before texts, and runs without a value last."""
    is_metric = any(key.removeprefix("best_") in record.metrics for record in records)
    sign = -1 if is_metric and direction_of(key) == "maximize" else 1

    def order(record: Record) -> tuple[int, float, str]:
        value = value_of(record, key)
        if value is None:
            return 2, 0.0, ""
        return (0, sign * value, "") if is_number(value) else (1, 0.0, text(value))

    return sorted(records, key=order)


def _columns(query: _Query, records: Sequence[Record]) -> list[str]:
    if query.columns is not None:
        return query.columns
    keys = varying_keys([record.config for record in records])[:_MOST_COLUMNS]
    keys += [each.key for each in query.conditions if each.key != "status" and each.key not in keys]
    if len({record.config.get("seed") for record in records}) > 1:
        keys.append("seed")
    metrics = ["val_accuracy", "val_loss", "epochs", "seconds"]
    known = {name for record in records for name in record.metrics}
    return list(dict.fromkeys([*keys, *(name for name in metrics if name in known)]))


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
        table.add_row(Text(printable(short_path(record.path))), status, *cells)
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
        return layout.metric(key, value)
    return text(value)


# -- dlopt runs clean


@dataclass(frozen=True)
class _Spare:
    path: Path
    frees: int  # bytes; none while another name of the same file stays


def _clean(arguments: list[str]) -> int:
    """Shows what can go, asks, and removes it. Raises `UserError`; `RunError` when a file cannot be removed."""
    query, is_sure = _parse(arguments, (), ("--yes",))
    records, damaged = query.find()
    spare = [each for record in records for each in _spare(record)]
    for broken in damaged:
        complain(printable(f"{short_path(broken.path)}: left alone: {broken.reason}"))
    if not spare:
        print(f"{len(records)} run{'' if len(records) == 1 else 's'}: nothing to remove")
        return DONE
    for each in spare:
        print(f"{_size(each.frees):>9}  {printable(short_path(each.path))}")
    total = f"{len(spare)} checkpoint{'' if len(spare) == 1 else 's'}, {_size(sum(each.frees for each in spare))}"
    if not is_sure and not _agrees(f"remove {total}? [y/N] "):
        print("nothing was removed")
        return DONE
    removed = list(_remove(spare))
    print(f"removed {total}" if len(removed) == len(spare) else f"removed {len(removed)} of {total}")
    return DONE


def _spare(record: Record) -> list[_Spare]:
    """The checkpoints that the run can do without: last.pt must be whole, and nobody at work there."""
    from dlopt.training import sharded
    from dlopt.training.checkpoint import is_intact

    folder = record.path / "checkpoints"
    names = re.compile(r"step-\d+\.pt")
    if folder.is_symlink() or not folder.is_dir():
        return []
    paths = sorted(each for each in folder.iterdir() if names.fullmatch(each.name) and not each.is_symlink())
    if not paths:
        return []
    if record.status == "running" or not is_intact(folder / "last.pt"):
        why = "it is running" if record.status == "running" else "its last.pt is missing or damaged"
        complain(printable(f"{short_path(record.path)}: left alone: {why}"))
        return []
    return [
        _Spare(path, (path.stat().st_size if path.stat().st_nlink == 1 else 0) + sharded.size(path)) for path in paths
    ]


def _agrees(question: str) -> bool:
    if not sys.stdin.isatty():
        raise UserError("runs clean: there is no terminal to ask at; look at the list and type --yes")
    try:
        return input(question).strip().lower() in ("y", "yes")
    except EOFError:
        return False


def _remove(spare: Sequence[_Spare]) -> Iterable[Path]:
    """Removes each with its checksum and shards, unless its run has begun to work again meanwhile."""
    from dlopt.training import sharded

    for each in spare:
        if RunFolder(each.path.parent.parent).is_live():
            complain(printable(f"{short_path(each.path)}: left alone: its run is at work again"))
            continue
        try:
            each.path.unlink(missing_ok=True)
            each.path.with_name(f"{each.path.name}.sha256").unlink(missing_ok=True)
            sharded.remove_unused(each.path.parent)
        except OSError as error:
            raise RunError(f"{each.path}: cannot be removed: {error.strerror}") from None
        yield each.path


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
