"""The one reader of CSV files, for `data=table` and `data=csv`: a header line, and rows with a field per column."""

import codecs
import collections
import contextlib
import csv
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dlopt.basics.errors import UserError
from dlopt.basics.files import refuse_special

SPLITS = ("train", "val", "test")
_LARGEST = torch.finfo(torch.float32).max
_INDEX = re.compile(r"(Unnamed: \d+)?")  # the name of pandas' index, as pandas writes it and as it reads it back
_MISSING = frozenset({"na", "n/a", "nan", "null", "none", "nil", "?", "-", "."})
_TRUTH = frozenset({"true", "false", "yes", "no"})
_GROUPED = re.compile(r"[+-]?\d{1,3}([ ,.'_]\d{3})+([.,]\d+)?")  # 1,234,567
_DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+([eE][+-]?\d+)?")
_FEW = 20  # rows, which a feature may number by chance
_MANY_CLASSES = 50  # if all of them are numbers, they are likely the values of a regression


@dataclass(frozen=True)
class CsvFile:
    """The content of a CSV file.

    Attributes:
        header: names of the columns, without spaces around them.
        rows: fields of each row, without spaces around them; as many as there are columns.
        lines: line number of each row, for messages.
        notes: what was left out.
    """

    path: Path
    header: list[str]
    rows: list[list[str]]
    lines: list[int]
    notes: tuple[str, ...] = ()

    def place(self, row: int) -> str:
        """Names the line of a row for messages."""
        return f"data.file={self.path}, line {self.lines[row]}"

    def column(self, name: str, *, may_be_empty: bool = False, hint: str = "") -> list[str]:
        """Returns the fields of a column. Raises `UserError` for an empty field, or if there is no such column."""
        if name not in self.header:
            columns = ", ".join(self.header) or "none"
            raise UserError(f"data.file={self.path}: has no column {name!r}; it has {columns}{hint}")
        index = self.header.index(name)
        fields = [row[index] for row in self.rows]
        if not may_be_empty and "" in fields:
            raise UserError(f"{self.place(fields.index(''))}: {name} is empty; fill it in or remove the line")
        return fields

    def numbers(self, name: str, advice: str) -> np.ndarray:
        """Returns a column as float64 [N].

        `advice`: what to do with a column of texts. Raises `UserError` that names the first line without a finite
        number.
        """
        fields = self.column(name)
        values = np.array([number(field) for field in fields])
        wrong = np.flatnonzero(~(np.abs(values) <= _LARGEST))  # also NaN
        if len(wrong):
            row = int(wrong[0])
            remedy = _remedy(fields[row]) or advice
            raise UserError(f"{self.place(row)}: {name} is {fields[row]!r}, not a finite number; {remedy}")
        return values

    def splits(self, column: str | None) -> list[str] | None:
        """Returns train, val or test for each row; None without a column.

        Raises `UserError` for another value, or if no row is for training.
        """
        if column is None:
            return None
        names = self.column(column)
        for row, name in enumerate(names):
            if name not in SPLITS:
                raise UserError(f"{self.place(row)}: {column} is {name!r}; must be train, val or test")
        if "train" not in names:
            raise UserError(f"data.file={self.path}: has no training rows")
        return names


def number(text: str) -> float:
    """Returns the number that a text shows; NaN for any other text.

    float() also reads 1_000 and the digits of other scripts, which other programs do not write as numbers.
    """
    with contextlib.suppress(ValueError):
        return float(text) if text.isascii() and "_" not in text else math.nan
    return math.nan


def count_rows(values: np.ndarray) -> bool:
    """Returns whether numbers [N] are consecutive integers in any order: the index of a table, not a feature."""
    if len(values) < _FEW or not (values == np.round(values)).all():
        return False
    return len(np.unique(values)) == len(values) == np.ptp(values) + 1


def natural(name: str) -> tuple[float, str]:
    """Sorts numbers by value, before names, of which nan is one: as a number it has no place in an order."""
    value = number(name)
    return (math.inf, name) if math.isnan(value) else (value, name)


def read_csv(file: str, delimiter: str = ",") -> CsvFile:
    """Reads a file in UTF-8, or in UTF-16 with a byte order mark. Skips empty lines.

    Leaves out columns without a name, or with the name that pandas gives them: an index.

    Raises:
        UserError: the file cannot be read; it has no header line, two columns of one name, or a row with more or fewer
            fields than the header.
    """
    path = Path(file).expanduser()
    header, rows, lines = _read(path, delimiter)
    for row, line in zip(rows, lines, strict=True):
        if len(row) != len(header):
            raise UserError(f"data.file={path}, line {line}: has {len(row)} fields instead of {len(header)}")
    if rows and _is_row(header, rows):
        raise UserError(
            f"data.file={path}: line 1 has values ({', '.join(header[:3])}, ...); insert a line with the names of the "
            "columns before it"
        )
    kept = [i for i, name in enumerate(header) if not _INDEX.fullmatch(name)]
    names = [header[i] for i in kept]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"data.file={path}: two columns have the same name, {', '.join(twice)}")
    notes = tuple(
        f"left out: column {i + 1}{f' ({name})' if name else ', which has no name'}"
        for i, name in enumerate(header)
        if i not in kept
    )
    return CsvFile(path, names, [[row[i] for i in kept] for row in rows] if notes else rows, lines, notes)


def _read(path: Path, delimiter: str) -> tuple[list[str], list[list[str]], list[int]]:
    """Returns the header, and the fields and the line number of each row. Raises `UserError`."""
    try:
        refuse_special(path)
        with path.open("rb") as binary:
            mark = binary.read(2)
        encoding = "utf-16" if mark in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
        rows, lines = [], []
        with path.open(newline="", encoding=encoding) as file:
            reader = csv.reader(file, delimiter=delimiter)
            header = [name.strip() for name in next(reader, [])]
            for row in reader:
                if row:
                    rows.append([field.strip() for field in row])
                    lines.append(reader.line_num)
    except OSError as error:
        where = "" if path.is_absolute() else f" in {Path.cwd()}"
        raise UserError(f"data.file={path}: cannot be read{where} ({error.strerror})") from error
    except (csv.Error, UnicodeError) as error:
        raise UserError(f"data.file={path}: is not a CSV file in UTF-8 ({error})") from error
    return header, rows, lines


def _is_row(header: Sequence[str], rows: Sequence[Sequence[str]]) -> bool:
    """Returns whether the first line looks like a row: a number in each column of numbers, a known text in the others.

    Not 0, 1, 2, ..., which pandas writes for columns without names, and not the years of a pivot table whose column of
    texts has a name.
    """
    if [*header] == [str(i) for i in range(len(header))]:
        return False
    numeric = {i for i in range(len(header)) if not any(math.isnan(number(row[i])) for row in rows[:100])}
    if not numeric or any(math.isnan(number(header[i])) for i in numeric):
        return False
    return all(any(row[i] == name for row in rows) for i, name in enumerate(header) if i not in numeric)


def _remedy(text: str) -> str | None:
    """Returns what to do with a field that is nearly a number; None if it is not."""
    if text.lower() in _MISSING:
        return "fill in the missing value or remove the line"
    if text.lower() in _TRUTH:
        return "write 1 and 0"
    if _GROUPED.fullmatch(text):
        return "write it without separators of thousands"
    return "write a decimal point" if _DECIMAL_COMMA.fullmatch(text) else None


def are_values(labels: Sequence[str]) -> bool:
    """Returns whether labels are the values of a regression rather than classes."""
    names = set(labels)
    if len(names) > max(len(labels) / 2, 2):
        return True
    values = [number(name) for name in names]
    return len(names) > _FEW and all(map(math.isfinite, values)) and not all(value.is_integer() for value in values)


def label_warnings(column: str, labels: Sequence[str]) -> tuple[str, ...]:
    """Returns what looks wrong in the class names of all samples, a line each."""
    counts = collections.Counter(labels)
    names = sorted(counts, key=natural)
    found = []
    forms = collections.defaultdict(list)
    for name in names:
        value = number(name)
        forms[name.casefold() if math.isnan(value) else repr(value)].append(name)
    for group in forms.values():
        if len(group) > 1:
            found.append(f"warning: {column} has classes that differ in form only: {', '.join(map(repr, group))}")
    if single := [name for name in names if counts[name] == 1]:
        shown = ", ".join(single[:3]) + (", ..." if len(single) > 3 else "")
        found.append(f"warning: {column} has {len(single)} class{'es' * (len(single) > 1)} with one sample: {shown}")
    if len(names) > _MANY_CLASSES and not any(math.isnan(number(name)) for name in names):
        found.append(
            f"warning: the {len(names)} classes of {column} are numbers; for a regression, use data.labels=value "
            "loss=mse"
        )
    return tuple(found)
