"""Reads the columns of a CSV or Parquet file, and decides what each of them is. Imports no torch.

The values of a Parquet file are read as the texts that pandas writes to a CSV file: both have one meaning.
"""

import functools
import itertools
import os
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Unpack, cast

import numpy as np

from dlopt.basics.cache import file_state
from dlopt.basics.errors import UserError
from dlopt.basics.formats import printable
from dlopt.data.checks import (
    GAPS,
    LARGEST,
    LEFT_OUT,
    MISSING,
    WARNING,
    column_warnings,
    count_rows,
    equal_forms,
    label_warnings,
    listed,
    number,
    refuse_values,
    rounding_warnings,
    without_decimals,
)
from dlopt.data.tables.columns import (
    Column,
    FeatureColumns,
    Form,
    Kind,
    as_dates,
    categorical,
    column_of,
    date_problem,
    field_of,
)
from dlopt.data.tables.csv_file import (
    Header,
    NoNumbers,
    TableFile,
    not_a_number,
    not_finite,
    read_columns,
    read_header,
    remedy,
    require_columns,
)
from dlopt.data.tables.further import FurtherKeys, columns_of, further_of
from dlopt.data.tables.parquet import bounded, is_parquet, library, open_parquet, read_parquet, stored_names, with_names

Labels = Literal["class", "value"]
_FEW = 20  # rows, in which values may differ, or decide the label, by chance
_MOST_VALUES = 1000  # of a category, each of which is a feature
_FEW_UNITS = 20  # texts such as 1st, 2nd, 3rd that are categories, not numbers with a unit
_ID = re.compile(r"(row|user|customer|client|patient|order|item|product|sample|uu|gu)?id|key|index|number|no|nr")
_KEYS: Mapping[Kind, str] = {"category": "categories", "date": "dates", "number": "numbers"}
_TEXTS = ("string", "large_string", "string_view")  # types of Parquet files
_EARLY = 1 << 24  # bytes of a file that is read before torch is imported


class _KindKeys(FurtherKeys, total=False):  # runs from before these keys have none
    categories: tuple[str, ...]
    dates: tuple[str, ...]
    numbers: tuple[str, ...]


class TableKeys(_KindKeys):
    """Config keys of a table: see `conf/data/table.yaml`."""

    file: str
    delimiter: str
    target: str | None
    ignore: tuple[str, ...]
    labels: Labels
    standardize_target: bool
    split_column: str | None


@dataclass(frozen=True)
class Table:
    """The columns of a file.

    Attributes:
        columns: what the features and the others are; without the scale of the target.
        features: numbers float64 [N, F] if no column has gaps or is of another kind; else the columns.
        answers: classes, or values float64 [N].
        parts: train, val or test for each row; None without a column of them.
        notes: what was left out, and what looks wrong.
        lines: number of each row in the file; `unit`: what it counts.
        further: what divides the rows; see `dlopt.data.division`.
    """

    columns: FeatureColumns
    features: np.ndarray | list[Column]
    answers: Sequence[str] | np.ndarray
    parts: list[str] | None
    notes: tuple[str, ...]
    lines: Sequence[int]
    unit: str
    further: Mapping[str, np.ndarray]


def read_table(trained: FeatureColumns | None = None, **keys: Unpack[TableKeys]) -> Table:
    """Reads a table; see `dlopt.data.tables.table.table`. `trained`: the columns that a trained model reads."""
    file, target, ignore, labels = keys["file"], keys["target"], keys["ignore"], keys["labels"]
    path = Path(os.path.expanduser(file))
    reader = _ParquetReader(path) if is_parquet(str(path)) else _CsvReader(file, keys["delimiter"], trained)
    names = reader.names
    encoding = None if trained is None else trained.encoding
    kinds = None if encoding is None else encoding.kinds
    forms = {} if encoding is None else {each.name: each.form for each in encoding.columns}
    if target is None:
        target = names[-1] if trained is None else trained.target
    split_column, by_name = keys["split_column"], cast(Mapping[str, Any], keys)
    dividing = columns_of(keys, target=target, split_column=split_column)
    split_columns = [*([] if split_column is None else [split_column]), *dividing.values()]
    typed: dict[Kind, Sequence[str]] = {kind: by_name.get(key, ()) for kind, key in _KEYS.items()}
    require_columns(path, names, [target, *ignore, *split_columns, *itertools.chain(*typed.values())])
    features = [name for name in names if name not in (target, *ignore, *split_columns)]
    unread: tuple[str, ...] = ()
    if trained is not None:
        trained.require(names, f"data.file={file}")
        unread = tuple(trained.unread(features))
        features = [*trained.features] or features
    if not features:
        raise UserError(f"data.file={file}: no column is left as a feature")
    chosen = _chosen(features, typed) if kinds is None else kinds
    open_names = {name for name in features if name not in chosen and trained is None}
    stored = [name for name in reader.categories if name in open_names]
    as_text = [name for name in reader.texts if name in open_names]
    as_text += [name for name in features if chosen.get(name, "number") != "number"]
    texts = [*split_columns, *as_text] if labels == "value" else [target, *split_columns, *as_text]
    advice: dict[str, str | None] = dict.fromkeys(name for name in features if name not in as_text)
    if labels == "value":
        advice[target] = "every row needs a target (classes: data.labels=class)"
    content = reader.read(texts, advice)
    by_number = dict(zip(advice, content.numbers.T, strict=True))
    warnings: tuple[str, ...] = ()
    answers: Sequence[str] | np.ndarray
    if labels == "value":
        answers = targets = by_number.pop(target)
        if not keys["standardize_target"]:  # in float64
            warnings = rounding_warnings([(f"the target {target}", targets)])
    else:
        answers, merged = without_decimals(_labelled(content, target), target)
        warnings = (*merged, *label_warnings(target, Counter(answers)))
        refuse_values(target, answers, len(answers))
    parts = content.splits(split_column, trains=trained is None)
    if parts is not None and trained is None and not isinstance(answers, np.ndarray):
        content.refuse_unknown(target, [[label] for label in answers], parts)
    doubts = content.no_numbers.items()
    zeros = [name for name, each in doubts if each.zero and name in open_names]
    codes = [name for name in zeros if not (np.nan_to_num(by_number[name]) % 1).any()]  # 007 beside 1.5 is a number
    codes += [name for name, each in doubts if each.has_twins and name in open_names and name not in codes]
    is_plain = not as_text and not codes and not any(each.gaps or each.others for _, each in doubts)
    unclear = [name for name, each in doubts if (each.others and name not in chosen) or name in codes]
    more = reader.read(unclear, {}).texts if unclear else {}
    decision = _Decision(content, {**content.texts, **more}, by_number, chosen, forms, stored)
    numbers = np.unique(np.asarray(answers), return_inverse=True)[1]
    found: np.ndarray | list[Column]
    if kinds is None and is_plain:
        found = content.numbers[:, : len(features)]
        ignored = "leave it out with data.ignore=[{name}]"
        if trained is None and len(features) > 1:
            decision.look_for_leaks([Column(name, "number", by_number[name]) for name in features], target, numbers)
        leaks = (f"{WARNING}{each}" for each in decision.problems)
        warnings = (*column_warnings(zip(features, found.T, strict=True), ignored), *leaks, *warnings)
    else:
        found = [decision.column(name) for name in features]
        if kinds is None and len(features) > 1:
            decision.look_for_identifiers(found)
            decision.look_for_leaks(found, target, numbers)
        decision.refuse(f"data.file={file}")
        measured = [(f"column {each.name}", each.values[~np.isnan(each.values)]) for each in found
                    if each.kind == "number"]  # fmt: skip
        warnings = (*rounding_warnings(measured), *decision.notes, *warnings)
    others = tuple(name for name in names if name in (*ignore, *split_columns))
    left_out = (f"{LEFT_OUT}columns that the model does not read: {listed(unread)}",) if unread else ()
    notes = (*reader.notes, *left_out, *content.notes, *warnings)
    columns = FeatureColumns(
        tuple(features), target, others, reader.delimiter, encoding=encoding, has_units=reader.has_units
    )
    further = further_of(dividing, content.column, content.place)
    return Table(columns, found, answers, parts, notes, content.lines, content.unit, further)


def _labelled(content: TableFile, target: str) -> list[str]:
    """Returns the labels. Raises `UserError` if one is missing."""
    labels = content.column(target)
    words = {label for label in set(labels) if label.lower() in MISSING}
    if words and len(words) < len(set(labels)):
        missing = [row for row, label in enumerate(labels) if label in words]
        more = f", as in {len(missing) - 1:,} more" if len(missing) > 1 else ""
        raise UserError(
            f"{content.place(missing[0])}: {target} is {labels[missing[0]]!r}, a missing label{more}; remove these "
            "rows, or write another name for the class"
        )
    return labels


def _chosen(features: Sequence[str], keys: Mapping[Kind, Sequence[str]]) -> dict[str, Kind]:
    """Returns what the keys say of columns. Raises `UserError` for a column that is no feature, or in two keys."""
    chosen: dict[str, Kind] = {}
    for kind, names in keys.items():
        for name in names:
            typed = f"data.{_KEYS[kind]}=[{name}]"
            if name not in features:
                raise UserError(f"{typed}: {name} is the target, names the split, or is ignored; leave it out here")
            if name in chosen:
                raise UserError(f"{typed}: {name} is also in data.{_KEYS[chosen[name]]}; it can be in one of them")
            chosen[name] = kind
    return chosen


@dataclass
class _Decision:
    """What the columns of a table are, and the problems with them, which are reported together.

    `chosen`: what keys say of columns; `forms`: of dates in a training table; `stored`: as categories.
    """

    content: TableFile
    texts: Mapping[str, list[str]]
    numbers: Mapping[str, np.ndarray]
    chosen: Mapping[str, Kind]
    forms: Mapping[str, Form]
    stored: Collection[str]
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    to_ignore: list[str] = field(default_factory=list)

    def column(self, name: str) -> Column:
        """Returns a column; an empty one after a problem."""
        found = self._found(name)
        if found is None:
            return Column(name, "number", np.full(len(self.content), np.nan))
        if np.isnan(found.values).all() and name not in self.chosen:
            self.problems.append(f"{name} has no values; leave it out with {_override('ignore', [name])}")
            self.to_ignore.append(name)
        return found

    def _found(self, name: str) -> Column | None:
        kind, fields = self.chosen.get(name), self.texts.get(name)
        if fields is None or kind == "number":
            doubt = self.content.no_numbers[name]
            if doubt.first is not None:
                self._report(name, *doubt.first, "")
            return Column(name, "number", self.numbers[name])
        if kind is not None:
            try:
                return column_of(name, kind, fields, self._line, self.forms.get(name))
            except UserError as error:
                self.problems.append(str(error))
                return None
        if name in self.stored:
            return categorical(name, fields)
        if (found := as_dates(name, fields)) is not None:
            return found
        present = Counter(field for field in fields if field.lower() not in GAPS)
        if (problem := date_problem(present)) is not None:
            self.problems.append(f"{name} {problem}; or use {_override('categories', [name])}")
            return None
        for group in equal_forms(present):
            self.notes.append(f"{WARNING}{name} has categories that differ in form only: {', '.join(map(repr, group))}")
        if present and all(abs(number(field)) <= LARGEST for field in present):
            key = _override("numbers", [name])
            self.notes.append(f"{name}: texts such as {min(present)} are read as categories; for numbers, use {key}")
            return categorical(name, fields)
        if (wrong := _typing_error(present)) is not None:
            self._report(name, fields.index(wrong), wrong, f"correct it, or use {_override('categories', [name])}")
            return None
        return categorical(name, fields)

    def _report(self, name: str, row: int, field: str, advice: str) -> None:
        error = not_a_number(self._line(row), name, field, advice or "the column is one of numbers")
        self.problems.append(str(error))

    def _line(self, row: int) -> str:
        return f"{self.content.unit} {self.content.lines[row]}"

    def look_for_identifiers(self, columns: Sequence[Column]) -> None:
        """Notes columns that number or name the rows."""
        for column in columns:
            if column.name in self.chosen or column.kind == "date":
                continue
            known = column.values[~np.isnan(column.values)]
            distinct = len(np.unique(known))
            found = None
            if column.kind == "category" and distinct > max(len(known) / 2, _FEW - 1):
                found = f"has {distinct:,} different texts in {len(known):,} rows, as an identifier has"
            elif column.kind == "category" and distinct > _MOST_VALUES:
                found = f"has {distinct:,} categories, each of which would be a feature"
            elif column.kind == "number" and _is_identifier(column.name, known):
                found = "counts the rows" if count_rows(known) else f"has {distinct:,} different integers"
                found += ", as an identifier or a time does"
            if found is not None:
                self._advise(column, found)

    def look_for_leaks(self, columns: Sequence[Column], target: str, labels: np.ndarray) -> None:
        """Notes columns that alone determine the label; `labels`: numbers of the different ones."""
        for column in columns:
            if column.name in self.chosen or column.name in self.to_ignore:
                continue
            if _determines(column.values, labels):
                self._advise(column, f"alone determines {target}, as a copy of the answer does")

    def _advise(self, column: Column, problem: str) -> None:
        leave, keep = _override("ignore", [column.name]), _override(_KEYS[column.kind], [column.name])
        if column.texts and all(abs(number(text)) <= LARGEST for text in column.texts):
            keep += f" or {_override('numbers', [column.name])}"
        self.problems.append(f"{column.name} {problem}: {leave}, or keep it with {keep}")
        self.to_ignore.append(column.name)

    def refuse(self, where: str) -> None:
        """Raises `UserError` with all problems."""
        if not self.problems:
            return
        if len(self.problems) == 1:
            between = ", " if self.problems[0].startswith((f"{self.content.unit} ",)) else ": "
            raise UserError(f"{where}{between}{printable(self.problems[0])}")
        lines = [f"{where}: {len(self.problems)} problems", *(f"  {printable(each)}" for each in self.problems)]
        if len(self.to_ignore) > 1:
            lines.append(f"  to leave all of them out: {_override('ignore', self.to_ignore)}")
        raise UserError("\n".join(lines))


def _override(key: str, names: Sequence[str]) -> str:
    """Returns data.KEY=[NAME,...] as it is typed in a shell."""
    plain = all(name.replace("_", "").replace("-", "").isalnum() for name in names)
    quoted = names if plain else [f'"{name}"' for name in names]
    return f"data.{key}=[{','.join(quoted)}]" if plain else f"'data.{key}=[{','.join(quoted)}]'"


def _is_identifier(name: str, values: np.ndarray) -> bool:
    """Returns whether numbers count the rows, or are different integers in a column with the name of an identifier."""
    if count_rows(values):
        return True
    *_, word = ["", *re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)]  # patient_id, PatientID, patientid; not humid
    is_named = _ID.fullmatch(word.lower()) is not None and len(values) >= _FEW
    return is_named and bool((values == np.round(values)).all()) and len(np.unique(values)) == len(values)


def _typing_error(present: Counter[str]) -> str | None:
    """Returns a field of a column of texts that was meant as a number; None for categories."""
    texts, numbers, nearly = 0, 0, []
    for text, count in present.items():
        if abs(number(text)) <= LARGEST:
            numbers += count
        elif not np.isnan(number(text)) or (remedy(text) is not None and not text[:1].isalpha()):
            nearly.append(text)
        else:
            texts += count
    have_words = any(character.isalpha() for text in nearly for character in text)
    if not texts and nearly and (numbers or len(present) > _FEW_UNITS or not have_words):
        return nearly[0]
    if numbers > texts + sum(present[text] for text in nearly):
        return next(text for text in present if not abs(number(text)) <= LARGEST)
    return None


def _determines(values: np.ndarray, labels: np.ndarray) -> bool:
    """Returns whether rows with equal values have equal labels, or a few intervals of values have one label each.

    Labels of a regression are those of equal targets. Not for few rows, nor if the values are mostly different.
    """
    count, classes = len(values), int(labels.max()) + 1
    if count < _FEW or classes < 2:
        return False
    known = np.where(np.isnan(values), np.inf, values)
    codes = np.unique(known, return_inverse=True)[1]
    pairs = np.unique(codes * classes + labels)
    if len(pairs) > codes.max() + 1:
        return False
    if codes.max() + 1 <= count / 2:
        return True
    ordered = labels[np.argsort(codes, kind="stable")]
    return classes <= count / _FEW and int((ordered[1:] != ordered[:-1]).sum()) == classes - 1


# -- files


class _CsvReader:
    """The columns of a CSV file."""

    categories: Collection[str] = ()
    texts: Collection[str] = ()

    def __init__(self, file: str, delimiter: str, trained: FeatureColumns | None) -> None:
        delimiter = "\t" if delimiter == r"\t" else delimiter
        if len(delimiter) != 1:
            raise UserError(f"data.delimiter={delimiter!r}: must be one character, or \\t for a tab")
        self._header: Header = read_header(file, delimiter, may_have_units=trained is None or trained.has_units)
        self.has_units = self._header.has_units
        self.names, self.notes, self.delimiter = self._header.names, self._header.notes, self._header.delimiter
        if delimiter not in (",", self.delimiter):
            raise UserError(
                f"data.delimiter={delimiter!r}: the first line of {file} sets {self.delimiter!r}; leave out one of them"
            )
        if len(self.names) < 2:
            found = "".join(self.names)
            likely = next((f"={each!r}" for each in ";\t|," if each in found), f" if it is not {delimiter!r}")
            raise UserError(f"data.file={file}: has {len(self.names)} columns; set data.delimiter{likely}")

    def read(self, texts: Sequence[str], numbers: Mapping[str, str | None]) -> TableFile:
        return read_columns(self._header, texts, numbers)


class _ParquetReader:
    """The columns of a Parquet file.

    `categories`: of pandas, and numbers with names that the package datasets stores. `texts`: also columns of texts.
    """

    notes: tuple[str, ...] = ()
    delimiter, has_units = ",", False

    def __init__(self, path: Path) -> None:
        self._path = path
        self._schema, _ = open_parquet(f"data.file={self._path}", str(self._path))
        self.names = tuple(name for name in self._schema.names if not name.startswith("__index_level_"))  # pandas'
        is_dictionary, metadata = library("data.file").types.is_dictionary, self._schema.metadata
        self.categories = [
            name
            for name in self.names
            if is_dictionary(self._schema.field(name).type) or stored_names(metadata, name) is not None
        ]
        texts = {field.name for field in self._schema if str(field.type) in _TEXTS}
        self.texts = [name for name in self.names if name in texts or name in self.categories]

    def read(self, texts: Sequence[str], numbers: Mapping[str, str | None]) -> TableFile:
        columns = [*texts, *numbers]
        for name in columns:
            self._refuse_nested(name)
        with bounded("data.file", f"the table {self._path}"):  # a dictionary may repeat a long text
            table, _ = read_parquet("data.file", [str(self._path)], columns, columns[0])
            if len(table) == 0:
                raise UserError(f"data.file={self._path}: has no rows")
            values = np.empty((len(table), len(numbers)))
            lines = range(len(table))
            no_numbers = {name: NoNumbers() for name, advice in numbers.items() if advice is None}
            for position, (name, advice) in enumerate(numbers.items()):
                column = _decoded(table.column(name))
                values[:, position] = _numbers_of(column)
                for row in not_finite(values[:, position]):
                    field = field_of(column[row].as_py())
                    if advice is not None:
                        raise not_a_number(self._place(row), name, field, advice)
                    no_numbers[name].add(row, field)
                    values[row, position] = np.nan
            fields = {name: self._texts(table, name) for name in texts}
            return TableFile(self._path, fields, values, lines, (), no_numbers, "row")

    def _place(self, row: int) -> str:
        return f"data.file={self._path}, row {row}"

    def _texts(self, table: Any, name: str) -> list[str]:
        """Returns the fields of a column, as a CSV file has them."""
        values, names = _decoded(table.column(name)).to_pylist(), stored_names(self._schema.metadata, name)
        if names is not None:
            advice = f"remove them from the file; if {name} is not the target, data.ignore=[{name}] leaves it out"
            values = with_names(values, names, name, self._place, advice)
        return [field_of(value) for value in values]

    def _refuse_nested(self, name: str) -> None:
        """Raises `UserError` for a column of other values than numbers, texts, dates and truth values."""
        types, kind = library("data.file").types, self._schema.field(name).type
        if types.is_nested(kind) or types.is_binary(kind) or types.is_large_binary(kind):
            raise UserError(
                f"data.file={self._path}: the column {name} has the type {kind}; images and lists of numbers are read "
                f"by data=parquet; leave it out with data.ignore=[{name}]"
            )


def _decoded(column: Any) -> Any:
    """Returns a column without the dictionary of its values."""
    is_dictionary = library("data.file").types.is_dictionary(column.type)
    return column.cast(column.type.value_type) if is_dictionary else column


def _numbers_of(column: Any) -> np.ndarray:
    types = library("data.file").types
    if types.is_integer(column.type) or types.is_floating(column.type):
        return np.asarray(column.to_numpy(), dtype=np.float64)
    if types.is_decimal(column.type):
        return np.array([np.nan if value is None else float(value) for value in column.to_pylist()])
    return np.array([number(field_of(value)) for value in column.to_pylist()], dtype=np.float64)


# -- before torch is imported


def check_table(arguments: Mapping[str, Any]) -> None:
    """Reads a small file with the arguments of a config, for its problems. Raises `UserError`."""
    file = arguments.get("file")
    if not isinstance(file, str):
        return
    path = os.path.expanduser(file)
    if not os.path.isfile(path) or os.path.getsize(path) > _EARLY:  # reported where the data are read
        return
    keys = TableKeys.__required_keys__ | TableKeys.__optional_keys__
    lists = {name: tuple(arguments[name] or ()) for name in ("ignore", *_KEYS.values())}
    _check(str(file_state(path)), **{name: arguments.get(name) for name in keys} | lists)


@functools.lru_cache(maxsize=16)  # of the jobs of a sweep
def _check(state: str, **arguments: Any) -> None:
    read_table(**arguments)
