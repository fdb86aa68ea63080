"""Predictions for the rows of a table: a CSV or a Parquet file with the features of the training."""

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch

from dlopt.basics.errors import UserError
from dlopt.basics.formats import format_count
from dlopt.basics.names import Names
from dlopt.data.checks import LEFT_OUT, listed
from dlopt.data.tables.columns import FeatureColumns
from dlopt.data.tables.csv_file import Doubts, Header, read_chunks, read_header
from dlopt.data.tables.parquet import open_parquet, stored_names, with_names
from dlopt.tasks.classification import Classification
from dlopt.tasks.regression import Regression
from dlopt.trained.predict_output import Column, is_table_of_parquet, refuse_taken
from dlopt.trained.restore import Trained

_DELIMITERS = ",;\t|"

Probabilities = Literal["predicted", "all"]


class Rows(NamedTuple):
    """Rows of a table.

    Attributes:
        values: of each column, texts or an array of Arrow, for the output.
        fields: the values by column, for the model; names instead of numbers of classes.
        place: names a row for messages.
    """

    values: Sequence[Any]
    fields: Mapping[str, Any]
    size: int
    place: Callable[[int], str]


@contextlib.contextmanager
def naming_the_key() -> Iterator[None]:
    """Turns a `UserError` about data.file, a key of training, into one about file, the key of `dlopt predict`."""
    try:
        yield
    except UserError as error:
        text, _, _ = str(error).partition("; use data.")  # advice for a training
        raise UserError(text.replace("data.file", "file", 1)) from None


class CsvTable:
    """The rows of a CSV file.

    Raises `UserError`. `features`: of the training; another delimiter than theirs is tried if one of them is missing.
    `numeric`: columns of numbers.
    """

    def __init__(self, file: str, features: FeatureColumns, numeric: Collection[str]) -> None:
        self._header = _header(file, features)
        self._doubts = Doubts()
        self.delimiter = self._header.delimiter
        self.names = self._header.line
        # Numbers of a CSV file are numbers in a Parquet file, too; other fields stay texts: 00123 may be a postal code.
        self.kept = [Column(name, name in numeric) for name in self.names]
        # Columns without a name are no features, but they are in the output.
        self.notes = tuple(note for note in self._header.notes if not note.startswith(f"{LEFT_OUT}column"))

    @property
    def notes_at_end(self) -> tuple[str, ...]:
        return self._doubts.notes(self._header)

    def rows(self) -> Iterator[Rows]:
        """Raises `UserError`."""
        with naming_the_key():
            for chunk in read_chunks(self._header, self._doubts):
                values = [*map(list, zip(*(row for _, row in chunk), strict=True))]
                lines = [line for line, _ in chunk]

                def place(row: int, lines: Sequence[int] = lines) -> str:
                    return f"file={self._header.path}, line {lines[row]}"

                yield Rows(values, dict(zip(self.names, values, strict=True)), len(chunk), place)


def _header(file: str, features: FeatureColumns) -> Header:
    required = {*features.features}
    with naming_the_key():
        header = read_header(file, features.delimiter, may_have_units=features.has_units)
    for other in _DELIMITERS if required - {*header.names} else ():
        with contextlib.suppress(UserError):
            found = read_header(file, other, may_have_units=features.has_units)
            if not required - {*found.names}:
                return found
    return header


class ParquetTable:
    """The rows of a Parquet file. Raises `UserError`."""

    delimiter = ","
    notes: tuple[str, ...] = ()
    notes_at_end: tuple[str, ...] = ()

    def __init__(self, file: str, categories: Collection[str]) -> None:
        """`categories`: columns whose numbers have the names that the package datasets stores, if it wrote the file."""
        self._file = file
        schema, self._batches = open_parquet(f"file={file}", file)
        self.names: list[str] = schema.names
        self.kept = [Column(field.name, kind=field.type) for field in schema]
        self._stored = {name: stored_names(schema.metadata, name) for name in categories}

    def rows(self) -> Iterator[Rows]:
        """Raises `UserError`."""
        start = 0
        for batch in self._batches:

            def place(row: int, start: int = start) -> str:
                return f"file={self._file}, row {start + row}"

            fields = dict(zip(self.names, batch.columns, strict=True))
            for name, stored in self._stored.items():
                if stored is not None:
                    numbers, advice = fields[name].to_pylist(), "remove them from the file"
                    fields[name] = with_names(numbers, stored, name, place, advice)
            yield Rows(batch.columns, fields, len(batch), place)
            start += len(batch)


def _feature_columns(trained: Trained, path: Path) -> FeatureColumns:
    """Returns the columns that the model of the checkpoint reads. Raises `UserError`."""
    if trained.columns is not None:
        return trained.columns
    data = trained.config["data"]
    if "standardize_target" in data and data["_target_"].startswith("dlopt.data.tables.table."):
        raise UserError(
            f"checkpoint={path}: is of a version of dlopt that did not store the columns of tables; train again"
        )
    return FeatureColumns((), "target")


@dataclass
class TablePredictions:
    """See `Predictions`."""

    trained: Trained
    table: CsvTable | ParquetTable
    features: FeatureColumns
    batch_size: int
    columns: Sequence[Column]
    notes: Sequence[str]
    shows_all: bool  # the probability of every class
    kept: Sequence[int]  # numbers of the columns of the table that are in the output
    count: int = 0

    @property
    def delimiter(self) -> str:
        return self.table.delimiter

    def chunks(self, warn: Callable[[str], None], show: Callable[[str], None]) -> Iterator[Sequence[Any]]:
        without_class, unknown = 0, dict[str, Counter[str]]()
        for rows in self.table.rows():
            inputs = torch.from_numpy(self.features.matrix(rows.fields, rows.place, unknown)).float()
            if inputs.shape[1] != self.trained.sample[0]:
                raise UserError(
                    f"{rows.place(0)}: has {inputs.shape[1]} numbers, the model reads {self.trained.sample[0]}"
                )
            cells: list[list[str | float]] = []
            for batch in inputs.split(self.batch_size):
                for values, best in predicted(self.trained, batch):
                    without_class += any(map(math.isnan, values))
                    cells.append(self._cells(values, best))
                show(f"{format_count('rows', self.count + len(cells))} predicted")
            self.count += rows.size
            yield [*(rows.values[number] for number in self.kept), *map(list, zip(*cells, strict=True))]
        for note in self.table.notes_at_end:
            warn(note)
        for finding in self.features.findings(unknown):
            warn(finding)
        if without_class:
            warn(f"{format_count('rows', without_class)}: the outputs of the model have NaN")

    def _cells(self, values: Sequence[float], best: int) -> list[str | float]:
        cells = self.trained.task.cells(values, best, self.trained.classes)
        return cells if self.shows_all else cells[:2]

    def summary(self) -> str:
        return f"{format_count('rows', self.count)} predicted" if self.count else ""


def predicted(trained: Trained, batch: torch.Tensor) -> list[tuple[list[float], int]]:
    """Returns the values of each row [B, F] and its class; each process computes its shard.

    The values of a regression are in the unit of the label.
    """
    if (shard := trained.mode.split.evaluation_shard) is not None:
        batch = batch[cast(slice, shard(len(batch)))]
    found: list[tuple[list[float], int]] = []
    if len(batch):
        outputs = trained.outputs(batch)
        best = trained.predicted(outputs)
        values = trained.values(outputs)
        found = list(zip(values.reshape(len(batch), -1).tolist(), best.tolist(), strict=True))
    return trained.mode.ranks.gather(found)


def predict_table(
    trained: Trained,
    path: Path,
    file: str,
    batch_size: int,
    probabilities: Probabilities | None,
    columns: Sequence[str] | None = None,
) -> TablePredictions:
    """Returns the predictions for the table `file` of the model of the checkpoint `path`.

    `probabilities`: of the predicted class, or of all; None: of the predicted class, or of all labels of a sample.
    `columns`: of the table, for the output; None: all. Raises `UserError` if the model reads no table, or the table
    lacks a column.
    """
    trained.task.check_predicts("checkpoint", path)
    if len(trained.sample) != 1:
        raise UserError(f"file={file}: the model takes images; use images=FOLDER")
    is_class = isinstance(trained.task, Classification)
    if probabilities is not None and not is_class:
        raise UserError(f"probabilities={probabilities}: only a classification has this key; leave it out")
    features = _feature_columns(trained, path)
    table: CsvTable | ParquetTable
    if is_table_of_parquet(file):
        kinds = {} if features.encoding is None else features.encoding.kinds
        table = ParquetTable(file, [name for name, kind in kinds.items() if kind == "category"])
    else:
        values = [features.target] if isinstance(trained.task, Regression) else []
        table = CsvTable(file, features, [*features.numeric, *values])
    notes = [*table.notes]
    for number, name in enumerate(columns or ()):
        Names("column", table.names).check(name, f"columns: {name!r}")
        if name in (columns or ())[:number]:
            raise UserError(f"columns: {name!r} is listed twice")
    kept = [*range(len(table.names))] if columns is None else [table.names.index(name) for name in columns]
    names = [table.names[number] for number in kept]
    if features.features:
        features.require(table.names, f"file={file}")
        if extra := features.unread(names):
            notes.append(f"not read by the model, kept in the output: {listed(extra)}")
    else:
        features = _by_position(file, features, table.names, trained.sample[0])
        notes.append(f"the checkpoint has no names of features; read in this order: {listed(features.features)}")
    shows_all = probabilities == "all" or not is_class
    found = _columns(trained, shows_all=shows_all)
    refuse_taken(file, names, found)
    shown = [*(table.kept[number] for number in kept), *found]
    return TablePredictions(trained, table, features, batch_size, shown, notes, shows_all, kept)


def _by_position(file: str, features: FeatureColumns, names: Sequence[str], count: int) -> FeatureColumns:
    """Returns the columns of a model whose features have no names: all but the target. Raises `UserError`."""
    found = tuple(name for name in names if name not in ("", features.target))
    if len(found) != count:
        raise UserError(
            f"file={file}: has {len(found)} columns; the model reads {count}, and its checkpoint has no names of them: "
            f"keep these only, in the order of the training (and {features.target}, if you like)"
        )
    return replace(features, features=found)


def _columns(trained: Trained, *, shows_all: bool) -> list[Column]:
    """Returns the columns of a prediction; the first one, or all of a regression, are called prediction."""
    titles = trained.task.columns(trained.classes)
    if isinstance(trained.task, Regression):
        return [Column(title.replace("value", "prediction", 1), True) for title in titles]
    first, *others = titles if shows_all else titles[:2]
    del first
    return [Column("prediction"), *(Column(title, True) for title in others)]
