"""Tables: CSV and Parquet files, and data sets bundled with scikit-learn."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Self

import numpy as np
import torch
from torch import Tensor

from dlopt.basics.errors import UserError
from dlopt.data.checks import natural
from dlopt.data.images.digits import read_bundled
from dlopt.data.samples import Content, Dataset, InMemory, Lines, Samples
from dlopt.data.settings import SPLITS
from dlopt.data.tables.columns import Column, FeatureColumns, TableEncoding
from dlopt.data.tables.kinds import Labels, read_table

NOT_ENCODED = "the model was trained on columns of numbers without gaps; these have gaps, texts or dates"
_UNNAMED = FeatureColumns((), "target")  # the names that scikit-learn gives the columns are not in its files


def table(
    *,
    file: str,
    delimiter: str,
    target: str | None,
    ignore: tuple[str, ...],
    labels: Labels,
    standardize_target: bool,
    split_column: str | None,
    categories: tuple[str, ...] = (),  # runs from before these keys have none
    dates: tuple[str, ...] = (),
    numbers: tuple[str, ...] = (),
    group: str | None = None,
    order: str | None = None,
    weight: str | None = None,
    saved_columns: FeatureColumns | None,
) -> Dataset:
    """Loads a CSV file with a header line, or a Parquet file: float32 [N, F], and classes int64 [N] or values [N].

    Categories, dates and columns with gaps become features when the training rows are known: see
    `TableRows.encode`.

    Args:
        delimiter: one character, or a backslash and a t for a tab.
        target: column to predict; None for the last one.
        ignore: columns that are not features.
        categories: columns of them whose values do not show it, such as integers; `dates`, `numbers` likewise.
        labels: class names, or numbers for regression.
        standardize_target: whether values are to be scaled before they are rounded to float32.
        split_column: column with train, val or test; None: all rows are for training.
        group: column whose equal values stay in one split; `order`: column by which the rows are divided.
        weight: column with the weights of the rows in the training loss.
        saved_columns: of a checkpoint, or of the training data; None to decide what the columns are.

    Raises:
        UserError: the file or a column is missing, or columns have problems.
    """
    encoding = None if saved_columns is None else saved_columns.encoding
    read = read_table(
        file=file,
        delimiter=delimiter,
        target=target,
        ignore=ignore,
        categories=categories,
        dates=dates,
        numbers=numbers,
        labels=labels,
        standardize_target=standardize_target,
        split_column=split_column,
        group=group,
        order=order,
        weight=weight,
        trained=saved_columns,
    )
    described = FeatureColumns(
        read.names, read.target, read.others, read.delimiter, encoding=encoding, has_units=read.has_units
    )
    lines = Lines(torch.from_numpy(np.array(read.lines, dtype=np.int64)), read.unit)
    further = {name: torch.from_numpy(values) for name, values in read.further.items()}
    dataset = _dataset(read.features, read.answers, described, read.parts, lines, further)
    count, unit = len(read.names), "feature" if isinstance(read.features, np.ndarray) else "column"
    dataset.source = f"{len(read.answers):,} rows; {count} {unit}{'s' * (count > 1)}, target {read.target}"
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
    inputs = np.loadtxt(_bundled("diabetes_data_raw.csv.gz"))
    return _dataset(inputs, np.loadtxt(_bundled("diabetes_target.csv.gz")), _UNNAMED)


def _bundled_classes(name: str) -> Dataset:
    (_, *first), *rows = list(csv.reader(_bundled(name)))
    classes = first[1:]  # the first line: samples, features, names of the classes
    inputs = np.array([row[:-1] for row in rows], dtype=np.float64)
    return _dataset(inputs, [classes[int(row[-1])] for row in rows], _UNNAMED)


def _bundled(name: str) -> io.StringIO:
    return io.StringIO(read_bundled(name, "data", f"file {name}"))


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
        numbers = {name: number for number, name in enumerate(classes)}
        targets = torch.tensor([numbers[name] for name in answers])
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
