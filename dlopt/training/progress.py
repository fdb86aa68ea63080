"""A run: its config and folder, its progress and timing."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from dlopt.basics.length import NO_BATCHES, NO_EPOCHS, NO_UPDATES, BatchCount, EpochCount, UpdateCount
from dlopt.config.run_config import RunConfig
from dlopt.data.batches import Batch
from dlopt.metrics.names import Metric, tag_of
from dlopt.metrics.sums import MetricSum
from dlopt.parallel.step_timing import StepTiming
from dlopt.training.checkpoint.content import Checkpoint
from dlopt.training.step import EpochBatches
from dlopt.training.throughput import ON_CPU, Throughput

Status = Literal["finished", "stopped_early", "interrupted"]


@dataclass(frozen=True)
class TrainingRun:
    """A config and the folder of its run, which `train_run` trains; `dlopt.python.runs.Run` is a run as read."""

    run_config: RunConfig
    folder: Path
    checkpoint: Checkpoint | None = None  # to resume from
    choices: Mapping[str, str] = field(default_factory=dict)  # config group -> choice, for display
    overrides: Sequence[str] | None = None  # of the command line; None if the folder already describes the run


@dataclass
class Progress:
    """State of a run's loop, for checkpoints."""

    epoch: int = 0  # completed epochs
    position: BatchCount = NO_BATCHES  # completed batches of the current epoch
    step: UpdateCount = NO_UPDATES  # completed updates
    seconds: float = 0.0
    samples: int | None = 0  # of the updates, of all processes; None: of a checkpoint that does not count them
    evaluated_samples: int | None = 0  # forward and backward; None if an optimizer also computes other things of them
    peak_memory: int = 0  # bytes, of the process that needed most
    resumed_from: list[int] = field(default_factory=list)
    data: Mapping[str, Any] = field(default_factory=dict)  # see `build.data_spec`
    found_lr: float | None = None  # learning rate of a range test
    evaluated: EpochCount = NO_EPOCHS  # of the latest line of metrics.jsonl; a fraction within an epoch

    def count(self, batches: int, samples: int, passes: int | None) -> None:
        """Counts an update of this many batches and samples. `passes`: see `Step.passes`."""
        self.step, self.position = UpdateCount(self.step + 1), BatchCount(self.position + batches)
        unknown = self.evaluated_samples is None or passes is None
        self.evaluated_samples = None if unknown else (self.evaluated_samples or 0) + samples * (passes or 0)
        self.samples = None if self.samples is None else self.samples + samples

    def resumed(self, saved: Mapping[str, Any]) -> "Progress":
        """Returns the progress of a checkpoint, on the data of this run."""
        uncounted = {"samples": None, "evaluated_samples": None}  # of a checkpoint that does not count them
        own = {"data": self.data, "resumed_from": [*saved["resumed_from"], saved["step"]]}
        known = {each.name: saved[each.name] for each in fields(self) if each.name in saved}
        return Progress(**{**uncounted, **known, **own})


@dataclass(frozen=True)
class Intervals:
    """Intervals of evaluation, checkpoints and logging."""

    evaluate_every: int = 1  # epochs
    evaluate_every_steps: int | None = None  # updates; in addition, within an epoch
    save_every_epochs: int | None = 1
    save_every_steps: int | None = None
    log_every_steps: int | None = None
    snapshot: Callable[[int], str | None] | None = None  # completed updates -> name of a checkpoint to keep


class Clock:
    """Measures training time, and computes the metrics of a logging point.

    Args:
        progress: to which training time is added.
        metrics: of the training samples so far.
        timing: of the updates of all ranks; None if there is one rank.
        throughput: computes throughput and utilization.
    """

    def __init__(
        self,
        progress: Progress,
        metrics: MetricSum,
        timing: StepTiming | None = None,
        throughput: Throughput = ON_CPU,
    ) -> None:
        self.progress = progress
        self.train_metrics = metrics
        self.timing = timing
        self.throughput = throughput
        self._trained = (0, 0.0)  # samples and seconds of training since the latest evaluation
        self._since = time.perf_counter()
        self._restart()

    def _restart(self) -> None:
        self._log_since = self._since
        self._count = self._log_count = self.train_metrics.count
        if self.timing is not None:
            self.timing.restart(self.progress.step)

    def stop(self, *, training: bool = True) -> None:
        """Adds the time since the last call to the run's training time, and starts a new logging interval.

        `training`: whether the time was spent on updates; false for an evaluation or a checkpoint.
        """
        # For the count from which `_restart` measures the throughput. Waits for the device, and is a collective with
        # several ranks: the clock stops at evaluations and saves only, on all ranks after the same update.
        self.train_metrics.sync()
        now = time.perf_counter()
        self.progress.seconds += now - self._since
        if training:
            samples, seconds = self._trained
            self._trained = samples + self.train_metrics.count - self._count, seconds + now - self._since
        self._since = now
        self._restart()

    def epoch_metrics(self) -> dict[str, float]:
        """Returns throughput and utilization of the training between the last two evaluations, by column.

        Call after `stop`.
        """
        trained, self._trained = self._trained, (0, 0.0)
        return self.throughput.metrics(*trained)

    def training_metrics(self, rates: Mapping[str, float]) -> dict[str, float]:
        """Returns the rates and the mean train/... since the last logging point, by tag."""
        since = self.train_metrics.since_last()
        return {**rates, **{Metric("train", name).tag: value for name, value in since.items()}}

    def metrics(self, rates: Mapping[str, float], norm: Tensor | None) -> dict[str, float]:
        """Returns the metrics since the last logging point: rates, train/..., gradient norm, throughput, step timing.

        `rates`: learning rate and weight decay of the latest update; `norm`: of its gradient, if it was computed.
        """
        metrics = self.training_metrics(rates)
        if norm is not None:
            # The sums above have waited for the device already.
            metrics["grad_norm/global"] = float(norm)
        now, count = time.perf_counter(), self.train_metrics.count
        throughput = self.throughput.metrics(count - self._log_count, now - self._log_since)
        metrics |= {tag_of(column): value for column, value in throughput.items()}
        self._log_since, self._log_count = now, count
        return metrics if self.timing is None else {**metrics, **self.timing.metrics(self.progress.step)}


def endless_batches(batches: EpochBatches, progress: Progress) -> Iterator[Batch]:
    """Yields the batches that follow `progress`, epoch after epoch."""
    epoch, position, step = progress.epoch, progress.position, progress.step
    while True:
        for batch in batches.epoch(epoch, position, step):
            yield batch
            step = UpdateCount(step + 1)
        epoch, position = epoch + 1, NO_BATCHES
