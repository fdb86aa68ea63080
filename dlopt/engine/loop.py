"""The loop: epochs of updates, an evaluation after each, checkpoints between."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dlopt.engine import rng
from dlopt.engine.averaging import ExponentialAverage, at_evaluation_point
from dlopt.engine.checkpoint import Checkpoints
from dlopt.engine.divergence import Diverged
from dlopt.engine.metrics import Sums
from dlopt.engine.recovery import Recovery
from dlopt.engine.step import Update
from dlopt.engine.stopping import Best, Stopping
from dlopt.errors import RunError, UserError
from dlopt.interruption import Interruption
from dlopt.parallel.single import Whole

log = logging.getLogger(__name__)

Status = Literal["finished", "stopped_early", "interrupted"]


class Batches(Protocol):
    def __len__(self) -> int: ...

    def epoch(self, epoch: int, start: int = 0, step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """(inputs, targets) of one epoch from batch `start` on, which belongs to update `step`."""
        ...


class Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class States(Protocol):
    """How states of a model that may be spread over processes are saved and loaded (`dlopt.parallel.single`)."""

    def gathered(self, state: dict[str, Any]) -> dict[str, Any]: ...
    def load_model(self, model: nn.Module, state: Mapping[str, Any]) -> None: ...
    def load_optimizer(self, optimizer: Optimizer, state: Mapping[str, Any]) -> None: ...


class Pace(Protocol):
    def restart(self, step: int) -> None: ...
    def figures(self, step: int) -> Mapping[str, float]: ...


class Tracking(Protocol):
    def advance(self, step: int) -> None: ...
    def step(self, step: int, values: Mapping[str, float]) -> None: ...
    def epoch(self, metrics: Mapping[str, Any], *, best: bool = False) -> None: ...
    def rewind(self, epoch: int, step: int) -> None: ...


@dataclass
class Progress:
    """Where a run stands. `position` counts the batches done in the current epoch."""

    epoch: int = 0
    position: int = 0
    step: int = 0
    seconds: float = 0.0
    horizon: int = 0  # updates over which the schedule runs
    resumed_from: list[int] = field(default_factory=list)
    data: Mapping[str, Any] = field(default_factory=dict)  # what using the model without its data needs to know
    found_lr: float | None = None  # the learning rate where it was to be found


@dataclass
class Training:
    """All that the loop works on; `state_dict` is all that a checkpoint needs besides the config."""

    module: nn.Module
    update: Update
    batches: Batches
    validate: Callable[[Interruption], dict[str, float] | None] | None  # None: interrupted
    tracking: Tracking
    checkpoints: Checkpoints
    stopping: Stopping
    best: Best
    average: ExponentialAverage | None
    normalize: nn.Module
    config: Mapping[str, Any]
    steps: int  # updates of the whole run
    epochs: int  # the last epoch may be a part of one
    evaluate_every: int
    save_every_epochs: int | None
    save_every_steps: int | None
    log_every_steps: int | None
    landmark: Callable[[int], str | None] | None = None  # the name of what is kept for good after so many updates
    progress: Progress = field(default_factory=Progress)
    sums: Sums = field(default_factory=lambda: Sums(classify=True))
    states: States = field(default_factory=Whole)
    sampler: Stateful | None = None  # where the order of the samples depends on more than seed and epoch
    figures: Callable[[], Mapping[str, float]] = dict  # more of them at the end of an epoch
    pace: Pace | None = None  # of several ranks: how long each works by itself
    recovery: Recovery | None = None  # None: what is not finite ends the run

    def state_dict(self) -> dict[str, Any]:
        closure = self.update.closure
        return {
            "model": self._saved(self.module.state_dict()),
            "optimizer": self._saved(closure.optimizer.state_dict()),
            "schedule": self.update.schedule.state_dict(),
            "ema": self._evaluated_weights(),
            "rng": rng.state(),
            "progress": {
                **vars(self.progress),
                "lr": float(self.update.rate),
                "sums": self.sums.state_dict(),
                "sampler": None if self.sampler is None else self.sampler.state_dict(),  # behind what the sums tell it
                "stopping": self.stopping.state_dict(),
                "best": self.best.state_dict(),
                "scaler": None if closure.scaler is None else closure.scaler.state_dict(),
                "recovery": None if self.recovery is None else self.recovery.state_dict(),
                "accumulate": closure.accumulate,
            },
            "config": dict(self.config),
            "normalize": self.normalize.state_dict(),
        }

    def _saved(self, state: dict[str, Any]) -> dict[str, Any]:
        """With whole tensors, unless every process writes what it has of them."""
        return self.states.gathered(state) if self.checkpoints.shards is None else state

    def _evaluated_weights(self) -> dict[str, Any] | None:
        """The weights that are validated and tested, where these are not the model's own."""
        optimizer = self.update.closure.optimizer
        if self.average is None and not hasattr(optimizer, "eval"):
            return None
        with at_evaluation_point(optimizer, self.average):
            weights = self._saved(self.module.state_dict())
            return {name: value.clone() for name, value in weights.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes back to where `state` was taken. The normalization is not touched: it comes before everything else."""
        closure = self.update.closure
        progress = dict(state["progress"])
        if self.average is not None:
            self.states.load_model(self.module, state["ema"])
            self.average.restart()
        self.states.load_model(self.module, state["model"])
        self.load_optimizer(state["optimizer"])
        self.update.schedule.load_state_dict(state["schedule"])
        self.sums.load_state_dict(progress.pop("sums"))
        sampler = progress.pop("sampler", None)
        if self.sampler is not None and sampler is not None:
            self.sampler.load_state_dict(sampler)
        self.stopping.load_state_dict(progress.pop("stopping"))
        self.best.load_state_dict(progress.pop("best"))
        self.update.rate = progress.pop("lr")
        scaler = progress.pop("scaler")
        if closure.scaler is not None and scaler is not None:
            closure.scaler.load_state_dict(scaler)
        recovery, accumulate = progress.pop("recovery", None), progress.pop("accumulate", 1)
        if self.recovery is not None and recovery is not None:
            self.recovery.load_state_dict(recovery)
        if closure.halves:
            closure.accumulate = max(closure.accumulate, accumulate)  # what did not fit will not fit now
        self.progress = Progress(**{**progress, "horizon": self.progress.horizon, "data": self.progress.data})
        if self.best.epoch == self.progress.epoch and self.progress.position == 0:
            self.checkpoints.restore_best(dict(state))
        if self.best.epoch is not None and not self.checkpoints.has_best():
            log.warning("the best model so far, of epoch %d, did not come along: epochs to come count", self.best.epoch)
            self.best = Best(self.best.monitor)
        self.progress.resumed_from = [*self.progress.resumed_from, self.progress.step]
        rng.restore(state["rng"])

    def load_optimizer(self, state: Mapping[str, Any]) -> None:
        """Which kernels do the update stays a matter of this process, its device and mode, and not the checkpoint's."""
        optimizer, kernels = self.update.closure.optimizer, ("fused", "foreach", "capturable")
        own = [{key: group[key] for key in kernels if key in group} for group in optimizer.param_groups]
        groups = [{**saved, **mine} for saved, mine in zip(state["param_groups"], own, strict=True)]
        self.states.load_optimizer(optimizer, {**state, "param_groups": groups})

    def save(self, *, best: bool = False) -> None:
        """Writes a checkpoint. Raises `Diverged` instead where the weights are not finite."""
        self.update.check_weights()
        self.checkpoints.save(self.state_dict(), best=best, landmark=self._landmark())

    def save_is_due(self) -> bool:
        """Whether the updates done call for a checkpoint, wherever in an epoch they are."""
        step, every = self.progress.step, self.save_every_steps
        return (every is not None and step % every == 0) or self._landmark() is not None

    def _landmark(self) -> str | None:
        return None if self.landmark is None else self.landmark(self.progress.step)

    def go_back(self, error: Diverged) -> None:
        """To the newest checkpoint, with a smaller learning rate; raises `error` where that is not wanted."""
        recovery = self.recovery
        if recovery is None:
            raise error
        state = recovery.goal(error)
        counted, resumed_from = recovery.state_dict(), self.progress.resumed_from
        self.update.watch.forget()
        self.sums = self.sums.fresh()
        self.load_state_dict(state)
        self.progress.resumed_from = resumed_from
        # The checkpoint may itself be of a time behind some rollbacks.
        self.update.schedule.scale(counted["lr_scale"] / recovery.lr_scale)  # type: ignore[attr-defined]
        recovery.load_state_dict(counted)
        self.tracking.rewind(self.progress.epoch, self.progress.step)


def fit(training: Training, interruption: Interruption) -> Status:
    """Trains from `training.progress` on. Returns why it ended; the newest checkpoint is on disk in any case.

    Input found to be wrong (a damaged image) is the user's error before the first update, and the run's later.
    """
    start = training.progress.step
    try:
        return _recovering(training, interruption)
    except UserError as error:
        _finish_saving(training)
        if training.progress.step == start:
            raise
        raise RunError(str(error)) from error
    except torch.OutOfMemoryError as error:
        _finish_saving(training)
        told = str(error).split(". ")[0]
        raise RunError(
            f"out of memory on the device at update {training.progress.step + 1} ({told}); "
            "use a larger accumulate, on_out_of_memory=halve, or a smaller data.batch_size"
        ) from error
    except Exception:  # and not what ends a run at once
        _finish_saving(training)
        raise


def _finish_saving(training: Training) -> None:
    """Of a training that has failed: that is told, and not what came of its last save."""
    with contextlib.suppress(RunError):
        training.checkpoints.settle()


def _recovering(training: Training, interruption: Interruption) -> Status:
    recovery = training.recovery
    if recovery is not None and recovery.policy == "rollback" and recovery.newest() is None:
        training.save()  # something to go back to
    while True:
        try:
            status = _fit(training, interruption)
            training.checkpoints.settle()
            return status
        except Diverged as error:
            training.go_back(error)


def _fit(training: Training, interruption: Interruption) -> Status:
    t, progress, update, tracking = training, training.progress, training.update, training.tracking
    t.module.train()
    clock = _Clock(t)
    if t.stopping.met and progress.position == 0 and progress.step < t.steps:
        return "stopped_early"  # the kill came between the last checkpoint and the summary
    while progress.step < t.steps or progress.position > 0:
        for inputs, targets in t.batches.epoch(progress.epoch, progress.position, progress.step):
            if progress.step == t.steps or t.stopping.met:
                break  # resumed behind the last update, whose evaluation was interrupted
            logging = t.log_every_steps is not None and (progress.step + 1) % t.log_every_steps == 0
            update.closure.norm_wanted = logging
            update(inputs, targets, progress.step, t.sums)
            progress.step += 1
            progress.position += 1
            tracking.advance(progress.step)
            if logging:
                update.check()
                tracking.step(progress.step, clock.figures())
            if interruption or t.stopping.met:
                break
            if t.save_is_due():
                clock.stop()
                t.save()
        update.check_weights()
        if interruption or not _end_epoch(t, clock, interruption):
            clock.stop()
            t.save()
            return "interrupted"
        if t.stopping.met and progress.step < t.steps:
            return "stopped_early"
    return "finished"


def _end_epoch(t: Training, clock: "_Clock", interruption: Interruption) -> bool:
    """Evaluates, lets stopping and schedule see the figures, and saves, each where it is due.

    False when the evaluation was interrupted: nothing has changed then, and the resumed run evaluates again.
    """
    progress, epoch = t.progress, t.progress.epoch + 1
    last = progress.step >= t.steps or t.stopping.met
    evaluated = last or epoch % t.evaluate_every == 0
    metrics: dict[str, Any] = {
        "epoch": epoch,
        "step": progress.step,
        "lr": float(t.update.rate),
        **t.sums.means("train"),
        **t.figures(),
    }
    if evaluated and t.validate is not None:
        figures = t.validate(interruption)
        if figures is None:
            return False
        metrics |= figures
    t.sums = t.sums.fresh()
    progress.epoch, progress.position = epoch, 0
    clock.stop()
    improved = False
    if evaluated:
        metrics["seconds"] = progress.seconds
        if t.validate is not None:
            improved = t.best.update(metrics)
            t.stopping.update(metrics)
            t.update.schedule.update(metrics)  # type: ignore[attr-defined]
        t.tracking.epoch(metrics, best=improved)
    due = t.save_every_epochs is not None and epoch % t.save_every_epochs == 0
    if improved or due or last or t.stopping.met:
        t.save(best=improved)
        clock.stop()
    return True


class _Clock:
    """Training time, and the figures of a logging point."""

    def __init__(self, training: Training) -> None:
        self.training = training
        self._since = self._log_since = time.perf_counter()
        self._count = training.sums.count
        if training.pace is not None:
            training.pace.restart(training.progress.step)

    def stop(self) -> None:
        """Books the time since the last call to the run."""
        now = time.perf_counter()
        self.training.progress.seconds += now - self._since
        self._since = self._log_since = now
        self.training.sums.settle()
        self._count = self.training.sums.count
        if self.training.pace is not None:
            self.training.pace.restart(self.training.progress.step)

    def figures(self) -> dict[str, float]:
        t = self.training
        figures = {"lr": float(t.update.rate)} | t.sums.since_last("train/")
        if t.update.closure.norm is not None:
            figures["grad_norm/global"] = float(t.update.closure.norm)
        now = time.perf_counter()
        figures["throughput/samples_per_second"] = (t.sums.count - self._count) / max(now - self._log_since, 1e-9)
        self._log_since, self._count = now, t.sums.count
        return figures if t.pace is None else {**figures, **t.pace.figures(t.progress.step)}
