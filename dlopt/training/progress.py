"""A run: its config and folder, its length, progress and timing."""

import math
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from dlopt import schedules
from dlopt.basics.errors import UserError
from dlopt.config.run_config import RunConfig, Settings
from dlopt.data.batches import Batch, Batches
from dlopt.metrics.names import Metric, tag_of
from dlopt.metrics.sums import MetricSum
from dlopt.parallel.step_timing import StepTiming
from dlopt.training.batch_growth import BatchGrowth, batch_growth
from dlopt.training.checkpoint.content import Checkpoint
from dlopt.training.step import EpochBatches
from dlopt.training.throughput import ON_CPU, Throughput

Status = Literal["finished", "stopped_early", "interrupted"]

_ZERO = 1e-12  # learning-rate factors below are rounding errors of 0


@dataclass(frozen=True)
class TrainingRun:
    """A config and the folder of its run, which `train_run` trains; `dlopt.python.runs.Run` is a run as read."""

    run_config: RunConfig
    folder: Path
    checkpoint: Checkpoint | None = None  # to resume from
    choices: Mapping[str, str] = field(default_factory=dict)  # config group -> choice, for display
    overrides: Sequence[str] | None = None  # of the command line; None if the folder already describes the run


@dataclass(frozen=True)
class Length:
    """Length of a run. Updates are batches of data.batch_size, unless the batch grows; then the two differ."""

    steps: int  # updates
    epochs: int  # the last one may be partial
    steps_per_epoch: int  # batches of an epoch
    horizon: int  # batches over which the schedule runs
    done: int = 0  # updates of the checkpoint from which the run resumes
    growth: BatchGrowth | None = None

    def batches(self, steps: int) -> int:
        """Returns the batches of the first `steps` updates."""
        return steps if self.growth is None else self.growth.batches(steps)


def length_of_run(settings: Settings, batches: Batches, checkpoint: Checkpoint | None) -> Length:
    """Computes the length of a run with these training batches, resumed from a checkpoint or new.

    Raises `UserError` for a batch that grows beyond an epoch.
    """
    if settings.batch_growth is None:
        return run_length(settings, len(batches), checkpoint)
    per_epoch, done, t = len(batches), 0, 0
    if checkpoint is not None:
        done, t = checkpoint.step, checkpoint.epoch * per_epoch + checkpoint.position
    growth = batch_growth(settings.batch_growth, batches, (done, t))
    if settings.steps is not None:
        steps, end = settings.steps, growth.batches(settings.steps)
    else:
        end = settings.epochs * per_epoch
        steps = growth.updates(end) if end >= t else done - 1  # fewer than done: refused later
    if settings.schedule_epochs is not None:
        horizon = round(settings.schedule_epochs * per_epoch)
    else:
        horizon = end if checkpoint is None else checkpoint.horizon
    return Length(steps, math.ceil(end / per_epoch), per_epoch, horizon, done, growth)


def run_length(settings: Settings, steps_per_epoch: int, checkpoint: Checkpoint | None) -> Length:
    """Computes the length of a run whose batch does not grow.

    A run that is resumed with more epochs keeps its schedule, unless `schedule_epochs` is set.
    """
    steps = settings.steps if settings.steps is not None else settings.epochs * steps_per_epoch
    horizon = steps if settings.schedule_epochs is None else round(settings.schedule_epochs * steps_per_epoch)
    epochs = first = done = 0
    if checkpoint is not None:
        # After steps=N within an epoch, the next update is the first of another one.
        epochs, done = checkpoint.epoch, checkpoint.step
        first = done - checkpoint.position
        horizon = checkpoint.horizon if settings.schedule_epochs is None else horizon
    # From the first update of the epoch in which the checkpoint lies: this epoch counts as a whole one.
    epochs += max(math.ceil((steps - first) / steps_per_epoch), 0)
    return Length(steps, epochs, steps_per_epoch, horizon, done)


def check_horizon(
    run_config: RunConfig, length: Length, checkpoint: Checkpoint, typed: Sequence[str] | None = None
) -> str | None:
    """Compares the length of a run resumed from `checkpoint` with its schedule's; returns a line if they differ.

    Raises `UserError` if the checkpoint is later than the end, or if all updates after the end of the schedule would
    have learning rate 0, with the command that stretches it if the command line is `typed`. Whoever sets
    `schedule_epochs` has chosen the horizon.
    """
    settings, steps, horizon = run_config.settings, length.batches(length.steps), length.horizon
    key = f"epochs={settings.epochs}" if settings.steps is None else f"steps={settings.steps}"
    if length.steps < checkpoint.step:
        epochs_done = length.batches(checkpoint.step) / length.steps_per_epoch
        done = f"{epochs_done:.6g} epochs" if settings.steps is None else checkpoint.step
        raise UserError(f"{key}: this run has already done {done}; set a larger number, or train in another folder")
    if settings.schedule_epochs is not None or steps == horizon or length.steps <= checkpoint.step:
        return None
    factor = schedules.build(
        run_config.build_schedule, run_config.warmup, steps=horizon, steps_per_epoch=length.steps_per_epoch
    )
    if factor(horizon + 1) != factor(horizon):  # the schedule has no end
        return None
    end, schedule_end = (f"{count / length.steps_per_epoch:.6g}" for count in (steps, horizon))
    final = factor(horizon)
    if steps < horizon:
        last = factor(steps - 1)
        line = f"{key}: the schedule ends at epoch {schedule_end}, the run at epoch {end} with {last:.3g} of the peak "
        return None if last == final else f"{line}learning rate; to shorten the schedule, set schedule_epochs={end}"
    later = [*range(horizon, steps, length.steps_per_epoch), steps - 1]
    if all(factor(step) < _ZERO for step in later):
        words = [] if typed is None else ["dlopt", "train", *typed, f"schedule_epochs={end}"]
        command = f": {shlex.join(words)}" if words else ""
        raise UserError(
            f"{key}: the schedule of this run ends at epoch {schedule_end} with learning rate 0, so later epochs would "
            f"not change the weights; set schedule_epochs={end} to stretch the schedule, or "
            f"schedule_epochs={schedule_end} to train on at 0{command}"
        )
    line = f"{key}: the schedule ends at epoch {schedule_end}; later epochs have {final:.3g} of the peak learning rate"
    return None if final == 1.0 else f"{line}; to stretch the schedule, set schedule_epochs={end}"


def check_lengthened(run_config: RunConfig, checkpoint: Checkpoint) -> None:
    """Like `check_horizon`, before the data is read; only for checkpoints at the end of an epoch."""
    if checkpoint.epoch and not checkpoint.position and run_config.settings.batch_growth is None:
        steps_per_epoch = -(-checkpoint.step // checkpoint.epoch)  # steps=N may have ended the last epoch early
        check_horizon(run_config, run_length(run_config.settings, steps_per_epoch, checkpoint), checkpoint)


def evaluation_interval(settings: Settings, length: Length) -> int | None:
    """Returns the updates between evaluations within an epoch. Raises `UserError` if none would be within one."""
    every, shortest = settings.evaluate.every_steps, min(length.steps_per_epoch, length.steps)
    if every is not None and every >= shortest:
        whole = "epoch" if shortest == length.steps_per_epoch else "run"
        raise UserError(
            f"evaluate.every_steps={every}: the {whole} has only {shortest} updates, and is evaluated at its end; "
            "set a smaller number, or evaluate.every_steps=null"
        )
    return every


@dataclass
class Progress:
    """State of a run's loop, for checkpoints."""

    epoch: int = 0  # completed epochs
    position: int = 0  # completed batches of the current epoch
    step: int = 0  # completed updates
    seconds: float = 0.0
    samples: int | None = 0  # of the updates, of all processes; None: of a checkpoint that does not count them
    evaluated_samples: int | None = 0  # forward and backward; None if an optimizer also computes other things of them
    peak_memory: int = 0  # bytes, of the process that needed most
    horizon: int = 0  # batches over which the schedule runs
    steps_per_epoch: int = 0  # batches of an epoch
    resumed_from: list[int] = field(default_factory=list)
    data: Mapping[str, Any] = field(default_factory=dict)  # see `build.data_spec`
    found_lr: float | None = None  # learning rate of a range test
    evaluated: float = 0  # epoch of the latest line of metrics.jsonl; a fraction within an epoch

    def count(self, samples: int, passes: int | None) -> None:
        """Counts the samples of an update. `passes`: see `Step.passes`."""
        unknown = self.evaluated_samples is None or passes is None
        self.evaluated_samples = None if unknown else (self.evaluated_samples or 0) + samples * (passes or 0)
        self.samples = None if self.samples is None else self.samples + samples


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
            step += 1
        epoch, position = epoch + 1, 0
