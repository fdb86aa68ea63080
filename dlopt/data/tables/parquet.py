"""Reads Parquet files within bounds of memory: small ones whole, larger ones mapped from a file in the cache."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from dlopt.basics.cache import cache_file, exclusive, file_state
from dlopt.basics.errors import FileError, UserError, require_package
from dlopt.basics.files import reason, refuse_special, temporary_sibling
from dlopt.basics.formats import format_bytes
from dlopt.machine.memory import half_of_memory

_MAX_READ = 1 << 28  # bytes; larger tables are memory-mapped
_BATCH_ROWS, _BATCH_BYTES = 1024, 1 << 26  # that are converted at once
_LABEL_BYTES = 64  # estimated memory per label, in addition to the table
_MAGIC = b"PAR1"
_LEFT_FREE = 1 << 30  # bytes of the disk that the cache does not fill


Parts = Sequence[tuple[int, Any]]
"""The number of rows of each file of a table, and the metadata of its schema."""


def read_parquet(key: str, paths: Sequence[str], columns: Sequence[str], held: str) -> tuple[Any, Parts]:
    """Returns the columns of all files as one table, in memory or memory-mapped, and the row metadata of each file.

    Columns that some of the files declare "not null", or store as another kind of strings or numbers, are the same.
    `held`: the column that will be in memory as a whole. Raises `UserError`, also for rows that expand to more than
    memory and disk can hold.
    """
    arrow, folder = library(key), cache_file("parquet").parent
    with bounded(key, f"a batch of rows (or the whole table: {folder} may have no space)") as most:
        schema, size, parts = _schema(key, paths, columns)
        if (rows := sum(count for count, _ in parts)) * _LABEL_BYTES > most:
            raise _too_large(key, f"the column {held} with {rows:,} rows", most)
        if size <= _MAX_READ:  # the files' own size, which counts a repeated value once
            batches, decoded = [], 0
            for batch in _batches(key, paths, schema, held, most):
                batches.append(batch)
                if (decoded := decoded + batch.nbytes) > _MAX_READ:
                    break
            else:
                return arrow.Table.from_batches(batches, schema), parts
            del batches
        # A file of Arrow's has one dictionary for a column, a Parquet file has one for each row group.
        for index, field in enumerate(schema):
            if arrow.types.is_dictionary(field.type):
                schema = schema.set(index, field.with_type(_plain(field.type)))
        mapped = _mapped(key, paths, schema, held, most)
        if mapped is None:
            mapped = arrow.Table.from_batches(_batches(key, paths, schema, held, most), schema)
        return mapped, parts


@contextmanager
def bounded(key: str, what: str) -> Iterator[int]:
    """Limits the memory to `half_of_memory`, which it yields. Raises `UserError` if `what` takes more."""
    try:
        with half_of_memory() as most:
            yield most
    except MemoryError:  # Arrow's, too
        raise _too_large(key, what, most) from None


def is_parquet(path: str) -> bool:
    """Returns whether a regular file begins as a Parquet file does."""
    if not os.path.isfile(path):
        return False
    try:
        with open(path, "rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except OSError:  # reported where it is read
        return False


def _schema(key: str, paths: Sequence[str], columns: Sequence[str]) -> tuple[Any, int, Parts]:
    """Returns the schema of the columns, and the bytes of all columns and the `Parts` of the files."""
    size, parts = 0, []
    schema: Any = None
    for path in paths:
        with _opened(key, path) as opened:
            available = opened.schema_arrow
            size += _size(opened.metadata)
            parts.append((opened.metadata.num_rows, available.metadata))
        for name in columns:
            if available.names.count(name) != 1:
                how = "two columns" if name in available.names else "no column"
                raise UserError(f"{key}: {path} has {how} {name!r}; it has {', '.join(available.names)}")
        chosen = library(key).schema([available.field(name) for name in columns], metadata=available.metadata)
        schema = chosen if schema is None else _joined(key, schema, chosen, path, paths[0])
    return schema, size, parts


def _size(metadata: Any) -> int:
    """Returns the bytes of all rows, decompressed but encoded, as the file claims."""
    return sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))


def _too_large(key: str, what: str, most: int) -> UserError:
    return UserError(f"{key}: {what} takes more than half of the available memory ({format_bytes(most)})")


def _joined(key: str, schema: Any, other: Any, path: str, first: str) -> Any:
    """Returns the schema of files with two schemas. Raises `UserError` if a column has two types."""
    for index, (field, changed) in enumerate(zip(schema, other, strict=True)):
        kinds = field.type, changed.type
        if kinds[0] != kinds[1]:
            plain = _wider(*kinds) or _plain(kinds[0])
            if plain != (_wider(*kinds) or _plain(kinds[1])):
                raise UserError(
                    f"{key}: the column {field.name} has the type {kinds[1]} in {path}, and {kinds[0]} in {first}"
                )
            field = field.with_type(plain)
        schema = schema.set(index, field.with_nullable(field.nullable or changed.nullable))
    return schema


def _wider(one: Any, other: Any) -> Any | None:
    """Returns the type that has the numbers of both; None if one has no numbers."""
    arrow = library("data")
    integers, floats = arrow.types.is_integer, arrow.types.is_floating
    if not all(integers(kind) or floats(kind) for kind in (one, other)):
        return None
    return arrow.int64() if integers(one) and integers(other) else arrow.float64()


def _plain(kind: Any) -> Any:
    """Returns the type without its encoding: dictionaries and kinds of strings, bytes and lists, also within others."""
    arrow = library("data")
    types = arrow.types
    if types.is_dictionary(kind):
        return _plain(kind.value_type)
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return arrow.large_string()
    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind):
        return arrow.large_binary()
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return arrow.large_list(_plain(kind.value_type))
    if types.is_struct(kind):
        return arrow.struct([arrow.field(each.name, _plain(each.type)) for each in kind])
    return kind


def _batches(key: str, paths: Sequence[str], schema: Any, held: str, most: int) -> Iterator[Any]:
    """Yields the rows. Raises `UserError` for damaged files, and if the column `held` takes more than `most` bytes."""
    arrow, size = library(key), 0
    plain = _plain(schema.field(held).type)
    width = 1 if innermost(plain) in ("large_string", "large_binary") else 4  # numbers in Python take more space
    for path in paths:
        with _opened(key, path) as opened:
            rows, expected = 0, opened.metadata.num_rows
            for batch in opened.iter_batches(_rows_at_once(opened.metadata), columns=schema.names):
                columns = [batch.column(field.name) for field in schema]
                cast = [
                    column if column.type == field.type else column.cast(field.type)
                    for field, column in zip(schema, columns, strict=True)
                ]
                rows += len(batch)
                size += width * batch.column(held).cast(plain).nbytes + _LABEL_BYTES * len(batch)
                if size > most:
                    raise _too_large(key, f"the column {held}", most)
                yield arrow.RecordBatch.from_arrays(cast, schema=schema)
            if rows != expected:
                raise FileError(f"{key}: {path}: is damaged: has {rows:,} rows, not {expected:,}")


def open_parquet(key: str, path: str) -> tuple[Any, Iterator[Any]]:
    """Returns the schema of a file, and its rows, a few at a time.

    Raises `UserError`, also for rows whose texts take more than a quarter of the memory: the caller copies them.
    """
    is_dictionary = library(key).types.is_dictionary
    with _opened(key, path) as opened:
        schema = opened.schema_arrow
        names: list[str] = schema.names
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{key}: two columns have the same name, {twice[0]}")

    def batches() -> Iterator[Any]:
        with _reading(key, path):
            rows = opened.iter_batches(_rows_at_once(opened.metadata))
            while True:
                with bounded(key, f"a batch of rows of {path}") as most:
                    if (batch := next(rows, None)) is None:
                        return
                    # A dictionary holds a repeated text once.
                    kinds = [field.type.value_type if is_dictionary(field.type) else field.type for field in schema]
                    size = sum(column.cast(kind).nbytes for column, kind in zip(batch, kinds, strict=True))
                    if size > most / 2:
                        raise MemoryError
                yield batch

    return schema, batches()


def text_column(key: str, path: str, name: str | None) -> str:
    """Returns the column `name` of a file if it has it, else `text`, else its only column of texts.

    Raises `UserError`.
    """
    with _opened(key, path) as opened:
        schema = opened.schema_arrow
    texts: list[str] = [field.name for field in schema if innermost(_plain(field.type)) == "large_string"]
    if name in schema.names:
        return str(name)
    if "text" in texts:
        return "text"
    if len(texts) != 1:
        found = ", ".join(texts) or "none"
        own = "" if name is None else f"the column {name} of the training, "
        needed = f"{own}a column named text, or only one column of texts"
        raise UserError(f"{key}: needs {needed}; its columns of texts: {found}")
    return texts[0]


def _rows_at_once(metadata: Any) -> int:
    """Returns how many rows are read at once, for bounded memory."""
    return max(min(_BATCH_BYTES * metadata.num_rows // max(_size(metadata), 1), _BATCH_ROWS), 1)


def _mapped(key: str, paths: Sequence[str], schema: Any, held: str, most: int) -> Any:
    """Returns the columns as a memory-mapped table, written to the cache on first use; None without space for it."""
    arrow = library(key)
    states = [f"{os.path.abspath(path)} {file_state(path)}" for path in paths]
    target = cache_file("parquet", "1", *schema.names, *states).with_suffix(".arrow")
    try:
        with exclusive(target):
            if not target.exists():
                with temporary_sibling(target) as temporary:
                    free = shutil.disk_usage(target.parent).free - _LEFT_FREE
                    with arrow.OSFile(str(temporary), "wb") as sink, arrow.ipc.new_file(sink, schema) as writer:
                        for batch in _batches(key, paths, schema, held, most):
                            writer.write_batch(batch)
                            if sink.tell() > free:
                                return None
                    # Renamed when it is complete: a killed process leaves no file of this name that lacks rows.
                    os.replace(temporary, target)
        return arrow.ipc.open_file(arrow.memory_map(str(target))).read_all()
    except OSError:  # no access, or no space
        return None


@contextmanager
def _opened(key: str, path: str) -> Iterator[Any]:
    """Opens a file for the reader of pyarrow. Raises `UserError`."""
    with _reading(key, path):
        refuse_special(path)
        yield library(key).parquet.ParquetFile(path)


@contextmanager
def _reading(key: str, path: str) -> Iterator[None]:
    arrow = library(key)
    try:
        yield
    except MemoryError:  # Arrow's, too
        raise
    except (arrow.ArrowException, OSError) as error:
        # Only then: the file may be a pipe, or damaged in another way.
        if "lists to be of size" in str(error) and (place := _missing_list(path)) is not None:
            raise UserError(
                f"{key}: {path}, {place} has no list (null), which pyarrow cannot read; remove the row"
            ) from None
        raise UserError(f"{key}: {path}: cannot be read as a Parquet file ({reason(error)})") from None


def _missing_list(path: str) -> str | None:
    """Names the row and the column of the first missing list of a fixed size; None without one.

    pyarrow raises an error at such a list, and does not say where it is.
    """
    arrow = library("data")
    with suppress(arrow.ArrowException, OSError):
        opened = arrow.parquet.ParquetFile(path)
        for field in opened.schema_arrow:
            start = 0
            for group in range(opened.num_row_groups if "fixed_size_list" in str(field.type) else 0):
                rows = opened.metadata.row_group(group).num_rows
                if _readable(opened, field.name, group, rows) < rows:
                    return f"row {start + _readable(opened, field.name, group, 1)}: {field.name}"
                start += rows
    return None


def _readable(opened: Any, column: str, group: int, at_once: int) -> int:
    """Returns how many rows of a row group can be read before an error."""
    count = 0
    with suppress(library("data").ArrowException):
        for batch in opened.iter_batches(at_once, [group], [column]):
            count += len(batch)
    return count


def stored_names(metadata: Mapping[bytes, bytes] | None, column: str) -> list[str] | None:
    """Returns the names of the classes that the package datasets stores with a column of labels; None without."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        feature = features[column]
        feature = feature[0] if isinstance(feature, list) else feature.get("feature", feature)  # of a list of labels
        return [str(name) for name in feature["names"]]
    except (KeyError, IndexError, TypeError, ValueError):
        return None


def with_names(
    values: Sequence[Any], names: Sequence[str], column: str, place: Callable[[int], str], advice: str
) -> list[Any]:
    """Returns names of classes for numbers. Raises `UserError` for numbers of no class; see `refuse_unnamed`."""
    refuse_unnamed(values, [len(names)] * len(values), column, place, advice)
    return [names[value] if isinstance(value, int) else value for value in values]


def refuse_unnamed(
    values: Sequence[Any], counts: Sequence[int], column: str, place: Callable[[int], str], advice: str
) -> None:
    """Raises `UserError` for labels, or lists of them, of no class: -1, as the package datasets marks missing ones.

    `counts`: the number of classes with names for each row; 0 without names. `advice`: what to do about the rows.
    """
    wrong = {}
    for row, (value, count) in enumerate(zip(values, counts, strict=True)):
        labels = value if isinstance(value, list) else [value]
        outside = [each for each in labels if isinstance(each, int) and not 0 <= each < count]
        if outside and count:
            wrong[row] = outside[0], count
    if wrong:
        row, (value, count) = next(iter(wrong.items()))
        meaning = "no label" if value == -1 else f"none of its {count} classes"
        raise UserError(
            f"{place(row)}: {column} is {value}, which means {meaning}, in {len(wrong)} of {len(values)} rows: {advice}"
        )


def library(key: str) -> Any:
    require_package(key, "pyarrow", "hub")
    import pyarrow
    import pyarrow.ipc
    import pyarrow.parquet
    import pyarrow.types

    return pyarrow


def without_large(kind: Any) -> Any:
    """Returns the type with offsets of 32 bits: large_list<double> has the same values as list<double>."""
    arrow = library("data")
    types = arrow.types
    if types.is_list(kind) or types.is_large_list(kind):
        field = kind.value_field
        return arrow.list_(field.with_type(without_large(field.type)))
    if types.is_struct(kind):
        return arrow.struct([each.with_type(without_large(each.type)) for each in kind])
    if types.is_large_string(kind):
        return arrow.string()
    return arrow.binary() if types.is_large_binary(kind) else kind


def innermost(kind: Any) -> str:
    kind = getattr(kind, "storage_type", kind)
    while hasattr(kind, "value_type"):
        kind = kind.value_type
    return str(kind)
