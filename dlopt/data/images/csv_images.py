"""Images listed in a CSV file."""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Unpack

import numpy as np
import torch
from annotated_types import MinLen

from dlopt.basics.errors import UserError
from dlopt.data.checks import label_warnings, natural, refuse_values, rounding_warnings, without_decimals
from dlopt.data.images.files import ImageList
from dlopt.data.images.unreadable import ImageKeys, image_files
from dlopt.data.rows.rows import Labels, class_targets
from dlopt.data.samples import Dataset
from dlopt.data.settings import SPLITS
from dlopt.data.tables.csv_file import read_columns, read_header, require_columns
from dlopt.data.tables.further import FurtherKeys, columns_of, further_of


class CsvKeys(ImageKeys, FurtherKeys):
    """Config keys of images that are listed in a CSV file."""


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
    **keys: Unpack[CsvKeys],
) -> Dataset:
    """Loads images whose paths and labels are listed in a CSV file with a header line.

    The keys: see `conf/data/csv.yaml`.

    Raises:
        UserError: the file, an image or a column is missing, a field is empty or invalid, or a split has a class that
            no training row has.
    """
    header = read_header(file)
    dividing = columns_of(keys, target=label_column, split_column=split_column)
    other = [path_column, *([] if split_column is None else [split_column]), *dividing.values()]
    require_columns(
        header.path, header.names, [*other, label_column], " (for a table of numbers and categories: data=table)"
    )
    advice: dict[str, str | None] = {label_column: "data.labels=value needs numbers"} if labels == "value" else {}
    content = read_columns(header, other if advice else [*other, label_column], advice)
    answers: Sequence[str] = () if advice else content.texts[label_column]
    warnings: tuple[str, ...] = ()
    if labels == "class":
        answers, warnings = without_decimals(content.column(label_column), label_column)
    paths = content.column(path_column)
    parts = content.splits(split_column) or ["train"] * len(paths)
    base = content.path.parent if root is None else Path(os.path.expanduser(root))
    further = further_of(dividing, content.column, content.place)
    images = [base / name for name in paths]
    for row, image in enumerate(images):
        if keys["on_error"] == "fail" and not os.path.isfile(image):
            raise UserError(f"{content.place(row)}: {image} is missing or not a file")
    classes = None
    if labels == "value":
        targets = torch.from_numpy(content.numbers[:, 0]).float()
        warnings = rounding_warnings([(label_column, content.numbers[:, 0])])
    else:
        several = labels == "several"
        names_of = [_names(label, label_separator) if several else [label] for label in answers]
        counts = Counter(name for each in names_of for name in each)
        if not several:
            refuse_values(label_column, counts)
        warnings += label_warnings(label_column, counts)
        names = content.refuse_unknown(label_column, names_of, parts)
        if not names:
            raise UserError(f"data.file={file}: no training row has a label in {label_column}")
        classes = tuple(sorted(names, key=natural))
        targets = class_targets(names_of if several else answers, classes, several=several)
    tensors = {name: torch.from_numpy(each) for name, each in further.items()}
    everything, of_split = ImageList.of(map(str, images), targets, tensors), np.array(parts)
    lists = {
        split: everything.select(torch.from_numpy(np.flatnonzero(of_split == split)))
        for split in SPLITS
        if split in parts
    }
    files, notes = image_files(str(content.path), lists, channels, keys)
    return Dataset(
        files["train"],
        files.get("val"),
        files.get("test"),
        classes,
        notes=(*header.notes, *content.notes, *notes, *warnings),
        source=f"{len(paths):,} images and their {label_column}",
    )


def _names(field: str, separator: str) -> list[str]:
    return [name.strip() for name in field.split(separator) if name.strip()]
