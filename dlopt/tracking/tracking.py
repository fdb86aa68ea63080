"""`Tracking`: shows a run on the console and writes its metrics to files and services."""

import contextlib
import json
import logging
import math
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, Self

from dlopt.basics.folders import short_path
from dlopt.basics.length import NO_UPDATES, Length, UpdateCount
from dlopt.basics.secrets import redact, redacted
from dlopt.metrics.measures import MEASURES
from dlopt.metrics.names import VAL_ACCURACY, VAL_LOSS, final_metrics, split_of, tag_of
from dlopt.metrics.shown import format_metric
from dlopt.tracking import terminal_text
from dlopt.tracking.console import ConsoleView
from dlopt.tracking.metrics import DIAGNOSTICS, AppendFile, MetricsFile, write_summary
from dlopt.tracking.sinks import Sink

if TYPE_CHECKING:
    from torch import Tensor

    from dlopt.tasks.report import TestReport
    from dlopt.tracking.remote import Remote
    from dlopt.tracking.tensorboard import TensorBoard

_FORMAT = "%(asctime)s %(levelname)-7s %(message)s"  # of train.log
_CONTROL_CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f]")  # colours and cursor movements
# TensorBoard sorts by name: its HParams table shows the first five metrics, `best/` among them, and its first two cards
# are the accuracy and the loss of the best epoch so far.
_BEST_TAGS = {metric.best: metric.best_tag for metric in (VAL_LOSS, VAL_ACCURACY)}


class _PlainTextHandler(logging.Handler):
    """Passes records on as plain text, without terminal control codes."""

    def __init__(self, write: Callable[[str], None], record_format: str | None, level: int) -> None:
        super().__init__(level)
        self.setFormatter(logging.Formatter(record_format))
        self._write = write

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._write(_CONTROL_CODES.sub("", self.format(record)))
        except Exception:
            self.handleError(record)


class TrainLog:
    """Writes dlopt's own lines and everything that reaches the root logger to `folder`/train.log.

    `show` displays a line on the console: warnings that no other handler shows, and once that the file cannot be
    written. `at_end`: warnings with this attribute, which belong at the end of the run.
    """

    def __init__(self, folder: Path, show: Callable[[str], None]) -> None:
        self._file = AppendFile(folder / "train.log", show)
        self.at_end: list[str] = []
        file_handler = _PlainTextHandler(self._append, _FORMAT, logging.NOTSET)
        # Not a child of the root logger: dlopt's own lines are on the console already.
        self._logger = logging.Logger("dlopt")
        self._logger.addHandler(file_handler)
        root = logging.getLogger()
        self._handlers = [file_handler]
        if not root.handlers:  # the first handler on the root logger disables `logging.lastResort`: replace it
            self._handlers.append(_PlainTextHandler(show, None, logging.WARNING))
            self._handlers[-1].addFilter(self._is_shown)
        for handler in self._handlers:
            root.addHandler(handler)

    def _is_shown(self, record: logging.LogRecord) -> bool:
        """Returns whether a warning is shown at once; keeps the others."""
        is_for_end = getattr(record, "at_end", False)
        if is_for_end:
            self.at_end.append(record.getMessage())
        return not is_for_end

    def _append(self, text: str) -> None:
        self._file.write(redact(text).encode(errors="backslashreplace") + b"\n")
        self._file.flush()

    def write(self, text: str) -> None:
        self._logger.info(text)

    def error(self, text: str, error: BaseException) -> None:
        """Writes `text` and the traceback of `error`."""
        self._logger.error(text, exc_info=error)

    def close(self) -> None:
        for handler in self._handlers:
            logging.getLogger().removeHandler(handler)
            handler.close()
        self._file.close()


class Tracking:
    """Shows a run on the console, writes its metrics, summary.json and train.log into `folder`, and feeds `sinks`.

    `folder` None for no files; see `silent`. `sinks`: see `Sink`.
    `log_every_steps` None disables `step`. `resume_from`: (evaluated epochs, updates) of the checkpoint from which the
    run resumes; later entries are removed. `packages`: that the run trusts; `predicts`: whether its outputs are
    predictions, so that Python can load it; both for the commands that are shown at its end.

    Errors of the disk or the terminal never raise, except that `finish` raises if it cannot write summary.json. As a
    context manager it closes itself and writes the traceback of an exception to train.log.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        sinks: Sequence[Sink],
        console: bool,
        log_every_steps: int | None = None,
        resume_from: tuple[float, int] | None = None,
        packages: Sequence[str] = (),
        predicts: bool = True,
    ) -> None:
        self.log_every_steps = log_every_steps
        self._folder = folder
        self._packages = packages
        self._predicts, self._can_evaluate = predicts, False
        self._console = ConsoleView() if console else None
        self._epochs = 0
        self._sets: tuple[str, ...] = ()  # named validation sets
        self._log: TrainLog | None = None
        self._metrics: MetricsFile | None = None
        self._diagnostics: MetricsFile | None = None
        self._tensorboard: TensorBoard | None = None
        self._sinks: list[TensorBoard | Remote] = []  # including `_tensorboard`
        if folder is not None:
            with contextlib.suppress(OSError):  # each file reports its own error
                folder.mkdir(parents=True, exist_ok=True)
            self._log = TrainLog(folder, self._show)
            self._metrics = MetricsFile(folder, resume_from, self.message)
            self._diagnostics = MetricsFile(folder, resume_from, self.message, DIAGNOSTICS)
            if "tensorboard" in sinks:
                from dlopt.tracking import tensorboard

                purge = None if resume_from is None else resume_from[1] + 1
                self._tensorboard = tensorboard.TensorBoard(folder / "tensorboard", self.message, purge_step=purge)
                self._sinks.append(self._tensorboard)
            for name in dict.fromkeys(sinks):
                if name != "tensorboard":
                    from dlopt.tracking import remote

                    self._sinks.append(remote.Remote(name, remote.SERVICES[name].start(folder), self.message))

    @classmethod
    def silent(cls) -> Self:
        """Returns one that shows and writes nothing: for ranks > 0 and probes."""
        return cls(None, sinks=[], console=False)

    def begin(
        self,
        config: Mapping[str, Any],
        facts: Mapping[str, Any],
        length: Length,
        *,
        first_step: UpdateCount = NO_UPDATES,
        choices: Mapping[str, str] | None = None,
        seconds: float = 0.0,
    ) -> None:
        """Shows the header and starts the progress display.

        `config`: resolved, plain, without secrets. `facts`: see `terminal_text.header`; `unit`: "images" or "samples".
        `first_step`, `seconds`: updates already done, and their time. `choices`: group -> name of its YAML file;
        default: the last part of `_target_`.
        """
        self._epochs, self._sets = length.epochs, tuple(facts.get("sets", ()))
        self._can_evaluate = bool(facts.get("test") or facts.get("val"))
        choices = choices or {}
        folder = None if self._folder is None else f"{short_path(self._folder)} (config.yaml lists every key)"
        facts = {**facts, "folder": folder, "length": length}
        if self._log is not None:
            self._log.write("starts" if first_step == 0 else f"resumes from step {first_step}")
            for name, values in terminal_text.header_rows(config, choices, facts).items():
                self._log.write(f"{name}: {', '.join(values)}")
        for sink in self._sinks:
            sink.config(redacted(config), redacted(terminal_text.hparams(config, choices)))
        if self._console is not None:
            self._console.begin(config, choices, facts, first_step, seconds)
            if first_step:
                self._console.message(f"resumes from step {first_step} of {length.updates}")

    def images(self, images: "Tensor", step: int = 0) -> None:
        """Sends images [B, C, H, W], uint8 or float, to TensorBoard as a grid. Ignores inputs of other shapes."""
        if self._tensorboard is not None and images.ndim == 4 and images.numel():
            self._tensorboard.images("train/images", step, images)
            self._tensorboard.flush()

    def advance(self, step: UpdateCount) -> None:
        """Call after every update; `step` counts from 1."""
        if self._console is not None:
            self._console.advance(step)

    def evaluating(self, batch: int, batches: int, split: str = "val") -> None:
        """Call after every evaluated batch of `split` (val or test); `batch` counts from 1."""
        if self._console is not None:
            self._console.evaluating(batch, batches, split)

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Call at logging points with values by TensorBoard tag (`train/loss`, `lr`, `grad_norm/global`, ...)."""
        if self.log_every_steps is None:
            return
        for sink in self._sinks:
            sink.scalars(step, values)
        if self._console is not None:
            self._console.step(step, values)

    def diagnostics(self, step: int, values: Mapping[str, float], histograms: Mapping[str, "Tensor"]) -> None:
        """Records layer statistics of one update; histograms go to TensorBoard only."""
        if self._diagnostics is not None:
            self._diagnostics.write({"step": step, **values})
        for sink in self._sinks:
            sink.scalars(step, values)
        if self._tensorboard is not None and histograms:
            self._tensorboard.histograms(step, histograms)

    def epoch(
        self,
        metrics: Mapping[str, Any],
        *,
        improved: bool = False,
        best: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Records an evaluated epoch with the keys of metrics.jsonl.

        The sinks receive `val_loss` as `val/loss` and so on; TensorBoard also `best`. Training metrics are left out if
        `step` writes them: a tag has one meaning, the mean since its last point.

        Args:
            metrics: of the epoch, by column.
            improved: whether it is the best epoch so far.
            best: metrics of the best epoch so far, by column.
        """
        if self._metrics is not None:
            self._metrics.write(metrics)
        tags: dict[str, Any] = {metric.best_tag: best.get(metric.column) for metric in (VAL_LOSS, VAL_ACCURACY)}
        so_far = {tag: float(value) for tag, value in tags.items() if _is_number(value)}
        for sink in self._sinks:
            more = so_far if sink is self._tensorboard else {}
            sink.scalars(metrics["step"], _to_tags(metrics, training=self.log_every_steps is None) | more)
            sink.flush()
        if self._log is not None:
            self._log.write(terminal_text.format_epoch(metrics, self._epochs, best=improved, sets=self._sets))
        if self._console is not None:
            self._console.epoch(metrics, improved)

    def message(self, text: str) -> None:
        """Prints a line above the progress display and writes it to train.log."""
        if self._log is not None:
            self._log.write(text)
        self._show(text)

    def _show(self, text: str) -> None:
        if self._console is not None:
            self._console.message(text)

    def finish(
        self,
        summary: Mapping[str, Any],
        draw: Callable[[], Mapping[str, Path | str]] | None = None,
        tested: "TestReport | None" = None,
        classes: Sequence[str] = (),
    ) -> None:
        """Writes summary.json, shows the results and closes. Raises `RunError` if summary.json cannot be written.

        `draw` draws pictures and returns their paths by description. An error in it is only logged. `tested`,
        `classes`: see `terminal_text.format_result`.
        """
        final = final_metrics(summary)
        tags = {key: metric.tag for key, metric in final.items() if metric.split == "test"} | _BEST_TAGS
        scalars = {tag: float(summary[key]) for key, tag in tags.items() if _is_number(summary.get(key))}
        for sink in self._sinks:
            if scalars:
                sink.scalars(int(summary.get("steps", 0)), scalars)
            sink.end(str(summary.get("status", "")))
        pictures: Mapping[str, Path | str] = {}
        try:
            # Before the pictures: a run that is killed while they are drawn has its summary.
            if self._folder is not None:
                write_summary(self._folder, summary)
            pictures = {} if draw is None else self._draw(draw)
        finally:
            if self._log is not None:
                metrics = ", ".join(
                    f"{key} {format_metric(key, value)}"
                    for key, value in summary.items()
                    if key in final and isinstance(value, int | float)
                )
                self._log.write(f"{summary.get('status', 'ended')}: {metrics}")
                if tested is not None and tested.metrics:
                    for line in terminal_text.plain_lines(terminal_text.format_result(summary, tested, classes)):
                        self._log.write(line)
            if self._console is not None:
                notes = [] if self._log is None else self._log.at_end
                lines = [] if self._folder is None else self._next_commands(self._folder, pictures)
                self._console.finish(summary, [*notes, *lines], tested, classes)
            self.close()

    def _draw(self, draw: Callable[[], Mapping[str, Path | str]]) -> Mapping[str, Path | str]:
        try:
            return draw()
        except Exception as error:  # a full disk, a font that matplotlib cannot read: the run has finished
            self.message(f"the metrics could not be drawn: {type(error).__name__}: {error}")
            return {}

    def _next_commands(self, folder: Path, pictures: Mapping[str, Path | str]) -> list[str]:
        """Returns the run folder, the pictures and the next commands, for a shell in the current folder."""
        path = short_path(folder)
        lines = [f"run folder: {path}"]
        for description, picture in pictures.items():
            lines.append(f"{description}: {picture if isinstance(picture, str) else short_path(picture)}")
        lines.append("next:")
        has_checkpoint = any((folder / "checkpoints" / name).exists() for name in ("best.pt", "last.pt"))
        if has_checkpoint and self._can_evaluate:
            trusted = f" allow_packages=[{','.join(self._packages)}]" if self._packages else ""
            lines.append(f"  dlopt eval checkpoint={shlex.quote(path)}{trusted}")
        lines.append(f"  dlopt report {shlex.quote(short_path(folder.parent))}")
        if self._tensorboard is not None:
            from dlopt.tracking.tensorboard import command

            lines.append(f"  {command(folder)}")
        if has_checkpoint and self._predicts:
            trusted = f", allow_packages={json.dumps(list(self._packages))}" if self._packages else ""
            lines.append(f"  in Python: dlopt.load({json.dumps(path, ensure_ascii=False)}{trusted})")
        return lines

    def close(self) -> None:
        """Restores the terminal and closes the files. Safe to call twice and at any time."""
        if self._console is not None:
            self._console.close()
        for file in (
            self._metrics,
            self._diagnostics,
            *self._sinks,
            self._log,
        ):  # the log is last: it receives the others' warnings
            if file is not None:
                file.close()

    def __enter__(self) -> "Tracking":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self._log is not None:
            self._log.error(f"ended by {type(error).__name__}", error)
        self.close()


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _to_tags(metrics: Mapping[str, Any], *, training: bool) -> dict[str, float]:
    """Maps the keys of metrics.jsonl to TensorBoard tags (`train_loss` -> `train/loss`).

    `training`: with training metrics, learning rate, weight decay and throughput.
    """
    scalars = {}
    for key, value in metrics.items():
        if key in ("epoch", "step") or not _is_number(value):
            continue
        of_training = split_of(key) == "train" or (key in MEASURES and MEASURES[key].is_logged_by_steps)
        if training or not of_training:
            scalars[tag_of(key)] = float(value) if math.isfinite(value) else math.nan
    return scalars
