"""Losses of a text, or of a file of tokens, under a language model."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch.nn import functional as F

from dlopt.basics.errors import UserError
from dlopt.basics.formats import format_count, format_number
from dlopt.data.texts.text import BYTES, SEPARATOR, read_text, token_outside
from dlopt.data.texts.token_files import read_tokens
from dlopt.losses import MSE
from dlopt.metrics.text import bits_per_byte
from dlopt.tasks.text import NextToken
from dlopt.trained.predict_output import Column, is_table_of_parquet, refuse_taken
from dlopt.trained.predict_tables import ParquetTable, naming_the_key
from dlopt.trained.restore import Trained

Unit = Literal["line", "document", "window"]

_MAX_OUTPUTS = 1 << 26  # numbers of a batch, if its size is not set: 256 MiB in fp32
_SHOWN = {"line": "lines", "document": "documents", "window": "windows"}


@dataclass(frozen=True)
class Text:
    """Tokens of a text and what losses are summed over.

    Attributes:
        tokens: [N].
        lengths: bytes of each token of the vocabulary; None if unknown.
        firsts: positions at which a unit starts, sorted; the first one is 0.
        windows: first input and number of predictions of each window.
    """

    tokens: Any
    lengths: np.ndarray | None
    firsts: np.ndarray
    windows: np.ndarray


def _windows(starts: Sequence[int], ends: Sequence[int], length: int) -> np.ndarray:
    """Returns the windows [W, 2] of the streams tokens[start:end], each of up to `length` predictions."""
    found = []
    for start, end in zip(starts, ends, strict=True):
        firsts = np.arange(start, end - 1, length, dtype=np.int64)
        found.append(np.stack([firsts, np.minimum(length, end - 1 - firsts)], axis=1))
    return np.concatenate(found)


@dataclass
class TextPredictions:
    """See `Predictions`: a row for each unit of the text, of which it has the mean loss.

    `table`: has a row for each document, whose columns are also in the output; None for other units.
    """

    trained: Trained
    text: Text
    unit: Unit
    batch_size: int
    notes: Sequence[str]
    table: ParquetTable | None = None
    delimiter: str = ","
    _total: list[str] = field(default_factory=list)

    @property
    def _task(self) -> NextToken:
        return cast(NextToken, self.trained.task)

    @property
    def _counts(self) -> Sequence[str]:
        """The columns of integers."""
        first = [self.unit, "start"] if self.unit == "window" else [self.unit]
        return [*first, *(["tokens"] if self._task.unit == "token" else []), *(["bytes"] if self._has_bytes else [])]

    @property
    def _has_bytes(self) -> bool:
        return self.text.lengths is not None

    @property
    def columns(self) -> Sequence[Column]:
        return [*([] if self.table is None else self.table.kept), *self.added]

    @property
    def added(self) -> Sequence[Column]:
        metrics = ["loss", *(["bits_per_byte"] if self._has_bytes else [])]
        metrics += ["perplexity"] if self._task.unit == "token" else []
        return [*(Column(name, True, True) for name in self._counts), *(Column(name, True) for name in metrics)]

    def chunks(self, warn: Callable[[str], None], show: Callable[[str], None]) -> Iterator[Sequence[Any]]:
        units = len(self.text.firsts)
        sums, predicted, sizes = np.zeros(units), np.zeros(units, np.int64), np.zeros(units, np.int64)
        done = 0
        for windows in np.split(self.text.windows, range(self.batch_size, len(self.text.windows), self.batch_size)):
            losses = self._losses(windows)
            positions = np.concatenate([np.arange(first + 1, first + count + 1) for first, count in windows])
            unit = np.searchsorted(self.text.firsts, positions, side="right") - 1
            np.add.at(sums, unit, losses)
            np.add.at(predicted, unit, 1)
            if self.text.lengths is not None:
                np.add.at(sizes, unit, self.text.lengths[self.text.tokens[positions]])
            done += len(windows)
            show(f"{done:,} of {len(self.text.windows):,} windows predicted")
        self._total = self._metrics_line(sums.sum(), int(predicted.sum()), int(sizes.sum()))
        results, start = self._rows(sums, predicted, sizes), 0
        if self.table is None:
            yield results
            return
        for rows in self.table.rows():
            yield [*rows.values, *(column[start : start + rows.size] for column in results)]
            start += rows.size

    def _losses(self, windows: np.ndarray) -> np.ndarray:
        """Returns the loss of each prediction, in nats, of the windows [W, 2]; each process computes its shard."""
        if (shard := self.trained.mode.split.evaluation_shard) is not None:
            windows = windows[cast(slice, shard(len(windows)))]
        found: list[np.ndarray] = []
        if len(windows):
            most = int(windows[:, 1].max())
            # A shorter window is filled up with its last token, which no earlier prediction depends on.
            offsets = np.minimum(np.arange(most + 1), windows[:, 1:])
            tokens = torch.from_numpy(self.text.tokens[windows[:, :1] + offsets].astype(np.int64))
            outputs = self.trained.outputs(tokens[:, :-1])
            targets = tokens[:, 1:].to(outputs.device)
            losses = F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
            rows = losses.double().cpu().numpy()
            found = [row[:count] for row, count in zip(rows, windows[:, 1], strict=True)]
        return np.concatenate(self.trained.mode.ranks.gather(found))

    def _rows(self, sums: np.ndarray, predicted: np.ndarray, sizes: np.ndarray) -> list[list[Any]]:
        # The first token has no prediction; alone in its unit, it leaves the unit without a loss.
        with np.errstate(divide="ignore", invalid="ignore"):
            loss = sums / predicted
            bits = sums / (sizes * np.log(2))
        values = {
            self.unit: np.arange(1, len(sums) + 1),
            "start": self.text.firsts,
            "tokens": predicted,
            "bytes": sizes,
            "loss": loss,
            "bits_per_byte": bits,
            "perplexity": np.exp(loss),
        }
        return [values[column.name].tolist() for column in self.added]

    def _metrics_line(self, total: float, predicted: int, size: int) -> list[str]:
        known = [f"loss {format_number(total / predicted)}"]
        if self._has_bytes:
            known.append(f"{format_number(bits_per_byte(total / predicted, size / predicted))} bits per byte")
        return known

    def summary(self) -> str:
        units = format_count(_SHOWN[self.unit], len(self.text.firsts))
        return f"{units} predicted, {', '.join(self._total)}"


def predict_text(trained: Trained, path: Path, file: str, batch_size: int | None, unit: Unit | None) -> TextPredictions:
    """Returns the losses of `file`, a text or a file of tokens, under the language model of the checkpoint `path`.

    `batch_size`: windows; `unit`: what a row is, None: a line of a text, a row of a Parquet file, a window of tokens.
    Raises `UserError`.
    """
    task = trained.task
    assert isinstance(task, NextToken)
    if isinstance(trained.loss, MSE):
        raise UserError(f"checkpoint={path}: was trained with a squared error, not with a likelihood of the tokens")
    length = trained.window[0]
    batch_size = batch_size or max(1, min(64, _MAX_OUTPUTS // (length * task.outputs)))
    notes: tuple[str, ...] = ()
    table: ParquetTable | None = None
    if task.unit == "token" and trained.tokenizer is None:
        if unit not in (None, "window"):
            raise UserError(f"per={unit}: the text of the tokens is not known; use per=window")
        tokens, unit = _token_file(file, task.outputs), "window"
        text = _by_window(tokens, None, length, file)
    else:
        column = trained.config["data"].get("column")
        is_table = is_table_of_parquet(file)
        unit = unit or ("document" if is_table else "line")
        with naming_the_key():
            content, ends, notes = read_text(file, column, is_table=is_table)
            text = _text(trained, content, ends if is_table else None, unit, length, file)
        table = ParquetTable(file, ()) if is_table and unit == "document" else None
    predictions = TextPredictions(trained, text, unit, batch_size, notes, table)
    if table is not None:
        refuse_taken(file, table.names, predictions.added)
    return predictions


def _token_file(file: str, vocabulary: int) -> np.ndarray:
    try:
        tokens = read_tokens(Path(file))
    except UserError as error:
        raise UserError(f"file={error}") from None
    if (token := token_outside(tokens, vocabulary)) is not None:
        raise UserError(f"file={file}: contains token {token}; the model has a vocabulary of {vocabulary:,}")
    return tokens


def _refuse_short(tokens: np.ndarray, file: str) -> None:
    if len(tokens) < 2:
        raise UserError(f"file={file}: has {len(tokens)} tokens; a prediction needs one before it")


def _by_window(tokens: np.ndarray, lengths: np.ndarray | None, length: int, file: str) -> Text:
    """Returns a text in the windows of `dlopt eval`, the last one shorter."""
    _refuse_short(tokens, file)
    windows = _windows([0], [len(tokens)], length)
    firsts = windows[:, 0] + 1  # a window predicts the token after its first one
    return Text(tokens, lengths, firsts, windows)


def _text(
    trained: Trained, content: np.ndarray, ends: Sequence[int] | None, unit: Unit, length: int, file: str
) -> Text:
    """Returns the tokens of a text with its units: lines, windows, or documents.

    `ends`: of the documents, after the zero byte of each; None if any zero byte is between two of them.
    """
    has_documents = unit == "document" and bool((content == SEPARATOR[0]).any())
    if has_documents:
        end = b"" if content[-1] == SEPARATOR[0] else SEPARATOR
        content = np.frombuffer(SEPARATOR + content.tobytes() + end, np.uint8)
        separators = np.flatnonzero(content == SEPARATOR[0]) if ends is None else np.array([0, *ends])
    if trained.tokenizer is None:
        tokens, lengths = content, np.ones(BYTES, np.int64)
        starts = np.arange(len(tokens))
    else:
        tokens, lengths = trained.tokenizer.encode(content.tobytes(), file), trained.tokenizer.lengths
        starts = np.cumsum(lengths[tokens]) - lengths[tokens]  # the first byte of each token
    if unit == "window":
        return _by_window(tokens, lengths, length, file)
    _refuse_short(tokens, file)
    if has_documents:
        # A window starts at the separator before each document, whose loss does not depend on the others.
        bounds = np.searchsorted(starts, separators)
        windows = _windows(bounds[:-1].tolist(), (bounds[1:] + 1).tolist(), length)
        return Text(tokens, lengths, bounds[:-1] + 1, windows)
    line_ends = np.flatnonzero(content[:-1] == ord("\n")) + 1 if unit == "line" else np.empty(0, np.int64)
    # A token belongs to the line of its first byte.
    firsts = np.searchsorted(starts, np.concatenate([[0], line_ends]))
    return Text(tokens, lengths, firsts, _windows([0], [len(tokens)], length))
