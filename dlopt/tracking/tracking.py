"""The facade of tracking: one object that shows a run and writes its metrics."""

import contextlib
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from dlopt.errors import UserError
from dlopt.tracking import layout
from dlopt.tracking.console import ConsoleView
from dlopt.tracking.files import TrainLog
from dlopt.tracking.metrics import MetricsFile, write_summary

if TYPE_CHECKING:
    from torch import Tensor

    from dlopt.tracking.remote import Remote
    from dlopt.tracking.tensorboard import TensorBoard

SINKS = ("tensorboard", "mlflow", "wandb")
# TensorBoard's HParams table shows the first five metrics by name: `best/` comes before all the curves.
_FINAL_TAGS = {
    "test_loss": "test/loss", "test_accuracy": "test/accuracy",
    "best_val_loss": "best/val_loss", "best_val_accuracy": "best/val_accuracy",
}  # fmt: skip


class Tracking:
    """Shows a run on the console and writes metrics.jsonl, summary.json, train.log and TensorBoard into `folder`.

    `folder` None writes no file, so `Tracking(None, sinks=[], console=False)` is what ranks other than 0 hold.
    `sinks`: of `SINKS`. `log_every_steps` None switches `step` off. `resume_from`: (evaluated epochs,
    updates) contained in the checkpoint that the run goes on from; what was written beyond is cut.

    A disk or a terminal that fails never raises here, except that `finish` must be able to write summary.json.
    As a context manager it closes itself and leaves the traceback of an exception in train.log.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        sinks: Sequence[str],
        console: bool,
        log_every_steps: int | None = None,
        resume_from: tuple[int, int] | None = None,
    ) -> None:
        unknown = set(sinks) - set(SINKS)
        if unknown:
            raise UserError(f"sinks={list(sinks)}: {sorted(unknown)[0]} is unknown; allowed: {', '.join(SINKS)}")
        self.log_every_steps = log_every_steps
        self._folder = folder
        self._console = ConsoleView() if console else None
        self._stepped: set[str] = set()
        self._epochs = 0
        self._log: TrainLog | None = None
        self._metrics: MetricsFile | None = None
        self._tensorboard: TensorBoard | None = None
        self._sinks: list[TensorBoard | Remote] = []  # all of them
        if folder is not None:
            with contextlib.suppress(OSError):  # each file complains for itself
                folder.mkdir(parents=True, exist_ok=True)
            self._log = TrainLog(folder, self._show)
            self._metrics = MetricsFile(folder, resume_from, self.message)
            if "tensorboard" in sinks:
                from dlopt.tracking import tensorboard

                purge = None if resume_from is None else resume_from[1] + 1
                self._tensorboard = tensorboard.TensorBoard(folder / "tensorboard", self.message, purge_step=purge)
                self._sinks.append(self._tensorboard)
            for name in dict.fromkeys(sinks):
                if name != "tensorboard":
                    from dlopt.tracking import remote

                    self._sinks.append(remote.Remote(name, remote.SERVICES[name](folder), self.message))

    def begin(
        self,
        config: Mapping[str, Any],
        facts: Mapping[str, Any],
        *,
        epochs: int,
        steps_per_epoch: int,
        first_step: int = 0,
        steps: int | None = None,
        choices: Mapping[str, str] | None = None,
        command: str = "",
        seconds: float = 0.0,
    ) -> None:
        """Shows the header and starts the progress display.

        `config`: resolved, plain, without secrets. `facts`: see `layout.header`; `unit`: "images" or "samples".
        `first_step`, `seconds`: updates already done, and their time. `steps`: updates in total (None: epochs *
        steps_per_epoch). `choices`: group -> chosen YAML name; without it the last part of `_target_` is shown.
        `command`: the command line as typed.
        """
        self._epochs = epochs
        choices = choices or {}
        total = epochs * steps_per_epoch if steps is None else steps
        folder = None if self._folder is None else f"{layout.short_path(self._folder)} (config.yaml lists every key)"
        facts = {**facts, "folder": folder, "epochs": epochs, "steps_per_epoch": steps_per_epoch}
        if self._log is not None:
            self._log.write("starts" if first_step == 0 else f"resumes from step {first_step}")
            for name, values in layout.header_rows(config, choices, facts).items():
                self._log.write(f"{name}: {', '.join(values)}")
        for sink in self._sinks:
            sink.config(config, layout.hparams(config, choices))
        if self._console is not None:
            self._console.begin(
                command, config, choices, facts, epochs, steps_per_epoch, total, first_step, seconds
            )
            if first_step:
                self._console.message(f"resumes from step {first_step} of {total}")

    def images(self, images: "Tensor", step: int = 0) -> None:
        """[B, C, H, W], uint8 or float: a grid of them goes to TensorBoard. Inputs of other shapes are ignored."""
        if self._tensorboard is not None and images.ndim == 4 and images.numel():
            self._tensorboard.images("train/images", step, images)
            self._tensorboard.flush()

    def advance(self, step: int) -> None:
        """After every update; `step` counts them from 1."""
        if self._console is not None:
            self._console.advance(step)

    def evaluating(self, batch: int, batches: int) -> None:
        """After every evaluated batch; `batch` counts them from 1."""
        if self._console is not None:
            self._console.evaluating(batch, batches)

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """At logging points: `values` under TensorBoard's tags (`train/loss`, `lr`, `grad_norm/global`, ...)."""
        if self.log_every_steps is None:
            return
        self._stepped.update(values)
        for sink in self._sinks:
            sink.scalars(step, values)
        if self._console is not None:
            self._console.step(step, values)

    def diagnostics(self, step: int, values: Mapping[str, float], histograms: Mapping[str, "Tensor"]) -> None:
        """What was seen of the layers at one update; histograms go to TensorBoard alone."""
        for sink in self._sinks:
            sink.scalars(step, values)
        if self._tensorboard is not None and histograms:
            self._tensorboard.histograms(step, histograms)

    def epoch(self, metrics: Mapping[str, Any], *, best: bool = False) -> None:
        """An evaluated epoch, with metrics.jsonl's keys; `best` marks it as the best so far.

        In TensorBoard `train_loss` becomes `train/loss` and so on; a tag that `step` writes is left to it.
        """
        if self._metrics is not None:
            self._metrics.write(metrics)
        for sink in self._sinks:
            sink.scalars(metrics["step"], _scalars(metrics, self._stepped))
            sink.flush()
        if self._log is not None:
            self._log.write(layout.plain_epoch(metrics, self._epochs, best=best))
        if self._console is not None:
            self._console.epoch(metrics, best)

    def rewind(self, epoch: int, step: int) -> None:
        """The run has gone back to `epoch` evaluated epochs and `step` updates: what was written beyond is cut."""
        if self._metrics is not None:
            self._metrics.rewind(epoch, step)
        if self._tensorboard is not None:
            self._tensorboard.purge(step + 1)

    def message(self, text: str) -> None:
        """A line to the user, above the progress display, and into train.log."""
        if self._log is not None:
            self._log.write(text)
        self._show(text)

    def _show(self, text: str) -> None:
        if self._console is not None:
            self._console.message(text)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json (RunError when that fails), show the result, and close."""
        scalars = {tag: float(summary[key]) for key, tag in _FINAL_TAGS.items() if _is_number(summary.get(key))}
        for sink in self._sinks:
            if scalars:
                sink.scalars(int(summary.get("steps", 0)), scalars)
            sink.end(str(summary.get("status", "")))
        lines = [] if self._folder is None else self._next_commands(self._folder)
        try:
            if self._folder is not None:
                write_summary(self._folder, summary)
        finally:
            if self._log is not None:
                metrics = ", ".join(
                    f"{key} {layout.metric(key, value)}"
                    for key, value in summary.items()
                    if key.startswith(("best_val_", "test_")) and isinstance(value, int | float)
                )
                self._log.write(f"{summary.get('status', 'ended')}: {metrics}")
            if self._console is not None:
                self._console.finish(summary, lines)
            self.close()

    def _next_commands(self, folder: Path) -> list[str]:
        """Returns the run folder and the next commands, for a shell in the current folder."""
        path = shlex.quote(layout.short_path(folder))
        lines = [f"run folder: {layout.short_path(folder)}", "next:"]
        if (folder / "checkpoints" / "best.pt").exists():
            lines.append(f"  dlopt eval checkpoint={path}/checkpoints/best.pt")
        lines.append(f"  dlopt report {shlex.quote(layout.short_path(folder.parent))}")
        if self._tensorboard is not None:
            from dlopt.tracking.tensorboard import command

            lines.append(f"  {command(folder)}")
        return lines

    def close(self) -> None:
        """Give the terminal back and close the files; safe at any time, also twice."""
        if self._console is not None:
            self._console.close()
        for file in (self._metrics, *self._sinks, self._log):  # the log is last: it takes the others' complaints
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


def _scalars(metrics: Mapping[str, Any], taken: set[str]) -> dict[str, float]:
    """metrics.jsonl's keys -> TensorBoard's tags."""
    scalars = {}
    for key, value in metrics.items():
        if key in ("epoch", "step") or not _is_number(value):
            continue
        split, _, rest = key.partition("_")
        tag = f"{split}/{rest}" if split in ("train", "val") and rest else key
        if tag not in taken:
            scalars[tag] = float(value) if math.isfinite(value) else math.nan
    return scalars
