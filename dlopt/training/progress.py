"""How far a run is, how long it is, and what time it takes."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dlopt.config.experiment import Settings
from dlopt.parallel.pace import StepTiming

if TYPE_CHECKING:
    from dlopt.training.trainer import Trainer


@dataclass(frozen=True)
class Length:
    """How long a run is."""

    steps: int  # updates
    epochs: int  # the last one may be partial
    steps_per_epoch: int
    horizon: int  # updates over which the schedule runs


def length_of(settings: Settings, steps_per_epoch: int, state: Mapping[str, Any] | None) -> Length:
    """`state`: of the checkpoint to resume from. A longer run keeps its schedule unless `schedule_epochs` is set."""
    steps = settings.steps if settings.steps is not None else settings.epochs * steps_per_epoch
    horizon = steps if settings.schedule_epochs is None else round(settings.schedule_epochs * steps_per_epoch)
    if state is not None and settings.schedule_epochs is None:
        horizon = state["progress"]["horizon"]
    return Length(steps, math.ceil(steps / steps_per_epoch), steps_per_epoch, horizon)


@dataclass
class Progress:
    """Where a run is. `position` counts the batches done in the current epoch."""

    epoch: int = 0
    position: int = 0
    step: int = 0
    seconds: float = 0.0
    horizon: int = 0  # updates over which the schedule runs
    resumed_from: list[int] = field(default_factory=list)
    data: Mapping[str, Any] = field(default_factory=dict)  # facts for using the model without its data
    found_lr: float | None = None  # by a range test


@dataclass(frozen=True)
class Intervals:
    """How long a run is, and how often it does what."""

    steps: int  # updates of the whole run
    evaluate_every: int = 1  # epochs
    save_every_epochs: int | None = 1
    save_every_steps: int | None = None
    log_every_steps: int | None = None
    snapshot: Callable[[int], str | None] | None = None  # updates done -> name of a checkpoint that is kept for good


class Clock:
    """Training time, and the metrics of a logging point."""

    def __init__(self, trainer: "Trainer") -> None:
        self.trainer = trainer
        self.timing: StepTiming | None = trainer.mode.step_timing()
        self._since = time.perf_counter()
        self._restart()

    def _restart(self) -> None:
        self._log_since = self._since
        self._count = self.trainer.sums.count
        if self.timing is not None:
            self.timing.restart(self.trainer.progress.step)

    def stop(self) -> None:
        """Adds the time since the last call to the run's."""
        now = time.perf_counter()
        self.trainer.progress.seconds += now - self._since
        self._since = now
        self.trainer.sums.settle()
        self._restart()

    def metrics(self) -> dict[str, float]:
        trainer, sums = self.trainer, self.trainer.sums
        metrics = {"lr": float(trainer.step.rate)} | sums.since_last("train/")
        if trainer.step.norm is not None:
            metrics["grad_norm/global"] = float(trainer.step.norm)
        now = time.perf_counter()
        metrics["throughput/samples_per_second"] = (sums.count - self._count) / max(now - self._log_since, 1e-9)
        self._log_since, self._count = now, sums.count
        return metrics if self.timing is None else {**metrics, **self.timing.metrics(trainer.progress.step)}
