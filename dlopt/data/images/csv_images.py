"""Images listed in a CSV file."""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Unpack

import numpy as np
import torch
from annotated_types import MinLen
from torch import Tensor

from dlopt.basics.errors import UserError
from dlopt.data.checks import label_warnings, natural, refuse_values, rounding_warnings, without_decimals
from dlopt.data.images.files import ImageList
from dlopt.data.images.unreadable import ImageKeys, image_files
from dlopt.data.rows.rows import Labels
from dlopt.data.samples import Dataset
from dlopt.data.settings import SPLITS
from dlopt.data.tables.csv_file import read_columns, read_header
from dlopt.data.tables.further import columns_of, further_of


def csv(
    *,
    file: str,
    root: str | None,
    path_column: str,
    label_column: str,
    split_column: str | None,
    labels: Labels,
    channels: Literal[1, 3],
    label_separator: Annotated[str, MinLen(1)],
    group: str | None = None,  # runs from before these keys have none
    order: str | None = None,
    weight: str | None = None,
    **keys: Unpack[ImageKeys],
) -> Dataset:
    """Loads images whose paths and labels are listed in a CSV file with a header line.

    Args:
        root: folder of relative paths; None for the CSV file's folder.
        split_column: column with train, val or test; None if all rows are for training.
        labels: class names, several of them per image, or numbers for regression.
        label_separator: between several labels; an empty field has none.
        group: column whose equal values stay in one split; `order`: column by which the images are divided.
        weight: column with the weights of the images in the training loss.

    Raises:
        UserError: the file, an image or a column is missing, a field is empty or invalid, or a split has a class that
            no training row has.
    """
    header = read_header(file)
    keyed = {"group": group, "order": order, "weight": weight}
    dividing = columns_of(label_column, split_column=split_column, **keyed)
    other = [path_column, *([] if split_column is None else [split_column]), *dividing.values()]
    header.require([*other, label_column], " (for a table of numbers and categories: data=table)")
    answers: Sequence[str] | Sequence[float]
    warnings: tuple[str, ...] = ()
    merged: tuple[str, ...] = ()
    if labels == "value":
        content = read_columns(header, other, {label_column: "data.labels=value needs numbers"})
        answers = content.numbers[:, 0].tolist()
        warnings = rounding_warnings([(label_column, content.numbers[:, 0])])
    else:
        content = read_columns(header, [*other, label_column])
        answers = content.texts[label_column]
        if labels == "class":
            answers, merged = without_decimals(content.column(label_column), label_column)
    paths = content.column(path_column)
    parts = content.splits(split_column) or ["train"] * len(paths)
    base = content.path.parent if root is None else Path(os.path.expanduser(root))
    further = further_of(dividing, content.column, content.place)
    splits: dict[str, list[tuple[str, Any]]] = {name: [] for name in SPLITS}
    for row, (name, answer, split) in enumerate(zip(paths, answers, parts, strict=True)):
        image = base / name
        if keys["on_error"] == "fail" and not os.path.isfile(image):
            raise UserError(f"{content.place(row)}: {image} is missing or not a file")
        splits[split].append((str(image), answer))
    separator = label_separator if labels == "several" else None
    classes = None
    if labels != "value":
        names_of = [_names(str(label), separator) for label in answers]
        counts = Counter(name for each in names_of for name in each)
        if labels == "class":
            refuse_values(label_column, counts)
        warnings = (*merged, *label_warnings(label_column, counts))
        names = content.refuse_unknown(label_column, names_of, parts)
        if separator is not None and not names:
            raise UserError(f"data.file={file}: no training row has a label in {label_column}")
        classes = tuple(sorted(names, key=natural))
    lists = {
        split: ImageList.of(
            [path for path, _ in rows],
            _targets(rows, classes, separator),
            {name: torch.from_numpy(each[np.array(parts) == split]) for name, each in further.items()},
        )
        for split, rows in splits.items()
        if rows
    }
    files, notes = image_files(str(content.path), lists, channels=channels, **keys)
    return Dataset(
        files["train"],
        files.get("val"),
        files.get("test"),
        classes,
        notes=(*header.notes, *content.notes, *notes, *warnings),
        source=f"{len(paths):,} images and their {label_column}",
    )


def _names(label: str, separator: str | None) -> list[str]:
    """Returns the labels in a field; `separator` None if it is one label."""
    return [label] if separator is None else [name.strip() for name in label.split(separator) if name.strip()]


def _targets(rows: list[tuple[str, Any]], classes: tuple[str, ...] | None, separator: str | None) -> Tensor:
    if classes is None:
        return torch.tensor([value for _, value in rows], dtype=torch.float32)
    index = {name: i for i, name in enumerate(classes)}
    if separator is not None:
        targets = torch.zeros(len(rows), len(classes))
        for row, (_, label) in zip(targets, rows, strict=True):
            row[[index[name] for name in _names(label, separator)]] = 1.0
        return targets
    return torch.tensor([index[label] for _, label in rows], dtype=torch.int64)
