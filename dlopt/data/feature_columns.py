"""The columns of a table as a model reads them, which its checkpoint stores: predictions need no training data."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dlopt.basics.errors import UserError
from dlopt.data.checks import LARGEST
from dlopt.data.csv_file import finite_numbers
from dlopt.data.parquet import innermost
from dlopt.data.rows import numbers


@dataclass(frozen=True)
class FeatureColumns:
    """Columns of the training table.

    Attributes:
        features: in the order of the inputs; () if their names are not known.
        target: what the model predicts.
        others: neither of these: columns that are ignored, or name the split.
        delimiter: of a CSV file.
        mean: of the targets of a regression; its outputs are (value - mean) / scale.
    """

    features: tuple[str, ...]
    target: str
    others: tuple[str, ...] = ()
    delimiter: str = ","
    mean: float = 0.0
    scale: float = 1.0

    @property
    def saved(self) -> dict[str, Any]:
        """The plain values from which `restored` builds the columns again."""
        return {**asdict(self), "features": list(self.features), "others": list(self.others)}

    @classmethod
    def restored(cls, saved: Mapping[str, Any]) -> "FeatureColumns":
        return cls(
            tuple(map(str, saved["features"])),
            str(saved["target"]),
            tuple(map(str, saved["others"])),
            str(saved["delimiter"]),
            float(saved["mean"]),
            float(saved["scale"]),
        )

    @property
    def required(self) -> Collection[str]:
        """Columns that a table must have for predictions."""
        return self.features

    @property
    def numeric(self) -> Collection[str]:
        """Columns that are read as numbers."""
        return self.features

    def matrix(self, fields: Mapping[str, Any], place: Callable[[int], str]) -> np.ndarray:
        """Returns the features of rows, float64 [n, F].

        Args:
            fields: the columns by name: texts of a CSV file, or arrays of Arrow.
            place: names a row for messages.

        Raises:
            UserError: a value is missing, or no finite number.
        """
        return np.concatenate([_numbers(fields[name], name, place) for name in self.features], axis=1)


def _numbers(values: Any, name: str, place: Callable[[int], str]) -> np.ndarray:
    """Returns the numbers of a column, float64 [n, 1], or of a column of lists, float64 [n, F]."""
    if isinstance(values, list):
        return finite_numbers(values, name, place, "the model reads numbers in this column")[:, None]
    if values.null_count:
        row = values.is_null().to_pylist().index(True)
        raise UserError(f"{place(row)}: {name} is missing")
    kind = str(values.type)
    if innermost(values.type) != kind:  # lists
        rows = [numbers(each, f"{place(row)}: {name}", kind).reshape(-1) for row, each in enumerate(values.to_pylist())]
        return _stacked(rows, name, place)
    column = values.to_numpy(zero_copy_only=False)
    if column.dtype.kind not in "biuf":
        raise UserError(f"{place(0)}: {name} has the type {kind}; the model reads numbers in this column")
    column = column.astype(np.float64)
    if not (np.abs(column) <= LARGEST).all():  # also NaN
        row = int(np.flatnonzero(~(np.abs(column) <= LARGEST))[0])
        raise UserError(f"{place(row)}: {name} is {column[row]}, not a finite number of float32")
    return column[:, None]


def _stacked(rows: Sequence[np.ndarray], name: str, place: Callable[[int], str]) -> np.ndarray:
    for row, each in enumerate(rows):
        if len(each) != len(rows[0]):
            raise UserError(f"{place(row)}: {name} has {len(each)} numbers, other rows have {len(rows[0])}")
    return np.array(rows, dtype=np.float64).reshape(len(rows), -1)
