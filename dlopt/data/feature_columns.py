"""The columns of a table as a model reads them, which its checkpoint stores: predictions need no training data."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dlopt.basics.errors import UserError
from dlopt.data.checks import LARGEST, numbers
from dlopt.data.columns import TableEncoding, column_of, field_of
from dlopt.data.csv_file import finite_numbers
from dlopt.data.parquet import innermost


@dataclass(frozen=True)
class FeatureColumns:
    """Columns of the training table.

    Attributes:
        features: in the order of the inputs; () if their names are not known.
        target: what the model predicts.
        others: neither of these: columns that are ignored, or name the split.
        delimiter: of a CSV file.
        mean: of the targets of a regression; its outputs are (value - mean) / scale.
        encoding: of columns that are not all numbers without gaps, once it is learned; None: they are the features.
        has_units: a row of the file has the units of the columns.
    """

    features: tuple[str, ...]
    target: str
    others: tuple[str, ...] = ()
    delimiter: str = ","
    mean: float = 0.0
    scale: float = 1.0
    encoding: TableEncoding | None = None
    has_units: bool = False

    @property
    def saved(self) -> dict[str, Any]:
        """The plain values from which `restored` builds the columns again."""
        encoding = {} if self.encoding is None else {"encoding": self.encoding.saved}
        plain = {key: value for key, value in vars(self).items() if key != "encoding"}
        return {**plain, "features": list(self.features), "others": list(self.others), **encoding}

    @classmethod
    def restored(cls, saved: Mapping[str, Any]) -> "FeatureColumns":
        return cls(
            tuple(map(str, saved["features"])),
            str(saved["target"]),
            tuple(map(str, saved["others"])),
            str(saved["delimiter"]),
            float(saved["mean"]),
            float(saved["scale"]),
            TableEncoding.restored(saved["encoding"]) if "encoding" in saved else None,
            bool(saved.get("has_units", True)),  # older checkpoints do not know
        )

    @property
    def inputs(self) -> Sequence[str]:
        """Names of the model's inputs."""
        return self.features if self.encoding is None else self.encoding.features

    @property
    def description(self) -> dict[str, Any]:
        """The saved values, with the names of the model's inputs."""
        return {**self.saved, "inputs": [*self.inputs]}

    def require(self, names: Collection[str], where: str) -> None:
        """Raises `UserError` that starts with `where` if a table with these columns lacks a feature."""
        if missing := [name for name in self.features if name not in names]:
            lacks = f"the column{'s' * (len(missing) > 1)} {', '.join(missing)}"
            raise UserError(f"{where}: lacks {lacks}, which the model reads; it has {', '.join(names)}")

    def unread(self, names: Sequence[str]) -> list[str]:
        """Returns the columns of a table that the training table had not."""
        known = {*self.features, self.target, *self.others, ""}
        return [name for name in names if name not in known]

    @property
    def numeric(self) -> Collection[str]:
        """Columns that are read as numbers."""
        kinds = {} if self.encoding is None else self.encoding.kinds
        return [name for name in self.features if kinds.get(name, "number") == "number"]

    def matrix(
        self, fields: Mapping[str, Any], place: Callable[[int], str], unknown: dict[str, Counter[str]] | None = None
    ) -> np.ndarray:
        """Returns the features of rows, float64 [n, F].

        Args:
            fields: the columns by name: texts of a CSV file, or arrays of Arrow.
            place: names a row for messages.
            unknown: counts what the training rows lack, for each column; see `findings`.

        Raises:
            UserError: a value is missing without an encoding that fills it in, or is of another kind.
        """
        if self.encoding is not None:
            columns = [
                column_of(each.name, each.kind, texts_of(fields[each.name]), place, each.form)
                for each in self.encoding.columns
            ]
            for own, column in zip(self.encoding.columns, columns, strict=True):
                if unknown is not None:
                    unknown.setdefault(own.name, Counter()).update(own.unknown(column))
            return self.encoding.apply(columns)
        return np.concatenate([_numbers(fields[name], name, place) for name in self.features], axis=1)

    def findings(self, unknown: Mapping[str, Counter[str]]) -> list[str]:
        """Says what becomes of values that the training rows lack."""
        columns = () if self.encoding is None else self.encoding.columns
        return [line for each in columns for line in each.findings(unknown.get(each.name, Counter()))]


def texts_of(values: Any) -> list[str]:
    """Returns values of a column as the texts of a CSV file: of a list, or of an array of Arrow."""
    items = values if isinstance(values, list) else values.to_pylist()
    return [field_of(value) for value in items]


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
