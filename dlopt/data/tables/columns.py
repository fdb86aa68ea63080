"""Columns of a table as features: numbers, categories and dates, with gaps.

What an encoding needs is learned from the training rows and is plain values, which a checkpoint holds. Imports no
torch.
"""

import datetime
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
from pydantic import ConfigDict, StrictBool, StrictFloat, StrictStr, TypeAdapter, ValidationError, with_config

from dlopt.basics.errors import UserError
from dlopt.basics.formats import printable
from dlopt.data.checks import GAPS, WARNING, listed, natural, number, numbers
from dlopt.data.tables.csv_file import finite_numbers, not_a_number, not_finite
from dlopt.data.tables.parquet import innermost

Kind = Literal["number", "category", "date"]
_DECIMALS = re.compile(r"([+-]?[0-9]+)\.0*")  # of an integer, as pandas writes a column of integers with gaps
Form = Literal["2024-01-31", "31/1/2024", "1/31/2024", "2024-01-31T14:05Z"]
"""How a column writes dates, by an example: without slashes, with one of two orders, or with an offset from UTC."""
_PLAIN, _DAY_FIRST, _MONTH_FIRST, _UTC = _FORMS = get_args(Form)
_ISO = re.compile(r"\d{4}-\d\d-\d\d([T ]\d\d:\d\d.*)?")
_PARTS = re.compile(r"(\d{1,4})([./-])(\d{1,2})\2(\d{1,4})(?:,?[T ]+(\d{1,2}:\d\d(?::\d\d)?)(?: ?([AaPp])[Mm])?)?")
# Texts that are meant as dates, also of forms that are not read.
_DATE_LIKE = re.compile(
    r"(\d{4}([./-])\d\d?\2\d\d?|\d\d?([/-])\d\d?\3(\d\d|\d{4})|\d\d?\.\d\d?\.\d{4}|\d\d\.\d\d\.\d\d)(\D.*)?|"
    r"(.*\W)?\d*(jan(uary)?|feb(ruary)?|mar(ch)?|apr(il)?|may|june?|july?|aug(ust)?|sept?(ember)?|oct(ober)?|"
    r"nov(ember)?|dec(ember)?)\W*\d.*",
    re.IGNORECASE,
)
_EPOCH = datetime.datetime(1970, 1, 1)
_DAY = 86400.0  # seconds
_SHOWN = 48  # columns in a description
_WIDTH = 80  # characters of a line of it


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        values: float64 [N], NaN for a gap: numbers; dates, as seconds since 1970; or positions in `texts`.
        texts: the different values of a category, sorted.
        form: of dates.
    """

    name: str
    kind: Kind
    values: np.ndarray
    texts: tuple[str, ...] = ()
    form: Form = _PLAIN

    def select(self, rows: np.ndarray) -> "Column":
        return replace(self, values=self.values[rows])


def categorical(name: str, fields: Sequence[str]) -> Column:
    """Returns a column of categories. 1.0 is the category 1."""
    whole = {field: _DECIMALS.fullmatch(field) for field in set(fields)}
    plain = {field: field if found is None else found[1] for field, found in whole.items()}
    texts = sorted({text for text in plain.values() if text.lower() not in GAPS}, key=natural)
    positions = {text: float(position) for position, text in enumerate(texts)}
    codes = {field: positions.get(text, np.nan) for field, text in plain.items()}
    return Column(name, "category", np.array([codes[field] for field in fields], dtype=np.float64), tuple(texts))


# -- dates


def as_dates(name: str, fields: Sequence[str], form: Form | None = None) -> Column | None:
    """Returns a column of dates; None if a field is neither a date nor a gap, or if no field is a date.

    2024-01-31, 2024/1/31 and 31.1.2024, also with a time; 31/1/2024 and 1/31/2024 (or with -) if only one order fits
    all fields. Times with an offset are in UTC, and no other date is among them.

    `form`: of the training rows; None to find it.
    """
    distinct = {field for field in fields if field.lower() not in GAPS}
    found = {each: seconds for each in ((form,) if form else _FORMS) if (seconds := _read(distinct, each))}
    if not found or [*found] == [_DAY_FIRST, _MONTH_FIRST]:
        return None
    chosen, known = next(iter(found.items()))
    return Column(name, "date", np.array([known.get(field, np.nan) for field in fields], np.float64), form=chosen)


def date_problem(present: Counter[str]) -> str | None:
    """Says why a column has no dates although most of its texts, which are no gaps, look like dates; else None."""
    if 2 * sum(count for field, count in present.items() if _DATE_LIKE.fullmatch(field)) <= present.total():
        return None
    if (field := _unread([*present])) is not None:
        return f"has dates, and {field!r} of a form that is not read, or not that of the first; write 2024-01-31"
    return f"has dates that may be day/month or month/day, such as {next(iter(present))}; write 2024-01-31"


def _unread(fields: Sequence[str], form: Form | None = None) -> str | None:
    """Returns the first field that is no date of the form; None: of those of the first field."""
    forms = [form] if form else [each for each in _FORMS if _read(fields[:1], each)]
    return next((field for field in fields if not any(_read([field], each) for each in forms)), None)


def _read(fields: Iterable[str], form: Form) -> dict[str, float] | None:
    """Returns the seconds since 1970 of dates of a form; None if a field is another text."""
    found = {}
    for field in fields:
        try:
            found[field] = _seconds(field, form)
        except (ValueError, TypeError):  # no such day, or only one of two times has an offset
            return None
    return found


def _seconds(field: str, form: Form) -> float:
    """Returns the seconds since 1970 of a date, by the clock that wrote it or in UTC. Raises ValueError, TypeError."""
    if _ISO.fullmatch(field):
        epoch = _EPOCH.replace(tzinfo=datetime.UTC) if form == _UTC else _EPOCH
        return (datetime.datetime.fromisoformat(field) - epoch).total_seconds()
    if (parts := _PARTS.fullmatch(field)) is None or form == _UTC:
        raise ValueError
    year, month, day = int(parts[1]), int(parts[3]), int(parts[4])
    if len(parts[1]) != 4:
        if len(parts[4]) != 4 or (parts[2] != "." and form == _PLAIN):
            raise ValueError
        first, second, year = year, month, day
        month, day = (first, second) if parts[2] != "." and form == _MONTH_FIRST else (second, first)
    hour, minute, seconds = [*map(int, (parts[5] or "0:0").split(":")), 0][:3]
    if parts[6]:  # 12 AM is midnight
        hour = hour % 12 + 12 * (parts[6] in "Pp") if 1 <= hour <= 12 else 24  # 24 raises ValueError
    return (datetime.datetime(year, month, day, hour, minute, seconds) - _EPOCH).total_seconds()


# -- encodings


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class ColumnEncoding:
    """How a column becomes features.

    Attributes:
        values: of a category, in the training rows; each is a feature, 0 or 1. Another value is 0 in all of them.
        fill: in place of a gap: the median of numbers and dates, the most frequent category; None if the training rows
            have no value.
        has_gaps: the training rows have gaps; a feature marks them, 0 or 1.
        has_times: dates have times of day in the training rows.
        form: of dates in the training rows.
    """

    name: StrictStr
    kind: Kind
    values: tuple[StrictStr, ...]
    fill: StrictFloat | StrictStr | None
    has_gaps: StrictBool
    has_times: StrictBool
    form: Form = _PLAIN  # older checkpoints have none

    @classmethod
    def fitted(cls, column: Column) -> "ColumnEncoding":
        """Learns from a column with the training rows."""
        known = column.values[~np.isnan(column.values)]
        values: tuple[str, ...] = ()
        fill: float | str | None = None
        if column.kind == "category":
            counts = np.bincount(known.astype(np.int64), minlength=len(column.texts))
            values = tuple(text for text, count in zip(column.texts, counts, strict=True) if count)
            fill = column.texts[int(counts.argmax())] if values else None
        elif len(known):
            fill = float(np.median(known))
        has_times = column.kind == "date" and bool((known % _DAY).any())
        return cls(column.name, column.kind, values, fill, len(known) < len(column.values), has_times, column.form)

    @property
    def features(self) -> list[str]:
        """Names of the features."""
        match self.kind:
            case "number":
                names = [self.name]
            case "category":
                names = [f"{self.name}={value}" for value in self.values]
            case "date":
                hour = ["hour"] if self.has_times else []
                names = [f"{self.name} {part}" for part in ("year", "month", "day", "weekday", *hour)]
        return [*names, f"{self.name} is missing"] if self.has_gaps else names

    def apply(self, column: Column) -> np.ndarray:
        """Returns the features of a column, float32 [N, F]."""
        is_gap = np.isnan(column.values)
        match self.kind:
            case "number":
                features = np.where(is_gap, self.fill or 0.0, column.values)[:, None]
            case "category":
                features = self._one_hot(column, is_gap)
            case "date":
                features = self._calendar(np.where(is_gap, self.fill or 0.0, column.values))
        if self.has_gaps:
            features = np.column_stack([features, is_gap])
        return features.astype(np.float32)

    def _one_hot(self, column: Column, is_gap: np.ndarray) -> np.ndarray:
        positions = {value: position for position, value in enumerate(self.values)}
        filled = positions.get(str(self.fill), -1)
        # The last entry is that of a gap.
        known = np.array([*(positions.get(text, -1) for text in column.texts), filled], dtype=np.int64)
        chosen = known[np.where(is_gap, len(column.texts), column.values).astype(np.int64)]
        return chosen[:, None] == np.arange(len(self.values))

    def _calendar(self, seconds: np.ndarray) -> np.ndarray:
        days = np.floor(seconds / _DAY)
        stamps = days.astype("datetime64[D]")
        years, months = stamps.astype("datetime64[Y]"), stamps.astype("datetime64[M]")
        parts = [
            years.astype(np.int64) + 1970,
            months.astype(np.int64) % 12 + 1,
            (stamps - months).astype(np.int64) + 1,
            (days + 3) % 7,  # 1970 began on a Thursday; 0: Monday
        ]
        if self.has_times:
            parts.append((seconds - days * _DAY) / 3600)
        return np.stack(parts, 1)

    def unknown(self, column: Column) -> Counter[str]:
        """Counts what the training rows lack: other categories, and gaps, as an empty text."""
        found: Counter[str] = Counter()
        is_gap = np.isnan(column.values)
        if not self.has_gaps:
            found[""] = int(is_gap.sum())
        if self.kind == "category":
            counts = np.bincount(column.values[~is_gap].astype(np.int64), minlength=len(column.texts))
            found.update({text: int(count) for text, count in zip(column.texts, counts, strict=True)})
            for value in self.values:
                del found[value]
        return +found

    def findings(self, unknown: Counter[str]) -> list[str]:
        """Says what becomes of values that the training rows lack, a line for gaps and one for categories."""
        found = []
        if gaps := unknown[""]:
            found.append(
                f"{gaps:,} gap{'s' * (gaps > 1)} in {self.name}, which has none in the training rows: filled with "
                f"{self._shown_fill}"
            )
        if texts := [text for text in unknown if text]:
            rows = unknown.total() - gaps
            found.append(
                f"{rows:,} row{'s' * (rows > 1)} with a {self.name} that no training row has "
                f"({printable(listed(texts))}): 0 in all of its features"
            )
        return found

    @property
    def _shown_fill(self) -> str:
        if self.kind == "date" and isinstance(self.fill, float):
            return (_EPOCH + datetime.timedelta(seconds=self.fill)).isoformat(" ").removesuffix(" 00:00:00")
        return f"{self.fill:.6g}" if isinstance(self.fill, float) else printable(str(self.fill))

    def describe(self, gaps: int) -> str:
        """Describes the features in a line; `gaps`: of the training rows."""
        parts = [f"{gaps:,} gap{'s' * (gaps > 1)}: {self._shown_fill}, marked"] if gaps else []
        if self.kind == "category":
            values = printable(", ".join(self.values))
            parts.append(f"{len(self.values)} value{'s' * (len(self.values) != 1)}: {values}")
        elif self.kind == "date":
            form = f" (of {self.form})" if self.form != _PLAIN else ""
            parts.append(f"year, month, day, weekday{', hour' if self.has_times else ''}{form}")
        return "; ".join(parts)


_saved = TypeAdapter(tuple[ColumnEncoding, ...])


@dataclass(frozen=True)
class TableEncoding:
    """How the columns of a table become features."""

    columns: tuple[ColumnEncoding, ...]

    @classmethod
    def fitted(cls, columns: Sequence[Column]) -> "TableEncoding":
        """Learns from columns with the training rows."""
        return cls(tuple(map(ColumnEncoding.fitted, columns)))

    @classmethod
    def restored(cls, saved: Any) -> "TableEncoding":
        """Returns the encoding with these `saved` values. Raises `ValueError` if they are none."""
        try:
            return cls(_saved.validate_python(saved))
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None

    @property
    def saved(self) -> list[dict[str, Any]]:
        """Plain values that describe the encoding."""
        return [{**asdict(each), "values": list(each.values)} for each in self.columns]

    @property
    def kinds(self) -> Mapping[str, Kind]:
        return {each.name: each.kind for each in self.columns}

    @property
    def features(self) -> list[str]:
        """Names of the features."""
        return [name for each in self.columns for name in each.features]

    def apply(self, columns: Sequence[Column]) -> np.ndarray:
        """Returns the features of the rows, float32 [N, F]; `columns` are in the order of `kinds`."""
        return np.concatenate([own.apply(column) for own, column in zip(self.columns, columns, strict=True)], 1)

    def warnings(self, columns: Sequence[Column], split: str) -> tuple[str, ...]:
        """Returns a line for each finding in other rows than those of training; `split`: its beginning."""
        pairs = zip(self.columns, columns, strict=True)
        return tuple(f"{WARNING}{split}{line}" for own, column in pairs for line in own.findings(own.unknown(column)))

    def describe(self, columns: Sequence[Column]) -> str:
        """Returns a table of what becomes of each column; `columns`: with the training rows."""
        width = max(len(printable(each.name)) for each in self.columns[:_SHOWN])
        filled = (
            "; gaps have the median, or the most frequent value" if any(each.has_gaps for each in self.columns) else ""
        )
        lines = [f"columns: {len(self.columns)}, as {len(self.features):,} features{filled}"]
        for own, column in list(zip(self.columns, columns, strict=True))[:_SHOWN]:
            gaps = int(np.isnan(column.values).sum())
            line = f"  {printable(own.name):{width}}  {own.kind:8}  {own.describe(gaps)}".rstrip()
            lines.append(line if len(line) <= _WIDTH else f"{line[: _WIDTH - 3]}...")
        if (more := len(self.columns) - _SHOWN) > 0:
            counts = Counter(each.kind for each in self.columns[_SHOWN:])
            lines.append(f"  and {more} more: {', '.join(f'{count} {kind}' for kind, count in sorted(counts.items()))}")
        return "\n".join(lines)


def field_of(value: Any) -> str:
    """Returns a value of Python as a CSV file has it; empty for None, NaN and NaT."""
    if value is None or value != value or str(value) == "<NA>":
        return ""
    if isinstance(value, datetime.date):  # also a datetime
        return value.isoformat()
    return str(value).strip()


def column_of(
    name: str, kind: Kind, fields: Sequence[str], place: Callable[[int], str], form: Form | None = None
) -> Column:
    """Returns a column of a known kind, and of a known form of dates.

    Raises `UserError` for a field of another kind, with the `place` of its row.
    """
    if kind == "category":
        return categorical(name, fields)
    if kind == "date":
        found = as_dates(name, fields, form)
        present = [field for field in fields if field.lower() not in GAPS]
        if found is None and present:
            wrong = fields.index(_unread(present, form) or present[0])
            raise UserError(f"{place(wrong)}: {name} is {fields[wrong]!r}, not a date in the form {form or _PLAIN}")
        return found or Column(name, "date", np.full(len(fields), np.nan))
    values = np.array([number(field) for field in fields], dtype=np.float64)
    for row in not_finite(values):
        if fields[row].lower() not in GAPS:
            raise not_a_number(place(row), name, fields[row], "the model reads numbers in this column")
    return Column(name, "number", values)


@dataclass(frozen=True)
class FeatureColumns:
    """Columns of the training table.

    Attributes:
        features: in the order of the inputs; () if their names are not known.
        target: what the model predicts.
        others: neither of these: columns that are ignored, or name the split.
        delimiter: of a CSV file.
        mean: of the targets of a regression; its outputs are (value - mean) / scale.
        encoding: of columns that are not all numbers without gaps, once it is learned; None: they are the features.
        has_units: a row of the file has the units of the columns.
    """

    features: tuple[str, ...]
    target: str
    others: tuple[str, ...] = ()
    delimiter: str = ","
    mean: float = 0.0
    scale: float = 1.0
    encoding: TableEncoding | None = None
    has_units: bool = False

    @property
    def saved(self) -> dict[str, Any]:
        """The plain values from which `restored` builds the columns again."""
        encoding = {} if self.encoding is None else {"encoding": self.encoding.saved}
        plain = {key: value for key, value in vars(self).items() if key != "encoding"}
        return {**plain, "features": list(self.features), "others": list(self.others), **encoding}

    @classmethod
    def restored(cls, saved: Mapping[str, Any]) -> "FeatureColumns":
        return cls(
            tuple(map(str, saved["features"])),
            str(saved["target"]),
            tuple(map(str, saved["others"])),
            str(saved["delimiter"]),
            float(saved["mean"]),
            float(saved["scale"]),
            TableEncoding.restored(saved["encoding"]) if "encoding" in saved else None,
            bool(saved.get("has_units", True)),  # older checkpoints do not know
        )

    @property
    def inputs(self) -> Sequence[str]:
        """Names of the model's inputs."""
        return self.features if self.encoding is None else self.encoding.features

    @property
    def description(self) -> dict[str, Any]:
        """The saved values, with the names of the model's inputs."""
        return {**self.saved, "inputs": [*self.inputs]}

    def require(self, names: Collection[str], where: str) -> None:
        """Raises `UserError` that starts with `where` if a table with these columns lacks a feature."""
        if missing := [name for name in self.features if name not in names]:
            lacks = f"the column{'s' * (len(missing) > 1)} {', '.join(missing)}"
            raise UserError(f"{where}: lacks {lacks}, which the model reads; it has {', '.join(names)}")

    def unread(self, names: Sequence[str]) -> list[str]:
        """Returns the columns of a table that the training table had not."""
        known = {*self.features, self.target, *self.others, ""}
        return [name for name in names if name not in known]

    @property
    def numeric(self) -> Collection[str]:
        """Columns that are read as numbers."""
        kinds = {} if self.encoding is None else self.encoding.kinds
        return [name for name in self.features if kinds.get(name, "number") == "number"]

    def matrix(
        self, fields: Mapping[str, Any], place: Callable[[int], str], unknown: dict[str, Counter[str]] | None = None
    ) -> np.ndarray:
        """Returns the features of rows, float64 [n, F].

        Args:
            fields: the columns by name: texts of a CSV file, or arrays of Arrow.
            place: names a row for messages.
            unknown: counts what the training rows lack, for each column; see `findings`.

        Raises:
            UserError: a value is missing without an encoding that fills it in, or is of another kind.
        """
        if self.encoding is not None:
            columns = [
                column_of(each.name, each.kind, texts_of(fields[each.name]), place, each.form)
                for each in self.encoding.columns
            ]
            for own, column in zip(self.encoding.columns, columns, strict=True):
                if unknown is not None:
                    unknown.setdefault(own.name, Counter()).update(own.unknown(column))
            return self.encoding.apply(columns)
        return np.concatenate([_numbers(fields[name], name, place) for name in self.features], axis=1)

    def findings(self, unknown: Mapping[str, Counter[str]]) -> list[str]:
        """Says what becomes of values that the training rows lack."""
        columns = () if self.encoding is None else self.encoding.columns
        return [line for each in columns for line in each.findings(unknown.get(each.name, Counter()))]


def texts_of(values: Any) -> list[str]:
    """Returns values of a column as the texts of a CSV file: of a list, or of an array of Arrow."""
    items = values if isinstance(values, list) else values.to_pylist()
    return [field_of(value) for value in items]


def _numbers(values: Any, name: str, place: Callable[[int], str]) -> np.ndarray:
    """Returns the numbers of a column, float64 [n, 1], or of a column of lists, float64 [n, F]."""
    if isinstance(values, list):
        return finite_numbers(values, name, place, "the model reads numbers in this column")[:, None]
    if values.null_count:
        row = values.is_null().to_pylist().index(True)
        raise UserError(f"{place(row)}: {name} is missing")
    kind = str(values.type)
    if innermost(values.type) != kind:  # lists
        rows = [numbers(each, f"{place(row)}: {name}", kind).reshape(-1) for row, each in enumerate(values.to_pylist())]
        return _stacked(rows, name, place)
    column = values.to_numpy(zero_copy_only=False)
    if column.dtype.kind not in "biuf":
        raise UserError(f"{place(0)}: {name} has the type {kind}; the model reads numbers in this column")
    column = column.astype(np.float64)
    for row in not_finite(column):
        raise UserError(f"{place(row)}: {name} is {column[row]}, not a finite number of float32")
    return column[:, None]


def _stacked(rows: Sequence[np.ndarray], name: str, place: Callable[[int], str]) -> np.ndarray:
    for row, each in enumerate(rows):
        if len(each) != len(rows[0]):
            raise UserError(f"{place(row)}: {name} has {len(each)} numbers, other rows have {len(rows[0])}")
    return np.array(rows, dtype=np.float64).reshape(len(rows), -1)
