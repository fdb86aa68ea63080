"""Runs picked by what was typed: optimizer=adamw, val_accuracy>0.9, optimizer.lr<=0.1, model=resnet*."""

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from dlopt.analysis.report.keys import text
from dlopt.analysis.report.reading import STATUSES, Record, is_number
from dlopt.errors import UserError

_LINE = re.compile(r"(?P<key>[\w./-]+?)(?P<sign>!=|>=|<=|=|>|<)(?P<value>.*)", re.DOTALL)
_ORDER: Mapping[str, Callable[[float, float], bool]] = {
    ">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le,
}  # fmt: skip


@dataclass(frozen=True)
class Condition:
    key: str
    sign: str  # = != > >= < <=
    value: str
    line: str

    def holds(self, record: Record) -> bool:
        found = value_of(record, self.key)
        number = _number(self.value)
        if self.sign in _ORDER:
            return is_number(found) and number is not None and _ORDER[self.sign](found, number)
        if is_number(found) and number is not None:
            equal = found == number
        else:
            equal = fnmatchcase(text(found), _pattern(self.value))
        return equal == (self.sign == "=")


def condition(line: str) -> Condition | None:
    """What was typed, taken apart; None where it is no condition. Raises `UserError` for one that cannot be."""
    match = _LINE.fullmatch(line)
    if match is None:
        return None
    found = Condition(match["key"], match["sign"], match["value"], line)
    if found.sign in _ORDER and _number(found.value) is None:
        raise UserError(f"{line}: a number is needed behind {found.sign}")
    return found


def select(records: Sequence[Record], conditions: Sequence[Condition]) -> list[Record]:
    """The runs that fulfil all of them. Raises `UserError` for a key that none of the runs has."""
    for each in conditions:
        check_key(each.key, each.line, records)
        if each.key == "status" and not any(fnmatchcase(status, _pattern(each.value)) for status in STATUSES):
            raise UserError(f"{each.line}: there is no such status; allowed: {', '.join(STATUSES)}")
    return [record for record in records if all(each.holds(record) for each in conditions)]


def check_key(key: str, line: str, records: Sequence[Record]) -> None:
    """Raises `UserError` where none of the runs has such a key or figure."""
    known = dict.fromkeys(["status", *(k for r in records for k in (*r.figures, *r.config))])
    if not records or key in known or key.removeprefix("best_") in known:
        return
    ends = [each for each in known if each.rpartition(".")[2] == key]
    close = ends or get_close_matches(key, list(known), n=1, cutoff=0.6)
    hint = f"did you mean {close[0]}? " if close else ""
    figures = ", ".join(dict.fromkeys(name for record in records for name in record.figures))
    raise UserError(f"{line}: none of the runs has {key}; {hint}allowed: status, a key of the config, {figures}")


def value_of(record: Record, key: str) -> Any:
    """A figure, a value of the config, or the status; None where the run has none."""
    if key == "status":
        return record.status
    figure = record.figures.get(key, record.figures.get(key.removeprefix("best_")))
    return record.config.get(key) if figure is None else figure


def _number(value: str) -> float | None:
    try:
        number = float(value)
    except ValueError:
        return None
    return number if is_number(number) else None


def _pattern(value: str) -> str:
    """Brackets stand for themselves: model.widths=[64,64]; * and ? are wild."""
    return value.replace(" ", "").replace("[", "[[]") if "[" in value else value
