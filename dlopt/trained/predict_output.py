"""Writes predictions, beside the columns of what they are of, to a CSV or a Parquet file."""

import csv
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from dlopt.basics.errors import FileError, UserError
from dlopt.data.checks import GAPS, number
from dlopt.data.tables.parquet import is_parquet, library

_GROUP = 1 << 16  # rows of a row group
_INTEGER = re.compile(r"[+-]?[0-9]{1,300}")


class Column(NamedTuple):
    """A column of the output. `is_integer`: counts, int64 in a Parquet file; `kind`: its type in a Parquet file."""

    name: str
    is_number: bool = False
    is_integer: bool = False
    kind: Any = None


class Predictions(Protocol):
    """What `dlopt predict` writes."""

    @property
    def columns(self) -> Sequence[Column]: ...

    @property
    def notes(self) -> Sequence[str]: ...

    @property
    def delimiter(self) -> str: ...

    def chunks(self, warn: Callable[[str], None], show: Callable[[str], None]) -> Iterator[Sequence[Any]]:
        """Yields the values of each column for the next rows: a list, or an array of Arrow; in every process.

        Calls `warn` with what looks wrong, and `show` with the progress. Raises `UserError` for damaged inputs.
        """
        ...

    def summary(self) -> str:
        """Says how much was predicted; empty if nothing was."""
        ...


Write = Callable[[Sequence[Any]], None]


@contextmanager
def writer(path: Path, suffix: str, columns: Sequence[Column], delimiter: str) -> Iterator[Write]:
    """Yields a function that writes the values of each column for the next rows."""
    with _parquet(path, columns) if suffix == ".parquet" else _csv(path, columns, delimiter) as write:
        yield write


@contextmanager
def _csv(path: Path, columns: Sequence[Column], delimiter: str) -> Iterator[Write]:
    for column in columns:
        _refuse_nested(column)
    # Paths of images that are not UTF-8 keep their bytes.
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = csv.writer(file, delimiter=delimiter)
        rows.writerow([column.name for column in columns])

        def write(values: Sequence[Any]) -> None:
            rows.writerows(zip(*map(_texts, values), strict=True))  # not redacted: paths and classes are data

        yield write


def _texts(values: Any) -> list[str]:
    """Returns the fields of a CSV file: of a number the fewest digits that read back as the same float64."""
    items = values if isinstance(values, list) else values.to_pylist()
    return ["" if value is None else str(value) for value in items]


def _refuse_nested(column: Column) -> None:
    """Raises `UserError` for a column of lists or bytes."""
    if column.kind is None:
        return
    types = library("output").types
    if types.is_nested(column.kind) or types.is_binary(column.kind) or types.is_large_binary(column.kind):
        raise UserError(
            f"output: a CSV file cannot have the column {column.name} of the type {column.kind}; use "
            "output=predictions.parquet"
        )


def refuse_taken(file: str, names: Sequence[str], added: Sequence[Column]) -> None:
    """Raises `UserError` if the file has a column with the name of one that is added."""
    if taken := [column.name for column in added if column.name in names]:
        raise UserError(f"file={file}: has a column {taken[0]!r}, the name of a column of the output; rename it")


@contextmanager
def _parquet(path: Path, columns: Sequence[Column]) -> Iterator[Write]:
    arrow = library("output")
    from pyarrow import parquet

    opened: Any = None
    held: list[Any] = []  # tables that become one row group

    def flush() -> None:
        nonlocal opened
        if not held:
            return
        table = arrow.concat_tables(held)
        opened = parquet.ParquetWriter(path, table.schema) if opened is None else opened
        opened.write_table(table)
        held.clear()

    def write(values: Sequence[Any]) -> None:
        arrays = [_array(each, column, arrow) for each, column in zip(values, columns, strict=True)]
        held.append(arrow.Table.from_arrays(arrays, names=[column.name for column in columns]))
        if sum(map(len, held)) >= _GROUP:
            flush()

    try:
        yield write
        flush()
    finally:
        if opened is not None:
            opened.close()


def _array(values: Any, column: Column, arrow: Any) -> Any:
    if not isinstance(values, list):
        return values
    if column.is_integer:
        return arrow.array(values, arrow.int64())
    if column.is_number:
        found = [_number(value, column) if isinstance(value, str) else float(value) for value in values]
        return arrow.array([None if math.isnan(value) else value for value in found], arrow.float64())
    # Arrow has no texts that are not UTF-8, as the names of files may be.
    return arrow.array([os.fsencode(value).decode(errors="replace") for value in values], arrow.string())


def _number(text: str, column: Column) -> float:
    """Returns the number of a field, NaN for a gap. Raises `UserError` for one that float64 cannot hold."""
    value = number(text)
    if (math.isnan(value) and text.lower() not in GAPS) or (_INTEGER.fullmatch(text) and int(value) != int(text)):
        raise UserError(f"output: {column.name} has {text!r}, no number of float64; use output=predictions.csv")
    return value


def is_table_of_parquet(file: str) -> bool:
    """Returns whether a file is a Parquet file. Raises `UserError` if it cannot be read."""
    if os.path.isdir(file):
        raise FileError(f"file={file}: is a folder; must be a file")
    if not os.access(file, os.R_OK):
        reason = "Permission denied" if os.path.exists(file) else "No such file or directory"
        raise UserError(f"file={file}: cannot be read ({reason})")
    return is_parquet(file)
