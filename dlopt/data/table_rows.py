"""Rows of a table with columns of several kinds, before and after they become features."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from dlopt.data.columns import Column, TableEncoding
from dlopt.data.samples import Dataset, InMemory, Lines, Samples


class TableRows:
    """Rows whose columns are no features yet: the validation set is split off before anything is learned from them."""

    def __init__(self, columns: Sequence[Column], targets: Tensor, origin: Lines | None = None) -> None:
        self.columns = columns
        self.targets = targets
        self.origin = origin

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.columns),)

    def __len__(self) -> int:
        return len(self.targets)

    def fetch(self, indices: Tensor) -> Tensor:
        raise NotImplementedError("the columns have no features yet: see `encoded`")

    def select(self, indices: Tensor) -> "TableRows":
        rows = indices.numpy()
        origin = None if self.origin is None else self.origin.select(indices)
        return TableRows([each.select(rows) for each in self.columns], self.targets[indices], origin)

    @property
    def size(self) -> int:
        """Bytes of the values."""
        return sum(each.values.nbytes for each in self.columns)

    def read(self, start: int, stop: int) -> bytes:
        """Returns the values of a range of rows: equal bytes for equal values, whatever other rows have."""
        return b"".join(_content(each, slice(start, stop)) for each in self.columns)


def _content(column: Column, rows: slice) -> bytes:
    values = column.values[rows]
    if column.kind != "category":
        return values.tobytes()
    texts = ["" if np.isnan(value) else column.texts[int(value)] for value in values]
    return "\0".join(texts).encode()


def encoded(
    dataset: Dataset, train: TableRows, val: Samples | None, test: Samples | None
) -> tuple[Dataset, InMemory, InMemory | None, InMemory | None]:
    """Returns the dataset with the encoding of its columns, and the splits with their features.

    The encoding is that of a checkpoint, or else learned from the training rows.
    """
    assert dataset.columns is not None
    encoding = dataset.columns.encoding or TableEncoding.fitted(train.columns)
    notes = [encoding.describe(train.columns)]
    splits: list[InMemory | None] = []
    for name, rows in (("", train), ("the validation set has ", val), ("the test set has ", test)):
        if rows is None:
            splits.append(None)
            continue
        assert isinstance(rows, TableRows)
        if rows is not train:
            notes += encoding.warnings(rows.columns, name)
        splits.append(InMemory(torch.from_numpy(encoding.apply(rows.columns)), rows.targets, rows.origin))
    described = replace(dataset.columns, encoding=encoding)
    features, val_features, test_features = splits
    assert features is not None
    found = replace(dataset, columns=described, notes=(*dataset.notes, *notes))
    return found, features, val_features, test_features
