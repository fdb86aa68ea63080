"""Columns of Arrow tables as samples: Parquet files, and the datasets of the package datasets."""

import glob
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from dlopt.data.cache import cache_file, exclusive, file_state
from dlopt.data.images import decode_bytes, size_pair
from dlopt.data.samples import Dataset, Wrapped
from dlopt.errors import UserError, install

Labels = Literal["class", "several", "value"]
Files = str | list[str]
_MAX_READ = 1 << 28  # bytes; larger tables are memory-mapped
_BATCH_ROWS = 1024  # rows that are converted at once


def parquet(
    *,
    file: Files,
    val_file: Files | None,
    test_file: Files | None,
    input: str | list[str],
    target: str,
    labels: Labels,
    channels: Literal[1, 3] | None,
    image_size: int | tuple[int, int] | None,
) -> Dataset:
    """Loads columns of Parquet files: images, lists of numbers, or numbers, and their labels.

    Files of more than 256 MiB (uncompressed) are converted once to an Arrow file in the cache, which is memory-mapped:
    only the rows of the current batches, and all labels, are in memory.

    Args:
        file: training files: names, patterns such as shards/*.parquet, or folders; `val_file`, `test_file` likewise.
        input: the column of the inputs; several columns of numbers are one vector.
        target: the column of the labels.
        labels: class: names or integers; several: lists of them; value: numbers for a regression.
        channels: of images from files: 3 (colour), 1 (grey), None: as in the first image.

    Raises:
        UserError: a file or a column is missing, a column has another type, or a value is missing.
    """
    columns = list(dict.fromkeys([*([input] if isinstance(input, str) else input), target]))
    splits = {"data.file": file, "data.val_file": val_file, "data.test_file": test_file}
    tables = [(key, None if files is None else read_parquet(key, files, columns)) for key, files in splits.items()]
    return _dataset(tables, input, target, labels=labels, channels=channels, image_size=image_size)


def _dataset(
    splits: Sequence[tuple[str, Any]],
    input: str | Sequence[str],
    target: str,
    *,
    labels: Labels,
    channels: Literal[1, 3] | None,
    image_size: int | tuple[int, int] | None,
) -> Dataset:
    """Builds a dataset from the tables of training, validation and test set, each with the key that set it.

    A table may be None, but not that of the training set.
    """
    names = [input] if isinstance(input, str) else list(input)
    if not names:
        raise UserError("data.input=[]: name at least one column")
    train_key, train = splits[0]
    for key, table in splits:
        if table is None:
            continue
        for option, name in (*(("data.input", name) for name in names), ("data.target", target)):
            if name not in table.column_names:
                raise UserError(f"{option}={name}: {key} has no such column; it has {', '.join(table.column_names)}")
        if len(table) == 0:
            raise UserError(f"{key}: has no rows")
    several = labels == "several"
    classes = None if labels == "value" else _classes(train_key, train, target, several=several)
    if channels is not None and not _is_encoded(train.schema.field(names[0]).type):
        raise UserError(f"data.channels={channels}: only image files are converted; use data.channels=null")
    first = _value(train, names, 0, channels, train_key)
    if isinstance(first, torch.Tensor):
        channels = 1 if len(first) == 1 else 3
    size = size_pair(image_size)
    samples = [
        None
        if table is None
        else Wrapped(Rows(table, names, _targets(key, table, target, classes, several), channels, key), size, key)
        for key, table in splits
    ]
    assert samples[0] is not None
    shown = None if classes is None else _class_names(train, target, classes)
    facts = {"rows": sum(len(table) for _, table in splits if table is not None)}
    return Dataset(samples[0], samples[1], samples[2], shown, facts=facts)


class Rows:
    """Map-style dataset of (input, label) for `Wrapped`; reads one row at a time."""

    def __init__(
        self, table: Any, names: Sequence[str], targets: torch.Tensor, channels: Literal[1, 3] | None, key: str
    ) -> None:
        self.targets = targets
        self._table, self._names, self._channels, self._key = table, names, channels, key

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        label = self.targets[index]
        value = _value(self._table, self._names, index, self._channels, self._key)
        return value, label if label.ndim else label.item()


def _value(table: Any, names: Sequence[str], index: int, channels: Literal[1, 3] | None, key: str) -> Any:
    """Returns the input in a row: an image uint8 [C, H, W], or an array as `Wrapped` reads it."""
    if len(names) > 1 or _is_number(table.schema.field(names[0]).type):
        return np.array([_number(table, name, index, key) for name in names], dtype=np.float32)
    (name,) = names
    where = f"{key}, row {index}: {name}"
    value = table.column(name)[index].as_py()
    if isinstance(value, Mapping):
        value = _file(value, where)
    if value is None:
        raise UserError(f"{where} is missing")
    if isinstance(value, bytes):
        return decode_bytes(value, channels, where)
    kind = table.schema.field(name).type
    if not isinstance(value, list):
        raise UserError(
            f"data.input={name}: the column has the type {kind}; images in files (bytes, or bytes and path), numbers, "
            "and lists of numbers are allowed"
        )
    try:
        array = np.array(value)
    except ValueError:
        array = np.array(value, dtype=object)
    if array.dtype.kind not in "biuf" or not np.isfinite(array).all():
        raise UserError(f"{where}: must have finite numbers in lists of equal lengths ({kind})")
    is_image = array.ndim > 1 and _innermost(kind) == "uint8"
    return array.astype(np.uint8 if is_image else np.float32)


def _file(value: Mapping[str, Any], where: str) -> bytes | None:
    """Returns the content of an image file stored as {bytes, path}, as the package datasets does."""
    content, path = value.get("bytes"), value.get("path")
    if content is None and path is not None:
        try:
            return Path(path).expanduser().read_bytes()
        except OSError as error:
            raise UserError(f"{where}: {path}: cannot be read ({error.strerror})") from None
    return content if content is None or isinstance(content, bytes) else bytes(content)


def _number(table: Any, name: str, index: int, key: str) -> float:
    kind = table.schema.field(name).type
    if not _is_number(kind):
        raise UserError(f"data.input: the column {name} has the type {kind}; several columns must all be numbers")
    value = table.column(name)[index].as_py()
    if value is None or not math.isfinite(value):
        raise UserError(f"{key}, row {index}: {name} is {value}, not a finite number")
    return float(value)


# -- the package datasets


def huggingface(
    *,
    name: str,
    configuration: str | None,
    revision: str | None,
    split: str,
    val: str | None,
    test: str | None,
    offline: bool,
    input: str | list[str],
    target: str,
    labels: Labels,
    channels: Literal[1, 3] | None,
    image_size: int | tuple[int, int] | None,
) -> Dataset:
    """Loads columns of a dataset with the package datasets, which memory-maps them; see `parquet`.

    Args:
        name: a dataset of the Hugging Face Hub, a folder of data files, or a folder of `save_to_disk`.
        split: of the training set; `val`, `test` likewise. Parts of a split are possible: train[:90%].
        offline: use local folders and the cache only.

    Raises:
        UserError: the package, the dataset, a split or a column is missing; see `parquet`.
    """
    columns = list(dict.fromkeys([*([input] if isinstance(input, str) else input), target]))
    splits = {"data.split": split, "data.val": val, "data.test": test}
    load = _Hub(name, configuration, revision, offline)
    tables = [(key, None if part is None else load.table(key, part, columns)) for key, part in splits.items()]
    return _dataset(tables, input, target, labels=labels, channels=channels, image_size=image_size)


@dataclass(frozen=True)
class _Hub:
    """Loads the splits of a dataset."""

    name: str
    configuration: str | None
    revision: str | None
    offline: bool

    def table(self, key: str, split: str, columns: Sequence[str]) -> Any:
        """Returns the columns of a split, or all of them if one is missing, as an Arrow table. Raises `UserError`."""
        loaded = self._load(key, split)
        if set(columns) <= set(loaded.column_names):
            loaded = loaded.select_columns(columns)
        if len(loaded.data.table) != len(loaded):  # a selection of rows
            loaded = loaded.flatten_indices()
        return loaded.data.table

    def _load(self, key: str, split: str) -> Any:
        try:
            import datasets
        except ImportError:
            raise UserError(
                f"data.name={self.name}: the package datasets is not installed; {install('dlopt[hub]')}"
            ) from None
        path = os.path.expanduser(self.name)
        try:
            with _quiet(datasets, offline=self.offline):
                if any(os.path.isfile(os.path.join(path, each)) for each in ("state.json", "dataset_dict.json")):
                    return self._saved(datasets, path, key, split)
                return datasets.load_dataset(path, self.configuration, revision=self.revision, split=split)
        except UserError:
            raise
        except Exception as error:  # the package raises exceptions of many others
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(f"data.name={self.name}: {key}={split} cannot be loaded: {lines[0]}") from None

    def _saved(self, datasets: Any, path: str, key: str, split: str) -> Any:
        """Returns a split of a folder of `save_to_disk`."""
        for option, value in (("configuration", self.configuration), ("revision", self.revision)):
            if value is not None:
                raise UserError(
                    f"data.{option}={value}: {path} is a folder of save_to_disk, which has none; leave it out"
                )
        saved = datasets.load_from_disk(path)
        parts = saved if isinstance(saved, datasets.DatasetDict) else {str(saved.split or "train"): saved}
        if split not in parts:
            raise UserError(f"{key}={split}: {path} has no such split; it has {', '.join(parts)}")
        return parts[split]


@contextmanager
def _quiet(datasets: Any, *, offline: bool) -> Iterator[None]:
    """Hides the progress bars of the package datasets, which run into those of dlopt; `offline`: no network."""
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
    types = _library("data").types
    return bool(types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind))


def _is_encoded(kind: Any) -> bool:
    """Returns whether a column has image files: bytes, or a struct with them."""
    types = _library("data").types
    if types.is_struct(kind):
        return bool(kind.get_field_index("bytes") >= 0)
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _innermost(kind: Any) -> str:
    kind = getattr(kind, "storage_type", kind)
    while hasattr(kind, "value_type"):
        kind = kind.value_type
    return str(kind)


# -- labels


def _labels(key: str, table: Any, target: str) -> list[Any]:
    """Returns the labels of all rows. Raises `UserError` if one is missing."""
    values: list[Any] = table.column(target).to_pylist()
    if None in values:
        raise UserError(f"{key}, row {values.index(None)}: {target} is missing")
    return values


def _classes(key: str, table: Any, target: str, *, several: bool) -> list[Any]:
    """Returns the sorted labels of the training set; `several`: of lists of labels."""
    found = _labels(key, table, target)
    if several:
        for row, value in enumerate(found):
            if not isinstance(value, list) or not all(isinstance(name, int | str) for name in value):
                raise UserError(
                    f"data.labels=several: {key}, row {row}: {target} must be a list of strings or integers"
                )
        names = sorted({name for value in found for name in value})
        if not names:
            raise UserError(f"data.labels=several: no row of {key} has a label in {target}")
        return names
    values = set()
    for value in found:
        if not isinstance(value, int | str):
            kind = table.schema.field(target).type
            raise UserError(
                f"data.labels=class: the column {target} has the type {kind}; classes are strings or integers "
                "(for a regression: data.labels=value loss=mse; for lists of labels: data.labels=several)"
            )
        values.add(value)
    return sorted(values)


def _class_names(table: Any, target: str, classes: Sequence[Any]) -> tuple[str, ...]:
    """Returns the names of the classes: those that the package datasets stores with the table, or the labels."""
    try:
        features = json.loads((table.schema.metadata or {})[b"huggingface"])["info"]["features"]
        feature = features[target]
        feature = feature[0] if isinstance(feature, list) else feature.get("feature", feature)  # of a list of labels
        names = feature["names"]
        return tuple(str(names[label]) for label in classes)
    except (KeyError, IndexError, TypeError, ValueError):
        return tuple(map(str, classes))


def _targets(key: str, table: Any, target: str, classes: Sequence[Any] | None, several: bool) -> torch.Tensor:
    """Returns int64 [N] class numbers; float32 [N, K], 0 or 1, for lists of labels; or float32 [N] or [N, K] values."""
    values = _labels(key, table, target)
    if classes is not None:
        numbers = {label: number for number, label in enumerate(classes)}
        for row, labels in enumerate(values):
            for label in labels or () if several else (labels,):
                if label not in numbers:
                    raise UserError(f"{key}, row {row}: {target} is {label!r}, a class that no training row has")
        if several:
            targets = torch.zeros(len(values), len(classes))
            for row, labels in zip(targets, values, strict=True):
                row[[numbers[label] for label in labels]] = 1.0
            return targets
        return torch.tensor([numbers[label] for label in values])
    try:
        targets = torch.tensor(values, dtype=torch.float32)
    except (TypeError, ValueError):
        kind = table.schema.field(target).type
        raise UserError(
            f"data.labels=value: the column {target} has the type {kind}; must be numbers, or lists of one length"
        ) from None
    if not bool(targets.isfinite().all()):
        row = int((~targets.reshape(len(targets), -1).isfinite().all(1)).nonzero()[0])
        raise UserError(f"{key}, row {row}: {target} is {values[row]}, not a finite number")
    return targets


# -- files


def read_parquet(key: str, files: Files, columns: Sequence[str]) -> Any:
    """Returns the columns of all files as one table, in memory or memory-mapped. Raises `UserError`."""
    arrow = _library(key)
    from pyarrow import parquet as reader

    paths = _paths(key, files)
    size = 0
    schema: Any = None
    for path in paths:
        with _reading(key, path):
            opened = reader.ParquetFile(path)
            available = opened.schema_arrow
            size += sum(opened.metadata.row_group(i).total_byte_size for i in range(opened.num_row_groups))
        for name in columns:
            if name not in available.names:
                raise UserError(f"{key}: {path} has no column {name!r}; it has {', '.join(available.names)}")
        chosen = arrow.schema([available.field(name) for name in columns], metadata=available.metadata)
        if schema is not None and not chosen.equals(schema):
            other = next(name for name in columns if chosen.field(name) != schema.field(name))
            raise UserError(
                f"{key}: the column {other} has the type {chosen.field(other).type} in {path}, "
                f"and {schema.field(other).type} in {paths[0]}"
            )
        schema = chosen if schema is None else schema
    if size > _MAX_READ and (mapped := _mapped(key, paths, columns, schema)) is not None:
        return mapped
    return arrow.Table.from_batches(_batches(key, paths, columns), schema)


def _batches(key: str, paths: Sequence[str], columns: Sequence[str]) -> Iterator[Any]:
    from pyarrow import parquet as reader

    for path in paths:
        with _reading(key, path):
            for batch in reader.ParquetFile(path).iter_batches(_BATCH_ROWS, columns=list(columns)):
                yield batch.select(columns)


def _mapped(key: str, paths: Sequence[str], columns: Sequence[str], schema: Any) -> Any:
    """Returns the columns as a memory-mapped table, written to the cache on first use; None without space for it."""
    arrow = _library(key)
    states = [f"{os.path.abspath(path)} {file_state(path)}" for path in paths]
    target = cache_file("parquet", "1", *columns, *states).with_suffix(".arrow")
    temporary = target.with_suffix(f".{os.getpid()}.tmp")
    try:
        with exclusive(target):
            if not target.exists():
                try:
                    with arrow.OSFile(str(temporary), "wb") as sink, arrow.ipc.new_file(sink, schema) as writer:
                        for batch in _batches(key, paths, columns):
                            writer.write_batch(batch)
                    os.replace(temporary, target)
                finally:
                    temporary.unlink(missing_ok=True)
        return arrow.ipc.open_file(arrow.memory_map(str(target))).read_all()
    except OSError:  # no access, or no space
        return None


def _paths(key: str, files: Files) -> list[str]:
    """Returns the files of names, patterns and folders, sorted within each."""
    paths: list[str] = []
    for entry in [files] if isinstance(files, str) else files:
        pattern = os.path.expanduser(entry)
        if os.path.isdir(pattern):
            pattern = os.path.join(glob.escape(pattern), "**", "*.parquet")
        found = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(pattern, recursive=True))
        if not found:
            raise UserError(f"{key}={entry}: no such file; a name, a pattern (shards/*.parquet) or a folder is needed")
        paths += found
    if not paths:
        raise UserError(f"{key}=[]: at least one file is required")
    return paths


@contextmanager
def _reading(key: str, path: str) -> Iterator[None]:
    arrow = _library(key)
    try:
        yield
    except (arrow.ArrowException, OSError) as error:
        raise UserError(f"{key}: {path}: cannot be read as a Parquet file ({str(error).splitlines()[0]})") from None


def _library(key: str) -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.types
    except ImportError:
        raise UserError(f"{key}: the package pyarrow is not installed; {install('dlopt[hub]')}") from None
    return pyarrow
