"""Tables: CSV and Parquet files, and data sets bundled with scikit-learn."""

import csv
import io
from collections.abc import Sequence

import numpy as np
import torch

from dlopt.basics.ranges import Fraction
from dlopt.data.checks import natural
from dlopt.data.columns import Column
from dlopt.data.digits import read_bundled
from dlopt.data.feature_columns import FeatureColumns
from dlopt.data.samples import Dataset, InMemory
from dlopt.data.settings import SPLITS
from dlopt.data.splits import split
from dlopt.data.table_columns import Labels, read_table
from dlopt.data.table_rows import TableRows
from dlopt.data.targets import standardized

_TEST_SEED = 0  # fixed, so that test metrics of all runs can be compared
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
    test_split: Fraction,
    categories: tuple[str, ...] = (),  # runs from before these keys have none
    dates: tuple[str, ...] = (),
    numbers: tuple[str, ...] = (),
    saved_columns: FeatureColumns | None,
) -> Dataset:
    """Loads a CSV file with a header line, or a Parquet file: float32 [N, F], and classes int64 [N] or values [N].

    Categories, dates and columns with gaps become features when the training rows are known: see
    `dlopt.data.table_rows.encoded`.

    Args:
        delimiter: one character, or a backslash and a t for a tab.
        target: column to predict; None for the last one.
        ignore: columns that are not features.
        categories: columns of them whose values do not show it, such as integers; `dates`, `numbers` likewise.
        labels: class names, or numbers for regression.
        standardize_target: see `_dataset`.
        split_column: column with train, val or test; None: `test_split` of the rows are the test set, always the same.
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
        trained=saved_columns,
    )
    described = FeatureColumns(
        read.names, read.target, read.others, read.delimiter, encoding=encoding, has_units=read.has_units
    )
    dataset = _dataset(
        read.features,
        read.answers,
        read.parts,
        test_split,
        described,
        standardize_target=standardize_target,
        saved=saved_columns,
    )
    count, unit = len(read.names), "feature" if isinstance(read.features, np.ndarray) else "column"
    dataset.source = f"{len(read.answers):,} rows; {count} {unit}{'s' * (count > 1)}, target {read.target}"
    dataset.notes += read.notes
    return dataset


def breast_cancer(*, test_split: Fraction) -> Dataset:
    """Loads Wisconsin's breast cancer data (Street, Wolberg & Mangasarian 1993): 569 x 30, 2 classes."""
    return _bundled_classes("breast_cancer.csv", test_split)


def wine(*, test_split: Fraction) -> Dataset:
    """Loads UCI's wine data (Forina et al. 1988): 178 x 13, 3 classes."""
    return _bundled_classes("wine_data.csv", test_split)


def diabetes(*, standardize_target: bool, test_split: Fraction, saved_columns: FeatureColumns | None) -> Dataset:
    """Loads the diabetes data (Efron, Hastie, Johnstone & Tibshirani 2004): 442 x 10, one value, in their own units."""
    inputs = np.loadtxt(_bundled("diabetes_data_raw.csv.gz"))
    values = np.loadtxt(_bundled("diabetes_target.csv.gz"))
    return _dataset(
        inputs, values, None, test_split, _UNNAMED, standardize_target=standardize_target, saved=saved_columns
    )


def _bundled_classes(name: str, test_split: float) -> Dataset:
    (_, *first), *rows = list(csv.reader(_bundled(name)))
    classes = first[1:]  # the first line: samples, features, names of the classes
    inputs = np.array([row[:-1] for row in rows], dtype=np.float64)
    return _dataset(inputs, [classes[int(row[-1])] for row in rows], None, test_split, _UNNAMED)


def _bundled(name: str) -> io.StringIO:
    return io.StringIO(read_bundled(name, "data", f"file {name}"))


def _dataset(
    inputs: np.ndarray | Sequence[Column],
    answers: Sequence[str] | np.ndarray,
    parts: Sequence[str] | None,
    test_split: float,
    columns: FeatureColumns,
    *,
    standardize_target: bool = False,
    saved: FeatureColumns | None = None,
) -> Dataset:
    """Builds the splits from inputs [N, F], or columns [N], and class names, or values [N].

    Args:
        parts: split of each row; None: `test_split` of them are the test set.
        columns: of the table, without the scale of the target.
        standardize_target: scales values to mean 0 and standard deviation 1 over the rows that are not for testing.
            A constant only becomes 0. Loss and outputs are then in these units; the notes name the constants.
        saved: columns of the training data, whose scale of the targets holds for other data, too.
    """
    classes: tuple[str, ...] | None = None
    is_scaled = standardize_target or (saved is not None and saved.scale != 1.0)
    if isinstance(answers, np.ndarray):
        targets = torch.from_numpy(answers if is_scaled else answers.astype(np.float32))
    else:
        classes = tuple(sorted(set(answers), key=natural))
        numbers = {name: number for number, name in enumerate(classes)}
        targets = torch.tensor([numbers[name] for name in answers])
    samples: InMemory | TableRows
    if isinstance(inputs, np.ndarray):
        samples = InMemory(torch.from_numpy(inputs).float(), targets)
    else:
        samples = TableRows(inputs, targets)
    names = np.array(["train"] * len(samples) if parts is None else parts)
    if parts is None and test_split:
        count = max(1, round(test_split * len(samples)))
        names[split(samples, count, _TEST_SEED, keep_one=True)[0].numpy()] = "test"
    rows = {part: torch.from_numpy(np.flatnonzero(names == part)) for part in SPLITS}
    train = samples.select(rows["train"])
    val, test = (samples.select(rows[part]) if len(rows[part]) else None for part in ("val", "test"))
    dataset = Dataset(train, val, test, classes, columns=columns)
    return standardized(dataset, columns, saved) if is_scaled else dataset
