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
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dlopt.basics.errors import UserError
from dlopt.basics.files import refuse_special
from dlopt.basics.formats import printable
from dlopt.data.checks import GAPS, IMAGE_EXTENSIONS, LARGEST, LEFT_OUT, WARNING, number
from dlopt.data.settings import SPLITS
from dlopt.data.tables.encoding import guess_encoding

_INDEX = re.compile(r"(Unnamed: \d+(\.\d+)*)?")  # the name of pandas' index, as written and as read back
_MISSING = GAPS | {"none"}
_TRUTH = frozenset({"true", "false", "yes", "no"})
_GROUPED = re.compile(r"[+-]?\d{1,3}([ \u00a0\u202f,.'’_]\d{3})+([.,]\d+)?")  # 1,234,567
_POINTS, _HUNDREDS = re.compile(r"[+-]?[1-9][0-9]{0,2}(\.[0-9]{3})+"), re.compile(r"[+-]?[0-9]{1,3}")
_DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+([eE][+-]?\d+)?")
_WITH_UNIT = re.compile(r"[^\w\s.,+-]{0,3}\s?[+-]?[0-9][0-9.,]*\s?[^\d\s.,+-]{0,5}")  # $5, 5 %, 12 kg
_INTEGER = re.compile(r"[+-]?[0-9]{1,39}")
_WHOLE = re.compile(r"-?[0-9]+(\.0*)?")  # 1 and 1.0 are one integer, which pandas writes in two ways
_LEADING_ZERO = re.compile(r"^[+-]?0[0-9]+$", re.MULTILINE)
_PACKED = {b"\x1f\x8b": "gzip", b"PK\3\4": "zip, or Excel", b"BZh": "bzip2", b"\xfd7zX": "xz", b"(\xb5/\xfd": "zstd"}
_CHUNK = 1024  # rows that are converted at once
_SPECTRUM = 8  # columns; a row has as few numbers in order by chance
_MANY_TEXTS = 10_000
_FIRST = 1000  # rows that are compared with the header
_LONGEST_FIELD = 1 << 27  # characters; the csv module reads no more than 131,072 by default
_NO_UNIT = frozenset({"", "-", "–"})
_GUESSED = 1 << 18  # bytes of a text in another encoding
_SEPARATOR = re.compile(r'"?sep=(.)"?\s*')  # the first line, as Excel reads it
_UNIT = re.compile(r"[^\w\s+.-]{0,2}[^\W\d_][^,;]{0,23}|[^\w\s+.-]{1,2}")  # m/s, (kg), [V], %, µg


@dataclass(frozen=True)
class Header:
    """The first line of a CSV file, and how to read the others.

    Attributes:
        names: of the columns, without spaces around them.
        positions: of these columns in a row.
        width: fields of a row.
        above: lines above the names.
        has_units: the row below the names has the units of the columns.
        notes: which lines and columns were left out.
        line: the names of all columns, also of those left out.
    """

    path: Path
    delimiter: str
    encoding: str
    names: tuple[str, ...]
    positions: tuple[int, ...]
    width: int
    above: int
    has_units: bool
    notes: tuple[str, ...]
    line: tuple[str, ...]


def require_columns(path: Path, columns: Collection[str], names: Collection[str], hint: str = "") -> None:
    """Raises `UserError` if a column of `names` is not in the `columns` of the file."""
    for name in names:
        if name not in columns:
            raise UserError(f"data.file={path}: has no column {name!r}; it has {', '.join(columns) or 'none'}{hint}")


@dataclass
class NoNumbers:
    """The fields of a column that are no finite numbers.

    `gaps`: how many are gaps, see `GAPS`; `others`: how many are not. `first`: the row and the text of the first other.
    `zero`: an integer that begins with 0, as a code does: 00501. `has_twins`: two texts are one number: 1.1 and 1.10.
    """

    gaps: int = 0
    others: int = 0
    first: tuple[int, str] | None = None
    zero: str | None = None
    has_twins: bool = False

    def add(self, row: int, field: str) -> None:
        if field.lower() in GAPS:
            self.gaps += 1
            return
        self.others += 1
        self.first = self.first or (row, field)


@dataclass(frozen=True)
class TableFile:
    """Columns of a CSV file or of another table.

    Attributes:
        texts: fields of columns, without spaces around them.
        numbers: columns of finite numbers, float64 [N, F]; NaN for the fields in `no_numbers`.
        lines: line number of each row, for messages.
        notes: what looks wrong in the texts of numbers.
        no_numbers: of the columns that may have gaps and texts.
        unit: what `lines` count.
    """

    path: Path
    texts: Mapping[str, list[str]]
    numbers: np.ndarray
    lines: Sequence[int]
    notes: tuple[str, ...]
    no_numbers: Mapping[str, NoNumbers]
    unit: str = "line"

    def __len__(self) -> int:
        return len(self.lines)

    def place(self, row: int) -> str:
        """Names the line of a row for messages."""
        return f"data.file={self.path}, {self.unit} {self.lines[row]}"

    def column(self, name: str) -> list[str]:
        """Returns the fields of a column of texts. Raises `UserError` for an empty one."""
        fields = self.texts[name]
        if empty := fields.count(""):
            more = f", and in {empty - 1:,} more" if empty > 1 else ""
            raise UserError(f"{self.place(fields.index(''))}: {name} is empty{more}; fill it in or remove the line")
        return fields

    def splits(self, column: str | None, *, trains: bool = True) -> list[str] | None:
        """Returns train, val or test for each row; None without a column.

        Raises `UserError` for another value, or if no row is for training and it `trains`.
        """
        if column is None:
            return None
        names = self.column(column)
        for row, name in enumerate(names):
            if name not in SPLITS:
                raise UserError(f"{self.place(row)}: {column} is {name!r}; must be train, val or test")
        if trains and "train" not in names:
            raise UserError(f"data.file={self.path}: has no training rows")
        return names

    def refuse_unknown(self, column: str, labels: Sequence[Collection[str]], parts: Sequence[str]) -> set[str]:
        """Returns the classes of the training rows. Raises `UserError` for another class in other rows.

        `labels`: of each row.
        """
        known = {name for names, part in zip(labels, parts, strict=True) if part == "train" for name in names}
        for row, names in enumerate(labels):
            if unknown := [name for name in names if name not in known]:
                raise UserError(f"{self.place(row)}: {column} is {unknown[0]!r}, a class that no training row has")
        return known


def read_header(file: str, delimiter: str = ",", *, may_have_units: bool = True) -> Header:
    """Reads the header line of a file in UTF-8, or in UTF-16 with a byte order mark.

    Leaves out columns without a name, or with the name that pandas gives them: an index. Also leaves out lines above
    the names (sep=; and comments, #) and a row of units below them, if it `may_have_units`.

    Raises:
        UserError: the file cannot be read, has no header line, or has two columns of one name.
    """
    path = Path(os.path.expanduser(file))
    with _reading(path):
        refuse_special(path)
        with path.open("rb") as binary:
            mark = binary.read(4)
    refuse_packed(f"data.file={path}", mark)
    encoding = "utf-16" if mark[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
    delimiter, above, notes = _separator(path, delimiter, encoding)
    rows_below = _lines(path, delimiter, encoding, above)
    first = list(itertools.islice(rows_below, _FIRST + 1))
    while first and first[-1][1][0].startswith("#") and (more := list(itertools.islice(rows_below, _FIRST))):
        first += more
    comments = _comments(first)
    if comments:
        count, above = len(comments), first[len(comments) - 1][0]
        lines = "1 line" if count == 1 else f"{count} lines"
        notes += (f"{LEFT_OUT}{lines} above the names of the columns ({_shown(comments[0])})",)
    line, fields = first[len(comments)] if len(first) > len(comments) else (1, [])
    below = first[len(comments) + 1 :]
    if any("\0" in name for name in fields):
        raise UserError(f"data.file={path}: has zero bytes, as UTF-16 without a byte order mark; save it as UTF-8")
    rows = [row for _, row in below if len(row) == len(fields)]
    if not rows and below and (width := min(len(row) for _, row in below)) > len(fields) + 1:
        raise UserError(
            f"{_place(path, line)}: has {len(fields)} fields ({_shown(fields)}), the lines below have {width}; remove "
            "the lines above the names of the columns"
        )
    if has_units := may_have_units and _are_units(fields, rows):
        if lacking := [name for field, name in zip(fields, rows[0], strict=True) if name and not field]:
            raise UserError(f"{_place(path, line)}: lacks the name {lacking[0]!r} of line {below[0][0]}; remove a line")
        notes += (f"{LEFT_OUT}line {below[0][0]}, the units of the columns ({_shown(rows[0])})",)
        del rows[0]
    if _has_images(fields, rows) or (rows and _is_row(fields, rows)):
        raise UserError(
            f"data.file={path}: line {line} has values ({_shown(fields)}); insert a line with the names of the columns "
            "before it"
        )
    kept = [i for i, name in enumerate(fields) if not _INDEX.fullmatch(name)]
    names = [fields[i] for i in kept]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"data.file={path}: two columns have the same name, {', '.join(twice)}")
    notes += tuple(
        f"{LEFT_OUT}column {i + 1}{f' ({name})' if name else ', which has no name'}"
        for i, name in enumerate(fields)
        if i not in kept
    )
    return Header(
        path, delimiter, encoding, tuple(names), tuple(kept), len(fields), above, has_units, notes, tuple(fields)
    )


def refuse_packed(where: str, mark: bytes) -> None:
    """Raises `UserError` that starts with `where` if these first bytes are those of a compressed file."""
    for first, kind in _PACKED.items():
        if mark.startswith(first):
            raise UserError(f"{where}: is compressed ({kind}); unpack it, or save it as a text in UTF-8")


def _shown(fields: Sequence[str]) -> str:
    return printable(", ".join(fields[:3]) + ", ..." * (len(fields) > 3))


def _separator(path: Path, delimiter: str, encoding: str) -> tuple[str, int, tuple[str, ...]]:
    """Returns the delimiter that a first line sep=; sets, the number of such lines, and a line about it."""
    with _reading(path), path.open(encoding=encoding) as file:
        found = _SEPARATOR.fullmatch(file.readline(len('"sep=;"\n')))
    if found is None:
        return delimiter, 0, ()
    return found[1], 1, (f"{LEFT_OUT}line 1, which sets the delimiter {found[1]!r}",)


def _comments(rows: Sequence[tuple[int, list[str]]]) -> list[list[str]]:
    """Returns the rows at the start that are comments: those with #, but for a header such as #,name,height."""
    comments = [row for _, row in itertools.takewhile(lambda each: each[1][0].startswith("#"), rows)]
    below = [row for _, row in rows[len(comments) :]]
    if not comments or not below or len(comments[-1]) != len(below[0]):
        return comments
    same = [row for row in below if len(row) == len(below[0])]
    return comments if _are_units(comments[-1], same) else comments[:-1]


def _are_units(header: Sequence[str], rows: Sequence[Sequence[str]]) -> bool:
    """Returns whether the first row has the units of columns whose other rows have numbers, and nothing in the others.

    With two units or more, other columns may have texts that no other row has.
    """
    if len(rows) < 3:
        return False
    units: list[str] = []
    words: list[str] = []
    for i in range(len(header)):
        first, *others = (row[i] for row in rows)
        present = [field for field in others if field and field.lower() not in _MISSING]
        is_numeric = present and not any(math.isnan(number(field)) for field in present)
        if first in _NO_UNIT:
            continue
        if is_numeric and (not _UNIT.fullmatch(first) or remedy(first)):
            return False
        if not is_numeric and first in others:
            return False
        (units if is_numeric else words).append(first)
    return bool(units) and (len(units) > 1 or not words)


def read_columns(
    header: Header, texts: Collection[str] = (), numbers: Mapping[str, str | None] | None = None
) -> TableFile:
    """Reads columns that the file has, a few rows at a time: only these are kept. Skips empty lines.

    Args:
        texts: columns to keep as they are.
        numbers: columns to convert to numbers, with the advice on a column of texts; None: gaps and texts are allowed.

    Raises:
        UserError: a row has more or fewer fields than the header, an empty field among
            `numbers`, or one that is no finite number, unless it may have them. The message names the line.
    """
    numbers = numbers or {}
    no_numbers = {name: NoNumbers() for name, advice in numbers.items() if advice is None}
    place = dict(zip(header.names, header.positions, strict=True))
    kept: dict[str, list[str]] = {name: [] for name in texts}
    known: dict[str, dict[str, str]] = {name: {} for name in texts}
    lines = array.array("q")
    values = np.empty((_CHUNK, len(numbers)))
    notes: tuple[str, ...] = ()
    seen: dict[str, dict[float, str]] = {name: {} for name in numbers}  # the first text of each number
    merged: dict[str, str] = {}  # the warning of each column that has two texts of one number
    doubts = Doubts()
    for chunk in read_chunks(header, doubts):
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
            column = _numbers(fields)
            for row in not_finite(column):
                if advice is not None:
                    raise not_a_number(_place(header.path, chunk[row][0]), name, fields[row], advice)
                no_numbers[name].add(start + row, fields[row])
                column[row] = np.nan
            values[start : start + len(chunk), position] = column
            if advice is None and (zero := _LEADING_ZERO.search("\n".join(fields))):
                no_numbers[name].zero = zero[0]
            elif name not in merged and (pair := _one_number(fields, column, seen[name])) is not None:
                differ = all(map(_INTEGER.fullmatch, pair)) and int(pair[0]) != int(pair[1])
                if differ:
                    then = "subtract a constant from them in the file"
                    merged[name] = f"{WARNING}column {name}: float64 makes {pair[0]} and {pair[1]} equal; {then}"
                elif advice is None and not all(map(_WHOLE.fullmatch, pair)):
                    no_numbers[name].has_twins = True
    if not lines:
        raise UserError(f"data.file={header.path}: has no rows")
    values.resize((len(lines), len(numbers)), refcheck=False)
    return TableFile(header.path, kept, values, lines, (*notes, *merged.values(), *doubts.notes(header)), no_numbers)


def read_chunks(header: Header, doubts: "Doubts | None" = None) -> Iterator[list[tuple[int, list[str]]]]:
    """Yields the line number and all fields of the rows below the header, a few rows at a time.

    Raises `UserError` for a row that has more or fewer fields than the header.
    """
    rows = _lines(header.path, header.delimiter, header.encoding, header.above, doubts)
    for _ in range(1 + header.has_units):
        next(rows, None)
    is_first = True
    while chunk := list(itertools.islice(rows, _CHUNK)):
        for line, row in chunk:
            if len(row) != header.width:
                other = ""
                if is_first and row is chunk[0][1] and len(row) == header.width + 1 > 2:  # as R writes a table
                    other = " (if the first column is an index, the header lacks a name for it)"
                raise UserError(f"{_place(header.path, line)}: has {len(row)} fields instead of {header.width}{other}")
        yield chunk
        is_first = False


def _shared(fields: list[str], known: dict[str, str]) -> list[str]:
    """Returns the texts with one object per value, because labels repeat; not for many values, such as paths."""
    return fields if len(known) > _MANY_TEXTS else [known.setdefault(field, field) for field in fields]


def _place(path: Path, line: int) -> str:
    return f"data.file={path}, line {line}"


@dataclass
class Doubts:
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


def _lines(
    path: Path, delimiter: str, encoding: str, above: int, doubts: Doubts | None = None
) -> Iterator[tuple[int, list[str]]]:
    """Yields the line number and the fields of each row that is not empty. Raises `UserError`.

    `above`: lines to skip; `doubts`: counts the rows whose quotes are doubtful.
    """
    doubts = Doubts() if doubts is None else doubts
    csv.field_size_limit(max(csv.field_size_limit(), _LONGEST_FIELD))  # of the whole process; never lowered
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
        for _ in range(above):
            next(source, None)
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
            if row:
                yield number, [field.strip() for field in row]


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = "" if path.is_absolute() else f" in {Path.cwd()}"
        raise UserError(f"data.file={path}: cannot be read{where} ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error) from None
    except (csv.Error, UnicodeError) as error:
        longest = f"; a field may have {_LONGEST_FIELD:,} characters: check its quotes" if "limit" in str(error) else ""
        raise UserError(f"data.file={path}: is not a CSV file in UTF-8 ({error}{longest})") from error


def _not_utf8(path: Path, error: UnicodeDecodeError) -> UserError:
    """Returns an error that names the encoding that fits."""
    with path.open("rb") as file:
        line = 0
        for text in file:
            line += 1
            try:
                text.decode()
            except UnicodeDecodeError:
                break
        else:  # UTF-16
            return UserError(f"data.file={path}: is not a CSV file in {error.encoding} ({error.reason})")
        # To the end of a line: a character of several bytes may end with the bytes that were read.
        text += file.read(_GUESSED) + file.readline(_GUESSED)
    if (guess := guess_encoding(text)) is None:
        return UserError(
            f"{_place(path, line)}: is not UTF-8, and fits no other known encoding; save the file as UTF-8"
        )
    encoding, word = guess
    return UserError(
        f"{_place(path, line)}: is not UTF-8; it fits {encoding} ({printable(word)}): convert the file with "
        f"iconv -f {encoding.upper().replace('_', '-')} -t UTF-8 {path.name} > NEW"
    )


def _numbers(fields: list[str]) -> np.ndarray:
    """Returns the numbers of texts, float64 [n], NaN for others; see `number`."""
    joined = "".join(fields)
    if joined.isascii() and "_" not in joined:
        with contextlib.suppress(ValueError):
            return np.array(fields, dtype=np.float64)
    return np.array([number(field) for field in fields])


def finite_numbers(fields: list[str], name: str, place: Callable[[int], str], advice: str) -> np.ndarray:
    """Returns the numbers of the texts in a column, float64 [n].

    Raises `UserError` with the `place` of a row whose text is empty, or no finite number of float32. `advice`: on a
    column of texts.
    """
    column = _numbers(fields)
    for row in not_finite(column):
        raise not_a_number(place(row), name, fields[row], advice)
    return column


def not_finite(values: np.ndarray) -> list[int]:
    """Returns the rows of [N] that are NaN, or not finite in float32."""
    rows: list[int] = np.flatnonzero(~(np.abs(values) <= LARGEST)).tolist()
    return rows


def _one_number(fields: Sequence[str], column: np.ndarray, seen: dict[float, str]) -> tuple[str, str] | None:
    """Returns two different texts whose numbers in `column` are equal, but for 0 and -0; None if there are none.

    `seen`: the first text of each number of earlier rows, of not too many; changed.
    """
    if len(seen) > _MANY_TEXTS:
        seen.clear()
    for field, value in zip(fields, column.tolist(), strict=True):
        if abs(value) > 0 and seen.setdefault(value, field) != field:
            return seen[value], field
    return None


def _are_thousands(fields: Sequence[str]) -> bool:
    """Returns whether numbers are 987 and 1.234: with a decimal point, the former would be 987.000."""
    pointed = [field for field in fields if "." in field]
    return 0 < len(pointed) < len(fields) and all(
        (_POINTS if "." in field else _HUNDREDS).fullmatch(field) for field in fields
    )


def not_a_number(place: str, name: str, field: str, advice: str) -> UserError:
    if not field:
        return UserError(f"{place}: {name} is empty; fill it in or remove the line")
    return UserError(f"{place}: {name} is {field!r}, not a finite number; {remedy(field) or advice}")


def _has_images(header: Sequence[str], rows: Sequence[Sequence[str]]) -> bool:
    """Returns whether a column has names of images, also in the first line."""
    images = tuple(IMAGE_EXTENSIONS)
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


def remedy(text: str) -> str | None:
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
