"""Tables: CSV and Parquet files, and data sets bundled with scikit-learn."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Self, Unpack

import numpy as np
import torch
from torch import Tensor

from dlopt.basics.errors import UserError
from dlopt.data.checks import natural
from dlopt.data.images.digits import read_bundled
from dlopt.data.rows.rows import class_targets
from dlopt.data.samples import Content, Dataset, InMemory, Lines, Samples
from dlopt.data.settings import SPLITS
from dlopt.data.tables.columns import Column, FeatureColumns, TableEncoding
from dlopt.data.tables.kinds import TableKeys, read_table

NOT_ENCODED = "the model was trained on columns of numbers without gaps; these have gaps, texts or dates"
_UNNAMED = FeatureColumns((), "target")  # the names that scikit-learn gives the columns are not in its files


def table(*, saved_columns: FeatureColumns | None, **keys: Unpack[TableKeys]) -> Dataset:
    """Loads a CSV file with a header line, or a Parquet file: float32 [N, F], and classes int64 [N] or values [N].

    Categories, dates and columns with gaps become features when the training rows are known: see
    `TableRows.encode`.

    Args:
        saved_columns: of a checkpoint, or of the training data; None to decide what the columns are.

    Raises:
        UserError: the file or a column is missing, or columns have problems.
    """
    read = read_table(saved_columns, **keys)
    lines = Lines(torch.from_numpy(np.array(read.lines, dtype=np.int64)), read.unit)
    further = {name: torch.from_numpy(values) for name, values in read.further.items()}
    dataset = _dataset(read.features, read.answers, read.columns, read.parts, lines, further)
    count, unit = len(read.columns.features), "feature" if isinstance(read.features, np.ndarray) else "column"
    dataset.source = f"{len(read.answers):,} rows; {count} {unit}{'s' * (count > 1)}, target {read.columns.target}"
    dataset.notes += read.notes
    return dataset


def breast_cancer() -> Dataset:
    """Loads Wisconsin's breast cancer data (Street, Wolberg & Mangasarian 1993): 569 x 30, 2 classes."""
    return _bundled_classes("breast_cancer.csv")


def wine() -> Dataset:
    """Loads UCI's wine data (Forina et al. 1988): 178 x 13, 3 classes."""
    return _bundled_classes("wine_data.csv")


def diabetes() -> Dataset:
    """Loads the diabetes data (Efron, Hastie, Johnstone & Tibshirani 2004): 442 x 10, one value, in their own units."""
    inputs, targets = (np.loadtxt(read_bundled(f"diabetes_{each}.csv.gz")) for each in ("data_raw", "target"))
    return _dataset(inputs, targets, _UNNAMED)


def _bundled_classes(name: str) -> Dataset:
    (_, *first), *rows = list(csv.reader(read_bundled(name)))
    classes = first[1:]  # the first line: samples, features, names of the classes
    inputs = np.array([row[:-1] for row in rows], dtype=np.float64)
    return _dataset(inputs, [classes[int(row[-1])] for row in rows], _UNNAMED)


def _dataset(
    inputs: np.ndarray | Sequence[Column],
    answers: Sequence[str] | np.ndarray,
    columns: FeatureColumns,
    parts: Sequence[str] | None = None,
    origin: Lines | None = None,
    further: Mapping[str, Tensor] | None = None,
) -> Dataset:
    """Builds the splits from inputs [N, F], or columns [N], and class names, or values [N], which stay float64.

    Args:
        columns: of the table, without the scale of the target.
        parts: split of each row; None: all are for training.
    """
    classes: tuple[str, ...] | None = None
    if isinstance(answers, np.ndarray):
        targets = torch.from_numpy(answers)
    else:
        classes = tuple(sorted(set(answers), key=natural))
        targets = class_targets(answers, classes)
    samples: InMemory | TableRows
    if isinstance(inputs, np.ndarray):
        samples = InMemory(torch.from_numpy(inputs).float(), targets, origin, further)
    else:
        samples = TableRows(inputs, targets, origin, further)
    names = np.array(["train"] * len(samples) if parts is None else parts)
    rows = {part: torch.from_numpy(np.flatnonzero(names == part)) for part in SPLITS}
    train = samples.select(rows["train"])
    val, test = (samples.select(rows[part]) if len(rows[part]) else None for part in ("val", "test"))
    return Dataset(train, val, test, classes, columns=columns)


class TableRows(Samples):
    """Rows whose columns are no features yet: the validation set is split off before anything is learned from them."""

    is_encoded = False

    def __init__(
        self,
        columns: Sequence[Column],
        targets: Tensor,
        origin: Lines | None = None,
        further: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(targets, (len(columns),), further)
        self.columns = columns
        self.origin = origin

    def select(self, indices: Tensor) -> Self:
        selected = super().select(indices)
        selected.rows, selected.columns = None, [each.select(indices.numpy()) for each in self.columns]
        return selected

    def content(self) -> Content:
        """Returns the values: equal bytes for equal values, whatever other rows have."""
        size = sum(each.values.nbytes for each in self.columns)

        def read(start: int, stop: int) -> bytes:
            return b"".join(_content(each, slice(start, stop)) for each in self.columns)

        return Content(len(self), size, read)

    def encoded(self, columns: FeatureColumns | None) -> InMemory:
        if columns is None or columns.encoding is None:
            raise UserError(NOT_ENCODED)
        features = torch.from_numpy(columns.encoding.apply(self.columns))
        return InMemory(features, self.targets, self.origin, self.further)

    def encode(
        self, dataset: Dataset, val: Samples | None, test: Samples | None
    ) -> tuple[Dataset, Samples, Samples | None, Samples | None]:
        """The encoding is that of a checkpoint, or else learned from these rows."""
        assert dataset.columns is not None
        encoding = dataset.columns.encoding or TableEncoding.fitted(self.columns)
        notes = [encoding.describe(self.columns)]
        for name, rows in (("the validation set has ", val), ("the test set has ", test)):
            if isinstance(rows, TableRows):
                notes += encoding.warnings(rows.columns, name)
        columns = replace(dataset.columns, encoding=encoding)
        val, test = (None if each is None else each.encoded(columns) for each in (val, test))
        return replace(dataset, columns=columns, notes=(*dataset.notes, *notes)), self.encoded(columns), val, test


def _content(column: Column, rows: slice) -> bytes:
    values = column.values[rows]
    if column.kind != "category":
        return values.tobytes()
    texts = ["" if np.isnan(value) else column.texts[int(value)] for value in values]
    return "\0".join(texts).encode()
