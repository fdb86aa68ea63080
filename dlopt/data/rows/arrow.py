"""Columns of Arrow tables as samples: Parquet files, and the datasets of the package datasets."""

import glob
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Unpack

import numpy as np
import torch

from dlopt.basics.errors import UserError
from dlopt.basics.files import refuse_special
from dlopt.basics.formats import format_bytes, format_count, printable
from dlopt.basics.ranges import installed
from dlopt.data.checks import LARGEST, WARNING, left_out_note, numbers
from dlopt.data.images.decoding import Size, decode
from dlopt.data.rows.rows import SLOW_ROWS, Channels, Files, RowKeys, dataset, find_files
from dlopt.data.samples import Dataset
from dlopt.data.tables.columns import FeatureColumns, field_of
from dlopt.data.tables.further import FurtherKeys, columns_of, further_of
from dlopt.data.tables.parquet import (
    Parts,
    innermost,
    library,
    read_parquet,
    refuse_unnamed,
    stored_names,
    without_large,
)

_CHECKED_ROWS = 1 << 20  # of each column of numbers
_MAX_VALUE = 1 << 27  # bytes of the numbers in a row
_FILE_BYTES = 1 << 17  # estimated size of an image file outside of the table


class ArrowKeys(RowKeys, FurtherKeys):
    """Config keys of every data set of columns: see `conf/data/parquet.yaml`."""


def parquet(
    *,
    file: Annotated[Files, installed("pyarrow", "hub")],
    val_file: Files | None,
    test_file: Files | None,
    **keys: Unpack[ArrowKeys],
) -> Dataset:
    """Loads columns of Parquet files: images, lists of numbers, or numbers, and their labels.

    Files of more than 256 MiB (uncompressed) are converted once to an Arrow file in the cache, which is memory-mapped:
    only the rows of the current batches, and all labels, are in memory. The keys: see `conf/data/parquet.yaml`.

    Raises:
        UserError: a file or a column is missing, a column has another type, or a value is missing.
    """
    columns = _columns(keys)
    splits = {"data.file": file, "data.val_file": val_file, "data.test_file": test_file}
    tables: dict[str, tuple[Any, Parts] | None] = {}
    paths: list[str] = []
    others: Counter[str] = Counter()
    for key, files in splits.items():
        found, left_out = ([], {}) if files is None else find_files(key, files, ".parquet")
        tables[key] = read_parquet(key, found, columns, keys["target"]) if found else None
        paths += found
        others.update(left_out)
    roots = sorted({os.path.dirname(os.path.realpath(path)) for path in paths})
    source = f"rows of {format_count('files', len(paths))}"
    return _dataset(tables, keys, source, left_out_note(others), roots)


def _names(keys: ArrowKeys) -> Sequence[str]:
    return [keys["input"]] if isinstance(keys["input"], str) else keys["input"]


def _columns(keys: ArrowKeys) -> list[str]:
    """Returns all columns that are read. Raises `UserError`."""
    dividing = columns_of(keys, target=keys["target"])
    return list(dict.fromkeys([*_names(keys), keys["target"], *dividing.values()]))


def _dataset(
    splits: Mapping[str, tuple[Any, Parts] | None],
    keys: ArrowKeys,
    source: str,
    notes: tuple[str, ...] = (),
    roots: Sequence[str] = (),
) -> Dataset:
    """Builds a dataset from the tables of training, validation and test set, and the files of each, by their keys.

    `roots`: folders below which images outside of the tables may be; (): anywhere.
    """
    names, target, dividing = _names(keys), keys["target"], columns_of(keys, target=keys["target"])
    options = [*(("input", name) for name in names), ("target", target), *dividing.items()]
    tables: dict[str, Columns | None] = dict.fromkeys(splits)
    for key, split in splits.items():
        if split is None:
            continue
        table, parts = split
        for option, name in options:
            if name not in table.column_names:
                has = ", ".join(table.column_names)
                raise UserError(f"data.{option}={name}: {key} has no such column; it has {has}")
        if len(table) == 0:
            raise UserError(f"{key}: has no rows")
        columns = Columns(key, table, parts, names, target, roots)
        columns.refuse_unlabelled()
        notes += columns.notes
        tables[key] = columns
    found = dataset(tables, keys, source, notes)
    for own, samples in zip(tables.values(), (found.train, found.val, found.test), strict=True):
        if own is not None and samples is not None:
            samples.further = own.further(dividing)
    return replace(found, columns=FeatureColumns(tuple(names), target) if len(found.train.shape) == 1 else None)


class Columns:
    """Columns of an Arrow table; see `dlopt.data.rows.rows.RowSource`. `parts`: the files of the table."""

    def __init__(
        self, key: str, table: Any, parts: Parts, names: Sequence[str], target: str, roots: Sequence[str] = ()
    ) -> None:
        self.target, self._roots = target, roots
        self.encoded = _is_encoded(table.schema.field(names[0]).type)
        self._key, self.table, self._names = key, table, names
        self._stored = [(rows, stored_names(metadata, target)) for rows, metadata in parts]
        self.names = _joined_names(f"{key}: {target}", [each for _, each in self._stored if each is not None])

    def __len__(self) -> int:
        return len(self.table)

    @property
    def notes(self) -> tuple[str, ...]:
        lacking = sum(each is None for _, each in self._stored)
        if lacking in (0, len(self._stored)):
            return ()
        return (
            f"{WARNING}{self._key}: {lacking} of {len(self._stored)} files have no names of the classes of "
            f"{self.target}; their numbers are taken for those of the first file with names",
        )

    def further(self, dividing: Mapping[str, str]) -> dict[str, torch.Tensor]:
        """Returns the columns that divide the rows; see `further_of`."""
        found = further_of(dividing, self._fields, self.place)
        return {name: torch.from_numpy(values) for name, values in found.items()}

    def _fields(self, name: str) -> list[str]:
        fields = [field_of(value) for value in self.table.column(name).to_pylist()]
        if "" in fields:
            raise UserError(f"{self.place(fields.index(''))}: {name} is missing")
        return fields

    def labels(self) -> list[Any]:
        values: list[Any] = self.table.column(self.target).to_pylist()
        start = 0
        for rows, names in self._stored:
            stop = start + rows
            # Files may name the same classes in another order.
            if names is not None and self.names is not None and names != self.names[: len(names)]:
                numbers = [self.names.index(name) for name in names]
                values[start:stop] = [_renumbered(value, numbers) for value in values[start:stop]]
            start = stop
        return values

    def refuse_unlabelled(self) -> None:
        """Raises `UserError` for labels of no class: -1, as the package datasets marks missing ones."""
        if self.names is None:
            return
        counts = np.repeat([0 if each is None else len(each) for _, each in self._stored], [n for n, _ in self._stored])
        advice = "remove them from the files" if self._key.endswith("file") else "choose another split"
        if self._key not in ("data.file", "data.split"):  # the training set
            advice += f", or set {self._key}=null"
        refuse_unnamed(self.table.column(self.target).to_pylist(), counts.tolist(), self.target, self.place, advice)

    @property
    def size(self) -> int:
        return len(self) * _FILE_BYTES if self._are_paths else int(self.table.select(self._names).nbytes)

    def read(self, start: int, stop: int) -> bytes:
        if self._are_paths:  # which differ in a moved folder
            column, where = self.table.column(self._names[0]), f"{self._key}: {self._names[0]}"
            files = (_file(column[row].as_py() or {}, where, self._roots) or b"" for row in range(start, stop))
            return b"".join(len(content).to_bytes(8, "little") + content for content in files)
        # The format of Arrow's messages does not depend on how the table is divided into chunks and row groups.
        rows = self.table.select(self._names).slice(start, stop - start).replace_schema_metadata(None).combine_chunks()
        rows = rows.cast(library(self._key).schema([each.with_type(without_large(each.type)) for each in rows.schema]))
        return b"".join(bytes(batch.serialize()) for batch in rows.to_batches())

    def rows(self) -> Iterator[bytes] | None:
        columns = [self.table.column(name) for name in self._names]
        types = library(self._key).types
        if any(column.null_count for column in columns):  # reported where the row is read
            return None
        if all(_is_number(column.type) for column in columns):
            matrix = np.stack([column.to_numpy().astype(np.float64) for column in columns], 1)
            return (row.tobytes() for row in matrix)
        if not self.encoded or self._are_paths:
            return (self.read(row, row + 1) for row in range(len(self))) if len(self) <= SLOW_ROWS else None
        chunks = columns[0].chunks
        stored = (chunk.field("bytes") if types.is_struct(chunk.type) else chunk for chunk in chunks)
        return (value.as_py() or b"" for chunk in stored for value in chunk)

    @property
    def _are_paths(self) -> bool:
        """Whether the inputs are files outside of the table."""
        column = self.table.column(self._names[0])
        is_struct = library(self._key).types.is_struct(column.type)
        return self.encoded and is_struct and any(chunk.field("bytes").null_count for chunk in column.chunks)

    def value(self, row: int, channels: Channels, size: Size = None) -> Any:
        name, *others = self._names
        kind = self.table.schema.field(name).type
        if others or _is_number(kind):
            return np.array([self._number(each, row) for each in self._names], dtype=np.float64)  # `Wrapped` rounds
        where = f"{self.place(row)}: {name}"
        stored = self.table.column(name)[row]
        # The former of a type of the package datasets.
        inner = getattr(getattr(stored, "value", stored), "values", None)
        if (taken := getattr(inner, "nbytes", 0)) > _MAX_VALUE:
            most = format_bytes(_MAX_VALUE)
            raise UserError(f"{where} has {format_bytes(taken)} of numbers; at most {most} are allowed")
        value = stored.as_py()
        if isinstance(value, Mapping):
            value = _file(value, where, self._roots)
        if value is None:
            raise UserError(f"{where} is missing")
        if isinstance(value, bytes):
            return decode(value, size, channels, where)
        if not isinstance(value, list):
            raise UserError(
                f"data.input={name}: the column has the type {kind}; images in files (bytes, or bytes and path), "
                "numbers, and lists of numbers are allowed"
            )
        array = numbers(value, where, str(kind))
        is_image = array.ndim > 1 and innermost(kind) == "uint8"
        return array.astype(np.uint8 if is_image else np.float64)

    def _number(self, name: str, row: int) -> float:
        kind = self.table.schema.field(name).type
        if not _is_number(kind):
            raise UserError(
                f"data.input: the column {name} has the type {kind}; several columns must all be numbers (for "
                "categories, dates and gaps: data=table)"
            )
        value = self.table.column(name)[row].as_py()
        if value is None or not abs(value) <= LARGEST:  # also NaN
            raise UserError(f"{self.place(row)}: {name} is {value}, not a finite number of float32")
        return float(value)

    def place(self, row: int) -> str:
        return f"{self._key}, row {row}"

    def type(self, row: int) -> str:
        return f"the column {self.target} has the type {self.table.schema.field(self.target).type}"

    def content(self, row: int) -> bytes | None:
        name = self._names[0]
        value = self.table.column(name)[row].as_py()
        return _file(value, f"{self.place(row)}: {name}", self._roots) if isinstance(value, Mapping) else value

    def columns(self) -> Iterator[tuple[str, np.ndarray]] | None:
        if not all(_is_number(self.table.schema.field(name).type) for name in self._names):
            return None
        columns = ((name, self.table.column(name).slice(0, _CHECKED_ROWS)) for name in self._names)
        return ((name, column.combine_chunks().to_numpy(zero_copy_only=False)) for name, column in columns)


def _file(value: Mapping[str, Any], where: str, roots: Sequence[str] = ()) -> bytes | None:
    """Returns the content of an image file stored as {bytes, path}, as the package datasets does.

    A table of others must not read any picture of this machine: the file must be below one of `roots`, if any.
    """
    content, path = value.get("bytes"), value.get("path")
    if content is None and path is not None:
        file = Path(os.path.expanduser(path))
        real = Path(os.path.realpath(file))
        if roots and not any(real.is_relative_to(root) for root in roots):
            raise UserError(f"{where}: {printable(path)}: is not in the folder of the Parquet file; move it there")
        try:
            refuse_special(file)
            return file.read_bytes()
        except OSError as error:
            raise UserError(f"{where}: {printable(path)}: cannot be read ({error.strerror})") from None
    return content if content is None or isinstance(content, bytes) else bytes(content)


# -- the package datasets


def huggingface(
    *,
    name: Annotated[str, installed("datasets", "hub")],
    configuration: str | None,
    revision: str | None,
    split: str,
    val: str | None,
    test: str | None,
    offline: bool,
    **keys: Unpack[ArrowKeys],
) -> Dataset:
    """Loads columns of a dataset with the package datasets, which memory-maps them; see `parquet`.

    The keys: see `conf/data/huggingface.yaml`.

    Raises:
        UserError: the package, the dataset, a split or a column is missing; see `parquet`.
    """
    columns = _columns(keys)
    splits = {"data.split": split, "data.val": val, "data.test": test}
    load = _Hub(name, configuration, revision, offline, keys["target"])
    tables = {key: None if part is None else load.table(key, part, columns) for key, part in splits.items()}
    return _dataset(tables, keys, f"rows of {name}")


@dataclass(frozen=True)
class _Hub:
    """Loads the splits of a dataset."""

    name: str
    configuration: str | None
    revision: str | None
    offline: bool
    target: str

    def table(self, key: str, split: str, columns: Sequence[str]) -> tuple[Any, Parts]:
        """Returns the columns of a split, or all of them if one is missing, as an Arrow table. Raises `UserError`."""
        loaded = self._load(key, split)
        if set(columns) <= set(loaded.column_names):
            loaded = loaded.select_columns(columns)
        if len(loaded.data.table) != len(loaded):  # a selection of rows
            loaded = loaded.flatten_indices()
        table = loaded.data.table
        return table, [(len(table), table.schema.metadata)]

    def _load(self, key: str, split: str) -> Any:
        import datasets

        path = os.path.expanduser(self.name)
        self._refuse_other_names(path)
        try:
            with _quiet(datasets, offline=self.offline):
                if any(os.path.isfile(os.path.join(path, each)) for each in ("state.json", "dataset_dict.json")):
                    return self._saved(datasets, path, key, split)
                # Versions before 4 can run a script of the dataset.
                return datasets.load_dataset(
                    path, self.configuration, revision=self.revision, split=split, trust_remote_code=False
                )
        except UserError:
            raise
        except Exception as error:  # the package raises exceptions of many others
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(f"data.name={self.name}: {key}={split} cannot be loaded: {lines[0]}") from None

    def _refuse_other_names(self, path: str) -> None:
        """Raises `UserError` if Parquet files of a folder name the classes differently: the package ignores it."""
        arrow = library(f"data.name={self.name}")
        first: tuple[str, list[str]] | None = None
        for file in sorted(glob.glob(os.path.join(glob.escape(path), "**", "*.parquet"), recursive=True)):
            try:
                refuse_special(file)
                names = stored_names(arrow.parquet.read_schema(file).metadata, self.target)
            except (arrow.ArrowException, OSError):  # reported by the package, if it reads the file
                continue
            if names is None:
                continue
            first = first or (file, names)
            if names == first[1]:
                continue
            raise UserError(
                f"data.name={self.name}: {file} and {first[0]} have other names of the classes of {self.target}, or "
                "another order; use data=parquet with data.file and data.test_file, which reads the names of each file"
            )

    def _saved(self, datasets: Any, path: str, key: str, split: str) -> Any:
        """Returns a split of a folder of `save_to_disk`."""
        for option, value in (("configuration", self.configuration), ("revision", self.revision)):
            if value is not None:
                raise UserError(
                    f"data.{option}={value}: {path} is a folder of save_to_disk, which has none; leave it out"
                )
        saved = datasets.load_from_disk(path)
        parts = saved if isinstance(saved, datasets.DatasetDict) else {str(saved.split or "train"): saved}
        if split in parts:
            return parts[split]
        try:
            # As load_dataset reads train[:90%] and train+test.
            instructions = datasets.ReadInstruction.from_spec(split).to_absolute(
                {name: len(part) for name, part in parts.items()}
            )
        except ValueError as error:
            names = ", ".join(parts)
            raise UserError(f"{key}={split}: {path} has no such split; it has {names} ({error})") from None
        slices = [parts[each.splitname].select(range(each.from_, each.to)) for each in instructions]
        return slices[0] if len(slices) == 1 else datasets.concatenate_datasets(slices)


@contextmanager
def _quiet(datasets: Any, *, offline: bool) -> Iterator[None]:
    """Hides the progress bars of the package datasets, which interfere with dlopt's; `offline`: no network."""
    config, hidden = datasets.config, datasets.utils.are_progress_bars_disabled()
    before = config.HF_HUB_OFFLINE
    datasets.disable_progress_bars()
    config.HF_HUB_OFFLINE = before or offline
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before
        if not hidden:
            datasets.enable_progress_bars()


# -- types


def _is_number(kind: Any) -> bool:
    types = library("data").types
    return bool(types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind))


def _is_encoded(kind: Any) -> bool:
    """Returns whether a column has image files: bytes, or a struct with them."""
    types = library("data").types
    if types.is_struct(kind):
        return bool(kind.get_field_index("bytes") >= 0)
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _joined_names(place: str, lists: Sequence[list[str]]) -> list[str] | None:
    """Returns the names in several files: those of the first, then new names in others. Raises `UserError`."""
    if not lists:
        return None
    if all(names == lists[0] for names in lists):
        return lists[0]
    for names in lists:
        if len({*names}) < len(names):
            raise UserError(f"{place}: the files name the classes differently, and one has a name twice")
    return list(dict.fromkeys(name for names in lists for name in names))


def _renumbered(value: Any, numbers: Sequence[int]) -> Any:
    """Returns a label, or a list of labels, with other numbers; None and texts as they are."""
    if isinstance(value, list):
        return [_renumbered(each, numbers) for each in value]
    return numbers[value] if isinstance(value, int) else value
