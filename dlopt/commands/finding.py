"""Finding runs: the folders and conditions that `dlopt runs` and `dlopt runs clean` are given, and what meets them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dlopt.analysis.leaderboard import direction_of
from dlopt.analysis.report.reading import (
    Condition,
    Damaged,
    Reader,
    Record,
    check_key,
    condition,
    is_number,
    select,
    text,
    value_of,
)
from dlopt.errors import UserError


@dataclass(frozen=True)
class Asked:
    """A parsed command line."""

    folders: list[Path]
    conditions: list[Condition]
    sort: str | None
    columns: list[str] | None
    limit: int | None


def parse(arguments: Sequence[str], own: Sequence[str]) -> Asked:
    """Folders, conditions and the keys `own`. Raises `UserError`."""
    folders: list[Path] = []
    conditions: list[Condition] = []
    values: dict[str, str] = {}
    for line in arguments:
        key, equals, value = line.partition("=")
        if Path(line).is_dir():
            folders.append(Path(line))
        elif line.startswith("-"):
            raise UserError(f"{line}: there is no such flag; `dlopt runs --help` shows what is allowed")
        elif equals and key in own:
            values[key] = value
        elif (found := condition(line)) is not None:
            conditions.append(found)
        else:
            raise UserError(f"{line}: there is no such folder")
    if not folders and not Path("outputs").is_dir():
        raise UserError("outputs: there is no such folder here; name the folders to look in")
    limit = values.get("limit")
    if limit is not None and (not limit.isdecimal() or int(limit) == 0):
        raise UserError(f"limit={limit}: a whole number > 0 is needed")
    columns = values.get("columns")
    return Asked(
        folders=folders or [Path("outputs")],
        conditions=conditions,
        sort=values.get("sort"),
        columns=None if columns is None else [each.strip() for each in columns.strip("[]").split(",") if each.strip()],
        limit=None if limit is None else int(limit),
    )


def chosen(asked: Asked) -> tuple[list[Record], list[Damaged]]:
    """The runs that were asked for, in the order asked for, and the folders that cannot be read."""
    records, damaged = Reader().read(asked.folders)
    found = select(records, asked.conditions)
    for key in [*([] if asked.sort is None else [asked.sort]), *(asked.columns or [])]:
        check_key(key, f"{'sort' if key == asked.sort else 'columns'}={key}", records)
    if asked.sort is not None:
        found = _sorted(found, asked.sort)
    return found[: asked.limit], damaged


def _sorted(records: list[Record], key: str) -> list[Record]:
    """Numbers before texts, and runs without a value last."""
    is_figure = any(key.removeprefix("best_") in record.figures for record in records)
    sign = -1 if is_figure and direction_of(key) == "maximize" else 1

    def order(record: Record) -> tuple[int, float, str]:
        value = value_of(record, key)
        if value is None:
            return 2, 0.0, ""
        return (0, sign * value, "") if is_number(value) else (1, 0.0, text(value))

    return sorted(records, key=order)
