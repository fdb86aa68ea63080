"""The one reader of CSV files, for `data=table` and `data=csv`: a header line, and rows with a field per column."""

import array
import codecs
import contextlib
import csv
import io
import itertools
import math
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dlopt.basics.errors import UserError
from dlopt.basics.files import refuse_special
from dlopt.basics.formats import printable
from dlopt.data.checks import LARGEST, LEFT_OUT, MISSING, WARNING, number
from dlopt.data.images import EXTENSIONS
from dlopt.data.samples import SPLITS

_INDEX = re.compile(r"(Unnamed: \d+(\.\d+)*)?")  # the name of pandas' index, as written and as read back
_MISSING = MISSING | {"none", "-", "."}
_TRUTH = frozenset({"true", "false", "yes", "no"})
_GROUPED = re.compile(r"[+-]?\d{1,3}([ \u00a0\u202f,.'’_]\d{3})+([.,]\d+)?")  # 1,234,567
_POINTS, _HUNDREDS = re.compile(r"[+-]?[1-9][0-9]{0,2}(\.[0-9]{3})+"), re.compile(r"[+-]?[0-9]{1,3}")
_DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+([eE][+-]?\d+)?")
_WITH_UNIT = re.compile(r"[^\w\s.,+-]{0,3}\s?[+-]?[0-9][0-9.,]*\s?[^\d\s.,+-]{0,5}")  # $5, 5 %, 12 kg
_INTEGER = re.compile(r"[+-]?[0-9]{1,39}")
_EXACT = 2.0**53  # up to which float64 has every integer
_CHUNK = 1024  # rows that are converted at once
_SPECTRUM = 8  # columns; a row has as few numbers in order by chance
_MANY_TEXTS = 10_000
_FIRST = 1000  # rows that are compared with the header


@dataclass(frozen=True)
class Header:
    """The first line of a CSV file, and how to read the others.

    Attributes:
        names: of the columns, without spaces around them.
        positions: of these columns in a row.
        width: fields of a row.
        notes: which columns were left out.
    """

    path: Path
    delimiter: str
    encoding: str
    names: tuple[str, ...]
    positions: tuple[int, ...]
    width: int
    notes: tuple[str, ...]

    def require(self, names: Collection[str], hint: str = "") -> None:
        """Raises `UserError` if there is no such column."""
        for name in names:
            if name not in self.names:
                columns = ", ".join(self.names) or "none"
                raise UserError(f"data.file={self.path}: has no column {name!r}; it has {columns}{hint}")


@dataclass(frozen=True)
class CsvFile:
    """Columns of a CSV file.

    Attributes:
        texts: fields of columns, without spaces around them.
        numbers: columns of finite numbers, float64 [N, F].
        lines: line number of each row, for messages.
        notes: what looks wrong in the texts of numbers.
    """

    path: Path
    texts: Mapping[str, list[str]]
    numbers: np.ndarray
    lines: Sequence[int]
    notes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.lines)

    def place(self, row: int) -> str:
        """Names the line of a row for messages."""
        return _place(self.path, self.lines[row])

    def column(self, name: str) -> list[str]:
        """Returns the fields of a column of texts. Raises `UserError` for an empty one."""
        fields = self.texts[name]
        if "" in fields:
            raise UserError(f"{self.place(fields.index(''))}: {name} is empty; fill it in or remove the line")
        return fields

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


def read_header(file: str, delimiter: str = ",") -> Header:
    """Reads the header line of a file in UTF-8, or in UTF-16 with a byte order mark.

    Leaves out columns without a name, or with the name that pandas gives them: an index.

    Raises:
        UserError: the file cannot be read, has no header line, or has two columns of one name.
    """
    path = Path(os.path.expanduser(file))
    with _reading(path):
        refuse_special(path)
        with path.open("rb") as binary:
            mark = binary.read(2)
    encoding = "utf-16" if mark in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
    lines = _lines(path, delimiter, encoding)
    _, fields = next(lines, (1, []))
    if any("\0" in name for name in fields):
        raise UserError(f"data.file={path}: has zero bytes, as UTF-16 without a byte order mark; save it as UTF-8")
    rows = [row for _, row in itertools.islice(lines, _FIRST) if len(row) == len(fields)]
    if _has_images(fields, rows) or (rows and _is_row(fields, rows)):
        first = ", ".join(fields[:3]) + ", ..." * (len(fields) > 3)
        raise UserError(
            f"data.file={path}: line 1 has values ({first}); insert a line with the names of the columns before it"
        )
    kept = [i for i, name in enumerate(fields) if not _INDEX.fullmatch(name)]
    names = [fields[i] for i in kept]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"data.file={path}: two columns have the same name, {', '.join(twice)}")
    notes = tuple(
        f"{LEFT_OUT}column {i + 1}{f' ({name})' if name else ', which has no name'}"
        for i, name in enumerate(fields)
        if i not in kept
    )
    return Header(path, delimiter, encoding, tuple(names), tuple(kept), len(fields), notes)


def read_columns(
    header: Header, texts: Collection[str] = (), numbers: Mapping[str, str] | None = None, *, hint: str = ""
) -> CsvFile:
    """Reads columns of a file, a few rows at a time: only these columns are kept. Skips empty lines.

    Args:
        texts: columns to keep as they are.
        numbers: columns to convert to numbers, with the advice on a column of texts.
        hint: what else to do if a column is missing.

    Raises:
        UserError: a column is missing, or a row has more or fewer fields than the header, an empty field among
            `numbers`, or one that is no finite number. The message names the line.
    """
    numbers = numbers or {}
    header.require([*texts, *numbers], hint)
    place = dict(zip(header.names, header.positions, strict=True))
    kept: dict[str, list[str]] = {name: [] for name in texts}
    known: dict[str, dict[str, str]] = {name: {} for name in texts}
    lines = array.array("q")
    values = np.empty((_CHUNK, len(numbers)))
    notes: tuple[str, ...] = ()
    merged: dict[str, str] = {}  # the warning of each column whose integers float64 merges
    doubts = _Doubts()
    rows = _lines(header.path, header.delimiter, header.encoding, doubts)
    next(rows, None)
    while chunk := list(itertools.islice(rows, _CHUNK)):
        for line, row in chunk:
            if len(row) != header.width:
                other = " (set data.delimiter if it is another one)" if header.width == 1 else ""
                if not lines and row is chunk[0][1] and len(row) == header.width + 1 > 2:  # as R writes a table
                    other = " (if the first column is an index, the header lacks a name for it)"
                raise UserError(f"{_place(header.path, line)}: has {len(row)} fields instead of {header.width}{other}")
        for name, fields in kept.items():
            fields += _shared([row[place[name]] for _, row in chunk], known[name])
        start = len(lines)
        lines.extend(line for line, _ in chunk)
        if start + len(chunk) > len(values):
            values.resize((2 * len(values), len(numbers)), refcheck=False)  # in place: without a second copy
        for position, (name, advice) in enumerate(numbers.items()):
            fields = [row[place[name]] for _, row in chunk]
            if start == 0 and _are_thousands(fields):
                example = next(field for field in fields if "." in field)
                notes += (f"{WARNING}column {name} may have points between thousands: {example} is read as a decimal",)
            values[start : start + len(chunk), position] = column = _numbers(fields)
            if not (np.abs(column) <= LARGEST).all():
                wrong = int(np.flatnonzero(~(np.abs(column) <= LARGEST))[0])  # also NaN
                raise _not_a_number(_place(header.path, chunk[wrong][0]), name, fields[wrong], advice)
            if name not in merged and (pair := _merged_integers(fields, column)) is not None:
                merged[name] = (
                    f"{WARNING}column {name}: float64 makes {pair[0]} and {pair[1]} equal; subtract a constant from "
                    "them in the file"
                )
    values.resize((len(lines), len(numbers)), refcheck=False)
    return CsvFile(header.path, kept, values, lines, (*notes, *merged.values(), *doubts.notes(header)))


def _shared(fields: list[str], known: dict[str, str]) -> list[str]:
    """Returns the texts with one object per value, because labels repeat; not for many values, such as paths."""
    return fields if len(known) > _MANY_TEXTS else [known.setdefault(field, field) for field in fields]


def _place(path: Path, line: int) -> str:
    return f"data.file={path}, line {line}"


@dataclass
class _Doubts:
    """Rows with doubtful quotes, which the reader may split differently than intended.

    Attributes:
        broken: fields that have line breaks: how many, the position of the first in its row, and its first line.
        longest: the most lines that a row has.
        closed_early: rows in which text follows a closing quote: how many, and the line of the first.
        is_open: the last row ends within quotes.
    """

    broken: tuple[int, int, int] = (0, 0, 0)
    longest: int = 0
    closed_early: tuple[int, int] = (0, 0)
    is_open: bool = False

    def add(self, row: Sequence[str], line: int, lines: int) -> None:
        """Counts a row of several lines."""
        for position, field in enumerate(row):
            if "\n" in field.rstrip() or "\r" in field.rstrip():
                count, first, at = self.broken
                self.broken = (count + 1, first, at) if count else (1, position, line)
                self.longest = max(self.longest, lines)

    def add_quotes(self, lines: Sequence[str], delimiter: str, line: int, *, is_open: bool) -> None:
        """Counts a row that a strict reader refuses, unless only spaces follow its quotes."""
        self.is_open = self.is_open or is_open
        text = re.sub(rf'"[ \t]+(?={re.escape(delimiter)}|\r|\n|$)', '"', "".join(lines))
        try:
            next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
        except csv.Error:
            count, first = self.closed_early
            self.closed_early = self.closed_early if is_open else (count + 1, first or line)

    def notes(self, header: Header) -> tuple[str, ...]:
        """Returns a warning for each kind."""
        lines = []
        if (found := self.broken)[0]:
            count, position, line = found
            names = dict(zip(header.positions, header.names, strict=True))
            end = "; the file ends within quotes" if self.is_open else ""
            fields = "1 field has" if count == 1 else f"{count:,} fields have"
            lines.append(
                f"{WARNING}{fields} line breaks, up to {self.longest:,} lines, the first in line {line}, column "
                f"{printable(names.get(position, str(position + 1)))}: check that its quotes are closed{end}"
            )
        elif self.is_open:
            lines.append(f"{WARNING}the file ends within quotes")
        count, line = self.closed_early
        if count:
            rows = "1 row has" if count == 1 else f"{count:,} rows have"
            lines.append(
                f"{WARNING}{rows} text after a closing quote, the first in line {line}; write a quote within quotes "
                'as ""'
            )
        return tuple(lines)


def _lines(path: Path, delimiter: str, encoding: str, doubts: _Doubts | None = None) -> Iterator[tuple[int, list[str]]]:
    """Yields the line number and the fields of each row that is not empty. Raises `UserError`.

    `doubts`: counts the rows whose quotes are doubtful.
    """
    doubts = _Doubts() if doubts is None else doubts
    with _reading(path), path.open(newline="", encoding=encoding) as file:
        kept: list[str] = []  # the lines of the current row
        number = 0  # of the last line that was read

        def lines() -> Iterator[str]:
            nonlocal number
            for line in file:
                number += 1
                kept.append(line)
                yield line

        source = lines()
        strict = csv.reader(source, delimiter=delimiter, strict=True)
        while True:
            kept.clear()
            try:
                row = next(strict, None)
            except csv.Error as error:
                # Read again as the csv module does by default; any other error is raised again.
                row = next(csv.reader(itertools.chain([*kept], source), delimiter=delimiter))
                doubts.add_quotes(kept, delimiter, number - len(kept) + 1, is_open="end of data" in str(error))
            if row is None:
                return
            if len(kept) > 1:
                doubts.add(row, number - len(kept) + 1, len(kept))
            if row or number == 1:
                yield number, [field.strip() for field in row]


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = "" if path.is_absolute() else f" in {Path.cwd()}"
        raise UserError(f"data.file={path}: cannot be read{where} ({error.strerror})") from error
    except (csv.Error, UnicodeError) as error:
        raise UserError(f"data.file={path}: is not a CSV file in UTF-8 ({error})") from error


def _numbers(fields: list[str]) -> np.ndarray:
    """Returns the numbers of texts, float64 [n], NaN for others; see `number`."""
    joined = "".join(fields)
    if joined.isascii() and "_" not in joined:
        with contextlib.suppress(ValueError):
            return np.array(fields, dtype=np.float64)
    return np.array([number(field) for field in fields])


def _merged_integers(fields: Sequence[str], column: np.ndarray) -> tuple[int, int] | None:
    """Returns two different integers of the texts whose numbers in `column` are equal; None if there are none."""
    if not (np.abs(column) > _EXACT).any():
        return None
    first: dict[float, int] = {}
    for field, value in zip(fields, column.tolist(), strict=True):
        if _INTEGER.fullmatch(field) and first.setdefault(value, int(field)) != int(field):
            return first[value], int(field)
    return None


def _are_thousands(fields: Sequence[str]) -> bool:
    """Returns whether numbers are 987 and 1.234: with a decimal point, the former would be 987.000."""
    pointed = [field for field in fields if "." in field]
    return 0 < len(pointed) < len(fields) and all(
        (_POINTS if "." in field else _HUNDREDS).fullmatch(field) for field in fields
    )


def _not_a_number(place: str, name: str, field: str, advice: str) -> UserError:
    if not field:
        return UserError(f"{place}: {name} is empty; fill it in or remove the line")
    return UserError(f"{place}: {name} is {field!r}, not a finite number; {_remedy(field) or advice}")


def _has_images(header: Sequence[str], rows: Sequence[Sequence[str]]) -> bool:
    """Returns whether a column has names of images, also in the first line."""
    images = tuple(EXTENSIONS)
    return any(
        name.lower().endswith(images) and all(row[i].lower().endswith(images) for row in rows)
        for i, name in enumerate(header)
    )


def _is_row(header: Sequence[str], rows: Sequence[Sequence[str]]) -> bool:
    """Returns whether the first line looks like a row: a number in each column of numbers, a known text in the others.

    Not 0, 1, 2, ..., which pandas writes for columns without names, and not the years of a pivot table, or the
    wavelengths of spectra, whose column of texts has a name: these are sorted.
    """
    if [*header] == [str(i) for i in range(len(header))]:
        return False
    numeric = {i for i in range(len(header)) if not any(math.isnan(number(row[i])) for row in rows[:100])}
    names = [number(header[i]) for i in sorted(numeric)]
    if not numeric or any(math.isnan(name) for name in names):
        return False
    texts = [(i, name) for i, name in enumerate(header) if i not in numeric]
    if all(any(row[i] == name for row in rows) for i, name in texts):
        return True
    steps, are_years = np.diff(names), all(name.is_integer() for name in names)
    are_sorted = bool((steps > 0).all()) and (are_years or len(names) >= _SPECTRUM)
    return len(names) > 1 and not (are_sorted or (len(names) >= _SPECTRUM and bool((steps < 0).all())))


def _remedy(text: str) -> str | None:
    """Returns what to do with a field that is nearly a number; None if it is not."""
    if text.lower() in _MISSING:
        return "fill in the missing value or remove the line"
    if text.lower() in _TRUTH:
        return "write 1 and 0"
    if _GROUPED.fullmatch(text):
        return "write it without separators of thousands"
    if _DECIMAL_COMMA.fullmatch(text):
        return "write a decimal point"
    return "write the number without its unit" if _WITH_UNIT.fullmatch(text) else None
