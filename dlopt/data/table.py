"""Images listed in a CSV file."""

import csv as csv_module
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal, TextIO, Unpack

import numpy as np
import torch
from torch import Tensor

from dlopt.basics.errors import UserError
from dlopt.data.samples import Dataset, ImageList
from dlopt.data.verify import ImageKeys, image_files


def csv(
    *,
    file: str,
    root: str | None,
    path_column: str,
    label_column: str,
    split_column: str | None,
    labels: Literal["class", "several", "value"],
    channels: Literal[1, 3],
    label_separator: str = ";",  # configs that were saved before this key existed lack it
    **keys: Unpack[ImageKeys],
) -> Dataset:
    """Loads images whose paths and labels are listed in a CSV file with a header line.

    Args:
        root: folder of relative paths; None: the CSV file's folder.
        split_column: column with train, val or test; None: all rows are for training.
        labels: class names, several of them per image, or numbers for regression.
        label_separator: between several labels; an empty field has none.

    Raises:
        UserError: the file, an image or a column is missing, a field is empty or invalid, or a split has a class that
            no training row has.
    """
    path = Path(file).expanduser()
    if not label_separator:
        raise UserError("data.label_separator=: must be at least one character, such as ;")
    columns = [column for column in (path_column, label_column, split_column) if column is not None]
    rows = _rows(path, columns, optional=label_column if labels == "several" else None)
    base = path.parent if root is None else Path(root).expanduser()
    splits: dict[str, list[tuple[str, str]]] = {"train": [], "val": [], "test": []}
    for number, row in rows:
        line = f"data.file={file}, line {number}"
        split = "train" if split_column is None else row[split_column].strip()
        if split not in splits:
            raise UserError(f"{line}: {split_column} is {split!r}; train, val or test are allowed")
        image = base / row[path_column].strip()
        if keys["on_error"] == "fail" and not os.path.isfile(image):
            raise UserError(f"{line}: {image} is missing or not a file")
        splits[split].append((str(image), (row[label_column] or "").strip()))
    if not splits["train"]:
        raise UserError(f"data.file={file}: has no training rows")
    separator = label_separator if labels == "several" else None
    names = {name for _, label in splits["train"] for name in _names(label, separator)}
    if separator is not None and not names:
        raise UserError(f"data.file={file}: no training row has a label in {label_column}")
    classes = None if labels == "value" else tuple(sorted(names))
    lists = {
        split: ImageList(np.array([os.fsencode(path) for path, _ in rows]), _targets(file, rows, classes, separator))
        for split, rows in splits.items()
        if rows
    }
    files, notes = image_files(str(path), lists, channels=channels, **keys)
    return Dataset(files["train"], files.get("val"), files.get("test"), classes, notes=notes)


def _rows(path: Path, columns: list[str], optional: str | None) -> list[tuple[int, dict[str, str]]]:
    """Returns (line number, fields by column) of every row. `optional`: the column whose fields may be empty."""
    with opened_csv(path) as file:
        reader = csv_module.DictReader(file)
        header = reader.fieldnames or []
        for column in columns:
            if column not in header:
                raise UserError(
                    f"data.file={path}: has no column {column!r}; it has {', '.join(header) or 'none'} "
                    "(for a table of numbers: data=table)"
                )
        rows = []
        for row in reader:
            for column in columns:
                if column != optional and not (row[column] or "").strip():
                    raise UserError(f"data.file={path}, line {reader.line_num}: {column} is empty")
            rows.append((reader.line_num, row))
        return rows


@contextmanager
def opened_csv(path: Path) -> Iterator[TextIO]:
    """Opens a CSV file in UTF-8; raises `UserError` for errors of the file and of reading it."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            yield file
    except OSError as error:
        where = "" if path.is_absolute() else f" in {Path.cwd()}"
        raise UserError(f"data.file={path}: cannot be read{where} ({error.strerror})") from error
    except (csv_module.Error, UnicodeDecodeError) as error:
        raise UserError(f"data.file={path}: is not a CSV file in UTF-8 ({error})") from error


def _names(label: str, separator: str | None) -> list[str]:
    """Returns the labels in a field; `separator` None: it is one label."""
    return [label] if separator is None else [name.strip() for name in label.split(separator) if name.strip()]


def _targets(file: str, rows: list[tuple[str, str]], classes: tuple[str, ...] | None, separator: str | None) -> Tensor:
    if classes is None:
        return torch.tensor([_number(file, path, label) for path, label in rows], dtype=torch.float32)
    index = {name: i for i, name in enumerate(classes)}
    for path, label in rows:
        for name in _names(label, separator):
            if name not in index:
                raise UserError(f"data.file={file}: {path} has the class {name!r}, which no training row has")
    if separator is not None:
        targets = torch.zeros(len(rows), len(classes))
        for row, (_, label) in zip(targets, rows, strict=True):
            row[[index[name] for name in _names(label, separator)]] = 1.0
        return targets
    return torch.tensor([index[label] for _, label in rows], dtype=torch.int64)


def _number(file: str, path: str, label: str) -> float:
    value = math.nan
    with suppress(ValueError):
        value = float(label)
    if not math.isfinite(value):
        raise UserError(f"data.file={file}: the label of {path} is {label!r}; data.labels=value needs finite numbers")
    return value
