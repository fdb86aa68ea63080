"""Datasets of rows with an input and a label, read one at a time: of Arrow tables and of tar shards."""

import contextlib
import glob
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol, TypedDict

import numpy as np
import torch

from dlopt.basics.errors import FileError, UserError
from dlopt.basics.ranges import NotEmpty
from dlopt.data.checks import (
    WARNING,
    column_warnings,
    ending,
    label_warnings,
    left_out_note,
    listed,
    natural,
    refuse_values,
    rounding_warnings,
    sampled,
)
from dlopt.data.images.decoding import Size, Stored, describe, has_colour, size_pair
from dlopt.data.rows.wrapped import Wrapped
from dlopt.data.samples import WHOLE, Content, Dataset, Samples, digest_of
from dlopt.data.settings import SPLITS

Labels = Literal["class", "several", "value"]
Channels = Literal[1, 3] | None
SLOW_ROWS = 10_000  # that are read one at a time within a second
Files = str | NotEmpty[str]
_LOOKED_AT = 256  # images of each split, if the first one is grey
_BRACES = re.compile(r"\{(?:(\d{1,18})\.\.(\d{1,18})|([^{}]*,[^{}]*))\}")  # {000..012} or {a,b}


class RowKeys(TypedDict):
    """Config keys of every data set of rows: see `conf/data/parquet.yaml` and `conf/data/webdataset.yaml`."""

    input: str | NotEmpty[str]
    target: str
    labels: Labels
    channels: Channels
    image_size: int | tuple[int, int] | None


class RowSource(Protocol):
    """The rows of a split. `target` names the labels in messages; `encoded`: whether the inputs are image files.

    `size`: of the stored inputs, in bytes.
    """

    target: str

    @property
    def encoded(self) -> bool: ...

    @property
    def size(self) -> int: ...

    def __len__(self) -> int: ...

    def labels(self) -> list[Any]:
        """Returns the labels of all rows."""
        ...

    def value(self, row: int, channels: Channels, size: Size = None) -> Any:
        """Returns an input: an image uint8 [C, H, W], or an array as `Wrapped` reads it. Raises `UserError`.

        `size`: of images in files, which are scaled and cropped as in image folders; None for their own.
        """
        ...

    def read(self, start: int, stop: int) -> bytes:
        """Returns the stored inputs of a range of rows: equal bytes for equal inputs. Raises `UserError`."""
        ...

    def rows(self) -> Iterator[bytes] | None:
        """Yields the stored input of each row; None if that takes long, or a value is missing."""
        ...

    def place(self, row: int) -> str:
        """Names a row for messages."""
        ...

    def type(self, row: int) -> str:
        """Describes the type of the label of a row for messages."""
        ...

    def content(self, row: int) -> bytes | None:
        """Returns an image file; None if it is missing. Raises `UserError`."""
        ...

    @property
    def names(self) -> Sequence[str] | None:
        """The names of the classes that are stored with the labels, which are numbers in this list; None without."""
        return None

    def columns(self) -> Iterator[tuple[str, np.ndarray]] | None:
        """Yields name and first values [n] of every column that is one feature; None for other inputs."""
        return None


def dataset(splits: Mapping[str, RowSource | None], keys: RowKeys, source: str, notes: tuple[str, ...] = ()) -> Dataset:
    """Builds a dataset from the rows of training, validation and test set, in this order, by the keys that set them.

    A split may be None, but not the training set. `source`: what the rows are called, and where they are from; `notes`:
    on what was left out.
    """
    by_name = zip(SPLITS, splits.items(), strict=True)
    tables = {name: (key, table) for name, (key, table) in by_name if table is not None}
    key, train = tables["train"]
    labels, channels, several = keys["labels"], keys["channels"], keys["labels"] == "several"
    train_labels = _labels(train)
    classes = None if labels == "value" else _classes(key, train, train_labels, several=several)
    if channels is not None and not train.encoded:
        raise UserError(f"data.channels={channels}: only image files are converted; use data.channels=null")
    first, is_checked = train.value(0, channels), False
    if channels is None and isinstance(first, torch.Tensor):
        coloured = _coloured([table for _, table in tables.values()]) if len(first) == 1 else None
        channels = 3 if len(first) > 1 or coloured is not None else 1
        is_checked = channels == 1
        if coloured is not None:
            notes += (f"the first image is grey, others have colour ({coloured}): all are read in colour",)
    size = size_pair(keys["image_size"])
    samples, targets = {}, {}
    for other, table in tables.values():
        notes += _naming_warnings(key, train, other, table, classes)
    for name, (_, table) in tables.items():
        targets[name] = _targets(table, train, train_labels, classes, several)
    for name, (other, table) in tables.items():
        stored = targets[name].float() if targets[name].is_floating_point() else targets[name]
        samples[name] = Rows(table, stored, channels, size, other, is_checked=is_checked)
    shown = None
    if classes is not None:
        shown = tuple(_shown(label, train) for label in classes)
        if not several and isinstance(label := train_labels[0], float):
            notes += (f"{train.target}: {label} is read as the class {int(label)}",)
        counts = torch.stack([class_counts(target, len(classes)) for target in targets.values()]).sum(0)
        notes += label_warnings(train.target, dict(zip(shown, counts.tolist(), strict=True)))
    else:
        values = targets["train"].reshape(len(train), -1).numpy()
        notes += rounding_warnings((train.target, column) for column in values.T)
    columns = train.columns()
    notes += samples["train"].warnings() if columns is None else column_warnings(columns, "leave it out of data.input")
    count = sum(map(len, samples.values()))
    val, test, facts, found = samples.get("val"), samples.get("test"), {"rows": count}, f"{count:,} {source}"
    return Dataset(samples["train"], val, test, shown, facts=facts, notes=notes, source=found)


def _coloured(tables: Sequence[RowSource]) -> str | None:
    """Names an image with colour among evenly spaced ones of each split; None if all are grey, or cannot be read.

    `Rows` checks the others when it reads them.
    """
    for table in tables:
        for row in sampled(len(table), _LOOKED_AT).tolist():
            place = table.place(row)
            with contextlib.suppress(UserError):  # raised where the image is read
                if (content := table.content(row)) is not None and has_colour(content, place):
                    return place
    return None


def class_counts(targets: torch.Tensor, classes: int) -> torch.Tensor:
    """Returns the samples of each class, or with each label."""
    return targets.sum(0).long() if targets.ndim == 2 else torch.bincount(targets, minlength=classes)


class Rows(Wrapped):
    """The rows of a table or of an archive, read one at a time."""

    def __init__(
        self,
        table: RowSource,
        targets: torch.Tensor,
        channels: Channels,
        image_size: tuple[int, int] | None,
        key: str,
        *,
        is_checked: bool = False,
    ) -> None:
        """`is_checked`: an image that has a colour although `channels` is 1 is refused."""
        self.table, self._channels, self._is_checked = table, channels, is_checked
        self._name, self.image_size = key, image_size
        first, _ = self._item(0)
        self.dtype = first.dtype
        Samples.__init__(self, targets, tuple(first.shape))

    def place(self, index: int) -> str:
        return self.table.place(int(self.rows_of(torch.tensor(index))))

    def stored(self, index: int) -> Stored | None:
        row = int(self.rows_of(torch.tensor(index)))
        content = self.table.content(row) if self.table.encoded else None
        return None if content is None else describe(content, self.table.place(row))

    def content(self) -> Content:
        table, rows = self.table, self.table.rows() if self.table.size <= WHOLE else None
        if rows is not None:
            digests = np.frombuffer(b"".join(map(digest_of, rows)), dtype=np.int64).reshape(-1, 2)
            # Writable, as torch expects.
            self.digests = torch.from_numpy(digests.copy())[self.rows_of(torch.arange(len(self)))]
            if len(self) < len(table):  # data.test_split
                return Content.of_array(self.digests)
        return Content(len(table), table.size, table.read)

    def _pair(self, index: int, size: Size = None) -> tuple[Any, Any]:
        return self._value(index, size), None

    def _value(self, index: int, size: Size) -> Any:
        if not self._is_checked:
            return self.table.value(index, self._channels, size)
        image = self.table.value(index, None, size)
        if isinstance(image, torch.Tensor) and len(image) > 1:
            if bool((image != image[:1]).any()):
                raise UserError(
                    f"data.channels=null: {self.table.place(index)}: has colour, the images looked at in advance are "
                    "grey; set data.channels=3, or 1 to read all of them as grey"
                )
            return self.table.value(index, self._channels, size)
        return image


# -- labels


def _labels(table: RowSource, train: RowSource | None = None, classes: Sequence[Any] | None = None) -> list[Any]:
    """Returns the labels of all rows. Raises `UserError` if one is missing.

    `train`: the training set, of whose labels `classes` are the different ones. Labels of other sets that name
    classes are then those of the same names in the training set; names that it lacks stay names.
    """
    values = table.labels()
    if None in values:
        raise UserError(f"{table.place(values.index(None))}: {table.target} is missing")
    if train is None or not (same := _same_names(table, train, classes)):
        return values
    if not isinstance(values[0], list):
        return [same.get(value, value) for value in values]
    return [[same.get(value, value) for value in labels] for labels in values]


def _same_names(table: RowSource, train: RowSource, classes: Sequence[Any] | None) -> dict[Any, Any]:
    """Maps the labels of another set to the training set's labels of the same class, if they differ."""
    own, names = table.names, train.names
    if own == names:
        return {}
    if names is None:  # numbers cannot be compared with names, and stay unchanged
        return dict(enumerate(own or ())) if classes and isinstance(classes[0], str) else {}
    numbers = {name: number for number, name in enumerate(names)}
    if own is None:
        return numbers if all(isinstance(label, int) for label in classes or ()) else {}
    for each in (own, names):
        if twice := [name for name, count in Counter(each).items() if count > 1]:
            raise UserError(
                f"{table.place(0)}: {table.target}: the classes have other names than those of the training set, or "
                f"another order, and {twice[0]!r} is the name of two"
            )
    if classes and isinstance(classes[0], str):
        return dict(enumerate(own))
    return {number: numbers.get(name, name) for number, name in enumerate(own)}


def _naming_warnings(
    key: str, train: RowSource, other: str, table: RowSource, classes: Sequence[Any] | None
) -> tuple[str, ...]:
    """Returns a warning if only one of two sets of numbered classes has names for them."""
    if (train.names is None) == (table.names is None) or not all(isinstance(label, int) for label in classes or ()):
        return ()
    names = train.names or table.names or ()
    if [*names] == [str(number) for number in range(len(names))] or isinstance(table.labels()[0], str):
        return ()
    has, lacks = (key, other) if table.names is None else (other, key)
    return (
        f"{WARNING}{lacks} has no names of the classes of {table.target}; its numbers are taken for those of {has}",
    )


def _shown(label: Any, train: RowSource) -> str:
    """Returns the name of a class, or its label."""
    return str(label) if train.names is None or not isinstance(label, int) else train.names[label]


def _classes(key: str, table: RowSource, found: list[Any], *, several: bool) -> list[Any]:
    """Returns the sorted ones of the labels `found` in the training set; `several`: of lists of labels."""
    if several:
        _refuse_other_than_lists(table, found)
        names = {name for value in found for name in value}
        if not names:
            raise UserError(f"data.labels=several: no row of {key} has a label in {table.target}")
        return _sorted(names, f"{key}: {table.target}")
    values = set()
    for row, value in enumerate(_whole(found)):
        if not isinstance(value, int | str):
            raise UserError(
                f"data.labels=class: {table.type(row)}; classes are strings or integers "
                "(for a regression: data.labels=value loss=mse; for lists of labels: data.labels=several)"
            )
        values.add(value)
    refuse_values(table.target, (value for value in values if isinstance(value, str)))
    return _sorted(values, f"{key}: {table.target}")


def _refuse_other_than_lists(table: RowSource, values: Sequence[Any]) -> None:
    for row, value in enumerate(values):
        if not isinstance(value, list) or not all(isinstance(name, int | str) for name in value):
            raise UserError(
                f"data.labels=several: {table.place(row)}: {table.target} must be a list of strings or integers"
            )


def _whole(labels: list[Any]) -> list[Any]:
    """Returns the labels; as integers if they are floats without decimals, as scikit-learn and pandas write some."""
    if all(isinstance(label, float) and label.is_integer() for label in labels):
        return [int(label) for label in labels]
    return labels


def _sorted(labels: set[Any], where: str) -> list[Any]:
    """Returns integers, or texts (numbers sorted by value). Raises `UserError` for a mixture."""
    if all(isinstance(label, str) for label in labels):
        return sorted(labels, key=natural)
    if text := next((label for label in labels if isinstance(label, str)), None):
        raise UserError(f"{where} has integers and texts such as {text!r}; classes must be of one type")
    return sorted(labels)


def _targets(
    table: RowSource, train: RowSource, train_labels: list[Any], classes: Sequence[Any] | None, several: bool
) -> torch.Tensor:
    """Returns int64 [N] class numbers; float32 [N, K], 0 or 1, for lists of labels; or float64 [N] or [N, K] values."""
    values = train_labels if table is train else _labels(table, train, classes)
    if classes is not None:
        values = values if several else _whole(values)
        unknown: dict[str, int] = {}  # the first row of each
        known = {*classes}
        if several and table is not train:
            _refuse_other_than_lists(table, values)
        for row, labels in enumerate(values):
            for label in labels if several else (labels,):
                if isinstance(label, list | dict) or label not in known:
                    is_number = isinstance(label, int) and train.names is not None and 0 <= label < len(train.names)
                    unknown.setdefault(repr(_shown(label, train) if is_number else label), row)
        if unknown:
            (label, row), *others = unknown.items()
            more = f"; nor {listed([name for name, _ in others])}" if others else ""
            raise UserError(f"{table.place(row)}: {table.target} is {label}, a class that no training row has{more}")
        return class_targets(values, classes, several=several)
    for row, value in enumerate(values if table.names is not None else ()):
        if isinstance(value, str):
            raise UserError(f"{table.place(row)}: {table.target} is {value!r}, a class that the training set lacks")
    try:
        targets = torch.tensor(values, dtype=torch.float64)
    except (TypeError, ValueError):
        raise UserError(f"data.labels=value: {table.type(0)}; must be numbers, or lists of one length") from None
    if not bool(targets.float().isfinite().all()):
        row = int((~targets.float().reshape(len(targets), -1).isfinite().all(1)).nonzero()[0])
        raise UserError(f"{table.place(row)}: {table.target} is {values[row]}, not a finite number")
    return targets


def class_targets(labels: Sequence[Any], classes: Sequence[Any], *, several: bool = False) -> torch.Tensor:
    """Returns int64 [N] class numbers; float32 [N, K], 0 or 1, for lists of labels."""
    numbers = {label: number for number, label in enumerate(classes)}
    if not several:
        return torch.tensor([numbers[label] for label in labels])
    targets = torch.zeros(len(labels), len(classes))
    for row, names in zip(targets, labels, strict=True):
        row[[numbers[name] for name in names]] = 1.0
    return targets


# -- files


def find_files(key: str, files: Files, suffix: str) -> tuple[list[str], Counter[str]]:
    """Returns the files of names, patterns, braces and folders, sorted within each, and what else the folders have.

    `suffix`: of the files that are read in folders, in upper or lower case. The others are counted by ending or reason.
    Raises `UserError`.
    """
    paths: list[str] = []
    others: Counter[str] = Counter()
    for entry in [files] if isinstance(files, str) else files:
        name = os.path.expanduser(entry)
        for pattern in [name] if os.path.exists(name) else _expand_braces(name):
            if os.path.isdir(pattern):
                found = _files_below(pattern, suffix, others)
            else:
                found = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(pattern, recursive=True))
            if not found:
                missing = "" if pattern == name else f"{pattern}: "
                raise FileError(
                    f"{key}={entry}: {missing}no such file; a name, a pattern (shards/*{suffix}) or a folder is needed"
                    + "".join(f" ({note})" for note in left_out_note(others))
                )
            paths += found
    if not paths:
        raise UserError(f"{key}={files}: at least one file is required")
    return paths, others


def _files_below(folder: str, suffix: str, others: Counter[str]) -> list[str]:
    """Returns the sorted files with the suffix in a folder and its subfolders, without hidden ones; counts `others`."""
    found = []
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), "**", "*"), recursive=True)):
        if os.path.isdir(path):
            continue
        if path.lower().endswith(suffix):
            found.append(path)
        else:
            others[ending(os.path.basename(path))] += 1
    return found


def _expand_braces(pattern: str) -> Iterator[str]:
    """Yields the names of a pattern with braces, as a shell does: {000..012} and {a,b}."""
    braces = _BRACES.search(pattern)
    if braces is None:
        yield pattern
        return
    first, last, names = braces.groups()
    parts = names.split(",") if first is None else (f"{n:0{len(first)}}" for n in range(int(first), int(last) + 1))
    for part in parts:
        yield from _expand_braces(pattern[: braces.start()] + part + pattern[braces.end() :])
