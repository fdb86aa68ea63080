"""Tables of numbers: one feature per column. CSV files, and data sets bundled with scikit-learn."""

import csv
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch

from dlopt.basics.errors import UserError
from dlopt.basics.ranges import Fraction
from dlopt.data.checks import (
    column_warnings,
    label_warnings,
    natural,
    refuse_values,
    rounding_warnings,
    without_decimals,
)
from dlopt.data.csv_file import read_columns, read_header
from dlopt.data.digits import read_bundled
from dlopt.data.feature_columns import FeatureColumns
from dlopt.data.normalization import moments
from dlopt.data.samples import SPLITS, Dataset, InMemory
from dlopt.data.splits import split

_TEST_SEED = 0  # fixed, so that test metrics of all runs can be compared
_UNNAMED = FeatureColumns((), "target")  # the names that scikit-learn gives the columns are not in its files
Labels = Literal["class", "value"]


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
) -> Dataset:
    """Loads a CSV file with a header line: float32 [N, F], and classes int64 [N] or values float32 [N].

    Args:
        delimiter: one character, or a backslash and a t for a tab.
        target: column to predict; None for the last one.
        ignore: columns that are not features.
        labels: class names, or numbers for regression.
        standardize_target: see `_dataset`.
        split_column: column with train, val or test; None: `test_split` of the rows are the test set, always the same.

    Raises:
        UserError: the file or a column is missing, or a field is empty or not a number.
    """
    delimiter = "\t" if delimiter == r"\t" else delimiter
    if len(delimiter) != 1:
        raise UserError(f"data.delimiter={delimiter!r}: must be one character, or \\t for a tab")
    header = read_header(file, delimiter)
    columns = header.names
    if len(columns) < 2:
        likely = next((f"={each!r}" for each in ";\t|," if each in "".join(columns)), f" if it is not {delimiter!r}")
        raise UserError(f"data.file={file}: has {len(columns)} columns; set data.delimiter{likely}")
    target = columns[-1] if target is None else target
    split_columns = [] if split_column is None else [split_column]
    header.require([target, *ignore, *split_columns])
    features = [column for column in columns if column not in (target, *ignore, split_column)]
    if not features:
        raise UserError(f"data.file={file}: no column is left as a feature")
    numbers = {name: f"leave it out with data.ignore=[{name}]" for name in features}
    answers: Sequence[str] | np.ndarray
    warnings: tuple[str, ...] = ()
    if labels == "value":
        numbers[target] = "every row needs a target (classes: data.labels=class)"
        content = read_columns(header, split_columns, numbers)
        answers = content.numbers[:, -1]
        if not standardize_target:  # in float64
            warnings = rounding_warnings([(f"the target {target}", answers)])
    else:
        content = read_columns(header, [target, *split_columns], numbers)
        answers, merged = without_decimals(content.column(target), target)
        warnings = (*merged, *label_warnings(target, Counter(answers)))
        refuse_values(target, answers, len(answers))
    if not len(content):
        raise UserError(f"data.file={file}: has no rows")
    inputs, parts = content.numbers[:, : len(features)], content.splits(split_column)
    named = zip(features, inputs.T, strict=True)
    warnings = (*content.notes, *column_warnings(named, "leave it out with data.ignore=[{name}]"), *warnings)
    others = tuple(name for name in columns if name in (*ignore, *split_columns))
    read = FeatureColumns(tuple(features), target, others, header.delimiter)
    dataset = _dataset(inputs, answers, parts, test_split, read, standardize_target=standardize_target)
    dataset.source = f"{len(content):,} rows; {len(features)} feature{'s' * (len(features) > 1)}, target {target}"
    dataset.notes += (*header.notes, *warnings)
    return dataset


def breast_cancer(*, test_split: Fraction) -> Dataset:
    """Loads Wisconsin's breast cancer data (Street, Wolberg & Mangasarian 1993): 569 x 30, 2 classes."""
    return _bundled_classes("breast_cancer.csv", test_split)


def wine(*, test_split: Fraction) -> Dataset:
    """Loads UCI's wine data (Forina et al. 1988): 178 x 13, 3 classes."""
    return _bundled_classes("wine_data.csv", test_split)


def diabetes(*, standardize_target: bool, test_split: Fraction) -> Dataset:
    """Loads the diabetes data (Efron, Hastie, Johnstone & Tibshirani 2004): 442 x 10, one value, in their own units."""
    inputs = np.loadtxt(_bundled("diabetes_data_raw.csv.gz"))
    values = np.loadtxt(_bundled("diabetes_target.csv.gz"))
    return _dataset(inputs, values, None, test_split, _UNNAMED, standardize_target=standardize_target)


def _bundled_classes(name: str, test_split: float) -> Dataset:
    (_, *first), *rows = list(csv.reader(_bundled(name)))
    classes = first[1:]  # the first line: samples, features, names of the classes
    inputs = np.array([row[:-1] for row in rows], dtype=np.float64)
    return _dataset(inputs, [classes[int(row[-1])] for row in rows], None, test_split, _UNNAMED)


def _bundled(name: str) -> io.StringIO:
    return io.StringIO(read_bundled(name, "data", f"file {name}"))


def _dataset(
    inputs: np.ndarray,
    answers: Sequence[str] | np.ndarray,
    parts: Sequence[str] | None,
    test_split: float,
    columns: FeatureColumns,
    *,
    standardize_target: bool = False,
) -> Dataset:
    """Builds the splits from inputs [N, F] and class names, or values [N].

    Args:
        parts: split of each row; None: `test_split` of them are the test set.
        columns: of the table, without the scale of the target.
        standardize_target: scales values to mean 0 and standard deviation 1 over the rows that are not for testing.
            A constant only becomes 0. Loss and outputs are then in these units; the notes name the constants.
    """
    notes: tuple[str, ...] = ()
    classes: tuple[str, ...] | None = None
    if isinstance(answers, np.ndarray):
        targets = torch.from_numpy(answers)
    else:
        classes = tuple(sorted(set(answers), key=natural))
        numbers = {name: number for number, name in enumerate(classes)}
        targets = torch.tensor([numbers[name] for name in answers])
    samples = InMemory(torch.from_numpy(inputs).float(), targets)
    names = np.array(["train"] * len(samples) if parts is None else parts)
    if parts is None and test_split:
        count = max(1, round(test_split * len(samples)))
        names[split(samples, count, _TEST_SEED, keep_one=True)[0].numpy()] = "test"
    rows = {part: torch.from_numpy(np.flatnonzero(names == part)) for part in SPLITS}
    if classes is None:
        scale = (0.0, 1.0)
        if standardize_target:
            known = targets[rows["train"]]
            mean, deviation = moments(InMemory(known[:, None], known))
            scale = mean.item(), deviation.item()
            columns = replace(columns, mean=scale[0], scale=scale[1])
            notes = (f"targets and outputs: (value - {scale[0]:.6g}) / {scale[1]:.6g} (data.standardize_target)",)
        samples.targets = ((targets - scale[0]) / scale[1]).float()
    train = samples.select(rows["train"])
    val, test = (samples.select(rows[part]) if len(rows[part]) else None for part in ("val", "test"))
    for part, held_out in (("val", val), ("test", test)):
        unknown = set() if held_out is None else {*held_out.targets.tolist()} - {*train.targets.tolist()}
        if classes is not None and unknown:
            raise UserError(
                f"data.split_column: {part} has the class {classes[min(unknown)]!r}, which no training row has"
            )
    return Dataset(train, val, test, classes, notes=notes, columns=columns)
