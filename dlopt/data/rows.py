"""Datasets of rows with an input and a label, read one at a time: of Arrow tables and of tar shards."""

import glob
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Protocol

import numpy as np
import torch

from dlopt.basics.errors import UserError
from dlopt.data.checks import (
    are_measured,
    column_warnings,
    ending,
    label_warnings,
    left_out_note,
    natural,
    rounding_warnings,
)
from dlopt.data.images import size_pair
from dlopt.data.samples import Dataset, Wrapped

Labels = Literal["class", "several", "value"]
Channels = Literal[1, 3] | None
Files = str | list[str]
_BRACES = re.compile(r"\{(?:(\d{1,18})\.\.(\d{1,18})|([^{}]*,[^{}]*))\}")  # {000..012} or {a,b}


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

    def value(self, row: int, channels: Channels) -> Any:
        """Returns an input: an image uint8 [C, H, W], or an array as `Wrapped` reads it. Raises `UserError`."""
        ...

    def read(self, start: int, stop: int) -> bytes:
        """Returns the stored inputs of a range of rows: equal bytes for equal inputs. Raises `UserError`."""
        ...

    def place(self, row: int) -> str:
        """Names a row for messages."""
        ...

    def type(self, row: int) -> str:
        """Describes the type of the label of a row for messages."""
        ...

    def class_names(self, classes: Sequence[Any]) -> tuple[str, ...]: ...

    def columns(self) -> Iterator[tuple[str, np.ndarray]] | None:
        """Yields the names and the first values [n] of the columns that are a feature each; None: another input."""
        ...


def dataset(
    splits: Sequence[tuple[str, RowSource | None]],
    *,
    labels: Labels,
    channels: Channels,
    image_size: int | tuple[int, int] | None,
    source: str,
    notes: tuple[str, ...] = (),
) -> Dataset:
    """Builds a dataset from the rows of training, validation and test set, each with the key that set it.

    A split may be None, but not the training set. `source`: what the rows are called, and where they are from; `notes`:
    on what was left out.
    """
    key, train = splits[0]
    assert train is not None
    several = labels == "several"
    classes = None if labels == "value" else _classes(key, train, several=several)
    if channels is not None and not train.encoded:
        raise UserError(f"data.channels={channels}: only image files are converted; use data.channels=null")
    first = train.value(0, channels)
    if isinstance(first, torch.Tensor):
        channels = 1 if len(first) == 1 else 3
    size = size_pair(image_size)
    targets = [None if table is None else _targets(table, classes, several) for _, table in splits]
    samples = [
        None if table is None or target is None else Wrapped(RowDataset(table, _stored(target), channels), size, key)
        for (key, table), target in zip(splits, targets, strict=True)
    ]
    assert samples[0] is not None and targets[0] is not None
    shown = None
    if classes is not None:
        shown = train.class_names(classes)
        counts = torch.stack([_counts(target, len(classes)) for target in targets if target is not None]).sum(0)
        notes += label_warnings(train.target, dict(zip(shown, counts.tolist(), strict=True)))
    else:
        values = targets[0].reshape(len(train), -1).numpy()
        notes += rounding_warnings((train.target, column) for column in values.T)
    columns = train.columns()
    notes += samples[0].warnings() if columns is None else column_warnings(columns, "leave it out of data.input")
    count = sum(len(table) for _, table in splits if table is not None)
    found = f"{count:,} {source}"
    return Dataset(samples[0], samples[1], samples[2], shown, facts={"rows": count}, notes=notes, source=found)


def _stored(targets: torch.Tensor) -> torch.Tensor:
    return targets.float() if targets.dtype == torch.float64 else targets


def _counts(targets: torch.Tensor, classes: int) -> torch.Tensor:
    """Returns the samples of each class, or with each label."""
    return targets.sum(0).long() if targets.ndim == 2 else torch.bincount(targets, minlength=classes)


class RowDataset:
    """Map-style dataset of (input, label) for `Wrapped`; reads one row at a time."""

    def __init__(self, table: RowSource, targets: torch.Tensor, channels: Channels) -> None:
        self.targets = targets
        self.table, self._channels = table, channels

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        label = self.targets[index]
        return self.table.value(index, self._channels), label if label.ndim else label.item()


def numbers(value: Any, where: str, kind: str) -> np.ndarray:
    """Returns finite numbers as an array. Raises `UserError` that starts with `where` and ends with `kind`."""
    try:
        array = np.array(value)
    except ValueError:
        array = np.array(value, dtype=object)
    if array.dtype.kind not in "biuf" or not np.isfinite(array).all():
        raise UserError(f"{where}: must have finite numbers in lists of equal lengths ({kind})")
    return array


# -- labels


def _labels(table: RowSource) -> list[Any]:
    """Returns the labels of all rows. Raises `UserError` if one is missing."""
    values = table.labels()
    if None in values:
        raise UserError(f"{table.place(values.index(None))}: {table.target} is missing")
    return values


def _classes(key: str, table: RowSource, *, several: bool) -> list[Any]:
    """Returns the sorted labels of the training set; `several`: of lists of labels."""
    found = _labels(table)
    if several:
        for row, value in enumerate(found):
            if not isinstance(value, list) or not all(isinstance(name, int | str) for name in value):
                raise UserError(
                    f"data.labels=several: {table.place(row)}: {table.target} must be a list of strings or integers"
                )
        names = {name for value in found for name in value}
        if not names:
            raise UserError(f"data.labels=several: no row of {key} has a label in {table.target}")
        return _sorted(names, f"{key}: {table.target}")
    values = set()
    for row, value in enumerate(found):
        if not isinstance(value, int | str):
            raise UserError(
                f"data.labels=class: {table.type(row)}; classes are strings or integers "
                "(for a regression: data.labels=value loss=mse; for lists of labels: data.labels=several)"
            )
        values.add(value)
    if are_measured(value for value in values if isinstance(value, str)):
        raise UserError(
            f"data.labels=class: {table.target} has {len(values)} different numbers; for a regression, use "
            "data.labels=value loss=mse"
        )
    return _sorted(values, f"{key}: {table.target}")


def _sorted(labels: set[Any], where: str) -> list[Any]:
    """Returns integers, or texts, of which numbers are sorted by value. Raises `UserError` for a mixture."""
    if all(isinstance(label, str) for label in labels):
        return sorted(labels, key=natural)
    if text := next((label for label in labels if isinstance(label, str)), None):
        raise UserError(f"{where} has integers and texts such as {text!r}; classes must be of one type")
    return sorted(labels)


def _targets(table: RowSource, classes: Sequence[Any] | None, several: bool) -> torch.Tensor:
    """Returns int64 [N] class numbers; float32 [N, K], 0 or 1, for lists of labels; or float64 [N] or [N, K] values."""
    values = _labels(table)
    if classes is not None:
        numbers = {label: number for number, label in enumerate(classes)}
        for row, labels in enumerate(values):
            for label in labels or () if several else (labels,):
                if label not in numbers:
                    raise UserError(
                        f"{table.place(row)}: {table.target} is {label!r}, a class that no training row has"
                    )
        if several:
            targets = torch.zeros(len(values), len(classes))
            for row, labels in zip(targets, values, strict=True):
                row[[numbers[label] for label in labels]] = 1.0
            return targets
        return torch.tensor([numbers[label] for label in values])
    try:
        targets = torch.tensor(values, dtype=torch.float64)
    except (TypeError, ValueError):
        raise UserError(f"data.labels=value: {table.type(0)}; must be numbers, or lists of one length") from None
    if not bool(targets.float().isfinite().all()):
        row = int((~targets.float().reshape(len(targets), -1).isfinite().all(1)).nonzero()[0])
        raise UserError(f"{table.place(row)}: {table.target} is {values[row]}, not a finite number")
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
                raise UserError(
                    f"{key}={entry}: {missing}no such file; a name, a pattern (shards/*{suffix}) or a folder is needed"
                    + "".join(f" ({note})" for note in left_out_note(others))
                )
            paths += found
    if not paths:
        raise UserError(f"{key}={'[]' if files == [] else files}: at least one file is required")
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
