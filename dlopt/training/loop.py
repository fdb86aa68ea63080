"""The training loop (`Trainer.fit`) and the content of a checkpoint (`Trainer.state_dict`).

`builders/trainer.py` builds a trainer; `Step.update` (`step.py`) is one update.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from dlopt.basics.errors import RunError, UserError
from dlopt.basics.interruption import Interruption
from dlopt.basics.length import NO_BATCHES, EpochCount, Length, UpdateCount
from dlopt.data.batches import Batch
from dlopt.data.samplers import LossAwareSampler, MeasuredSampler, Sampler
from dlopt.machine.memory import frozen_objects, process_memory
from dlopt.metrics.sums import MetricSum
from dlopt.optim.traits import is_schedule_free
from dlopt.parallel.mode import Mode
from dlopt.parallel.shards import local
from dlopt.tracking.tracking import Tracking
from dlopt.training import rng
from dlopt.training.averaging import WeightAverage, evaluation_weights
from dlopt.training.batch_norm import LaggingStatistics
from dlopt.training.checkpoint.checkpoints import Checkpoints
from dlopt.training.checkpoint.content import Checkpoint, unreadable
from dlopt.training.evaluate import Validate
from dlopt.training.nonfinite import Recovery
from dlopt.training.progress import Clock, Intervals, Progress, Status
from dlopt.training.step import EpochBatches, Step, UpdateFunction
from dlopt.training.stopping import Best, Stopping
from dlopt.training.user_observers import NO_OBSERVERS, UserObservers

log = logging.getLogger(__name__)


class _InterruptedError(Exception):
    """The run stops here, between two updates or within an evaluation."""


def _interrupt_if(stop: Interruption) -> None:
    """Raises `_InterruptedError` if the run is to stop."""
    if stop:
        raise _InterruptedError


@dataclass
class Trainer:
    """A run in progress. `fit` is the training loop; `state_dict` is the content of a checkpoint."""

    # The updates
    step: Step
    run_update: UpdateFunction  # `step.update`, with what the run needs around it: see `around.py`
    batches: EpochBatches
    length: Length
    # What follows from evaluations and non-finite values
    intervals: Intervals
    validate: Validate | None
    best: Best
    stopping: Stopping
    recovery: Recovery
    # What is measured, and where it goes
    train_metrics: MetricSum
    tracking: Tracking
    checkpoints: Checkpoints
    # What belongs to a checkpoint only
    normalize: nn.Module
    config: Mapping[str, Any]
    average: WeightAverage | None = None
    sampler: Sampler | None = None  # of `batches`, which may have metrics, and a state if it is loss-aware

    progress: Progress = field(default_factory=Progress)
    clock: Callable[[Progress, MetricSum], Clock] = Clock  # starts a clock, now
    user_observers: UserObservers = NO_OBSERVERS
    lagging: LaggingStatistics | None = None  # None if evaluations have exact statistics
    graph_obstacle: str | None = None  # why updates are not replayed from a CUDA graph; None if they are
    _collect_garbage: Callable[[], object] = field(default=lambda: None, init=False)  # set by `fit`

    @property
    def module(self) -> nn.Module:
        return self.step.module

    @property
    def mode(self) -> Mode:
        return self.step.mode

    # -- the loop

    def fit(self, stop: Interruption, defer: Callable[[], None] = lambda: None) -> Status:
        """Trains from `progress` until the last update, early stopping, or `stop`; the last checkpoint is then on disk.

        `stop` becomes true on all ranks at the same update. It is read between updates only: a signal never interrupts
        an update but the first, which may compile the model for minutes; `defer` is called after each. Invalid data (a
        damaged image) raises `UserError` before the first update, and `RunError` later.
        """
        progress, log_every = self.progress, self.intervals.log_every_steps
        first = progress.step + 1
        # On a GPU, reference cycles of earlier runs in this process (CUDA graphs) may hold gigabytes.
        frozen = frozen_objects(collect_first=self.mode.device.type == "cuda")
        with self._error_handling(), frozen as self._collect_garbage:
            self._save_resumed()
            clock = self.clock(progress, self.train_metrics)
            try:
                while not self._is_over():
                    self.module.train()
                    # A run that resumes just before an evaluation within the epoch, or during it, evaluates first.
                    if self._is_evaluation_due():
                        self._evaluate(clock, stop, ends_epoch=False)

                    for batch in self._rest_of_epoch():
                        # 1. Update.
                        is_last = progress.step + 1 == self.length.updates
                        logs = log_every is not None and (is_last or (progress.step + 1) % log_every == 0)
                        result = self.run_update(batch, progress.step, log_norm=logs)
                        progress.count(batch.count, batch.total, self.step.passes)
                        defer()
                        if progress.step == first:
                            self._refuse_unreadable()
                        self.tracking.advance(progress.step)
                        if result.loss is not None:
                            self.user_observers.after_update(progress.step, result.loss, self.module)

                        # 2. Check and log. Both wait for the device, at logging points only: if the host waited in
                        #    every update, it could not queue the next one meanwhile.
                        if logs:
                            self.step.check_updates()  # before metrics that may be NaN are logged
                            self.tracking.step(progress.step, clock.metrics(self._rates(), result.norm))

                        # 3. Stop, evaluate or save. Between updates only: all ranks have counted the same updates
                        #    when they read the flag, and a checkpoint never holds half an update.
                        _interrupt_if(stop)
                        if self.stopping.should_stop:
                            break
                        if self._is_evaluation_due():
                            # Before the evaluation, which waits for the device anyway: NaN weights are not evaluated.
                            self.step.check_weights()
                            self._evaluate(clock, stop, ends_epoch=False)
                        elif self._is_save_due():
                            clock.stop()
                            self.save()
                            clock.stop(training=False)

                    # 4. End the epoch, unless an evaluation within it has stopped the run and ended it.
                    self.step.check_weights()
                    _interrupt_if(stop)
                    if progress.position > 0:
                        self._evaluate(clock, stop, ends_epoch=True)
            except _InterruptedError:  # saved as it is: its time is limited, and it resumes right here
                clock.stop()
                self.save()
                return "interrupted"
            if progress.step >= self.length.updates:
                return "finished"
            if log_every is not None and progress.step % log_every:
                self.tracking.step(progress.step, clock.training_metrics(self._rates()))
            return "stopped_early"

    def _is_over(self) -> bool:
        """Returns whether the run has ended: after its last update, or where the stopping rule says so.

        Not within an epoch: the run was interrupted before it evaluated that.
        """
        is_last = self.progress.step >= self.length.updates
        return self.progress.position == 0 and (is_last or self.stopping.should_stop)

    def _rest_of_epoch(self) -> Iterator[Batch]:
        """Yields the batches of the updates that are left in this epoch, until the run ends."""
        progress = self.progress
        for batch in self.batches.epoch(progress.epoch, progress.position, progress.step):
            if progress.step >= self.length.updates or self.stopping.should_stop:
                return
            yield batch

    def _save_resumed(self) -> None:
        """Saves a run that was resumed in a new folder: it then has a checkpoint to resume from."""
        # Rank 0 looks for the file, because other nodes may not see the folder; then all ranks save together.
        if self.progress.resumed_from and not self.mode.ranks.broadcast(self.checkpoints.last.exists()):
            self.save()

    def _evaluate(self, clock: Clock, stop: Interruption, *, ends_epoch: bool) -> None:
        """Evaluates, updates best model, stopping rule and schedule, logs, and saves, each if due.

        `ends_epoch`: whether all updates of the epoch are done. An evaluation within an epoch that stops the run ends
        the epoch, too. Raises `_InterruptedError` with the state unchanged: a resumed run evaluates again.
        """
        # 1. Measure.
        progress, intervals, epoch = self.progress, self.intervals, self.progress.epoch + 1
        is_last = ends_epoch and (progress.step >= self.length.updates or self.stopping.should_stop)
        is_evaluated = not ends_epoch or is_last or epoch % intervals.evaluate_every == 0
        metrics: dict[str, Any] = {"epoch": epoch if ends_epoch else self._fractional_epoch(), "step": progress.step}
        throughput = self._measure(metrics, clock, stop if is_evaluated else None)

        # 2. Decide whether the run stops, and the epoch ends.
        if is_evaluated and self.validate is not None:
            self.stopping.update(metrics)
        if self.stopping.should_stop:
            ends_epoch, metrics["epoch"] = True, epoch
        if ends_epoch:
            if intervals.log_every_steps is None:
                self.train_metrics.clear()
            else:
                self.train_metrics.start_epoch()  # a logging interval may begin in one epoch and end in the next
            progress.epoch, progress.position = epoch, NO_BATCHES
        clock.stop(training=False)

        # 3. Record: log first, then save. The checkpoint contains the updated stopping rule, schedule and best epoch,
        #    and metrics.jsonl has the line of this evaluation. A run that is killed in between removes the line when
        #    it resumes, and writes it again; in the other order the line would be missing for good.
        improved = False
        self.checkpoints.refuse_moved()
        if is_evaluated:
            progress.evaluated = metrics["epoch"]
            metrics |= {"seconds": progress.seconds, **throughput}
            if self.validate is not None:
                improved = self.best.update(metrics)
                self.step.schedule.update(metrics)
            self.tracking.epoch(metrics, improved=improved, best=self.best.metrics)
            if self.lagging is not None:
                self.lagging.explain(metrics, self.tracking.message)
            self.user_observers.after_evaluation(metrics)
        every = intervals.save_every_epochs
        is_save_due = every is not None and epoch % every == 0 if ends_epoch else self._is_save_due()
        if improved or is_save_due or is_last or self.stopping.should_stop:
            self.save(best=improved)
            clock.stop(training=False)

    def _measure(self, metrics: dict[str, Any], clock: Clock, stop: Interruption | None) -> dict[str, float]:
        """Adds the metrics of training, and of validation unless `stop` is None; returns those of the throughput.

        Raises `_InterruptedError`.
        """
        metrics |= self.step.cost() | self._rates()
        # Waits for the device and, with several ranks, sums over them: all ranks evaluate after the same update.
        metrics |= self.train_metrics.means("train")
        metrics |= self.sampler.metrics() if isinstance(self.sampler, MeasuredSampler) else {}
        clock.stop()
        throughput = clock.epoch_metrics()
        self._collect_garbage()
        if stop is not None and self.validate is not None:
            if (validation := self.validate(stop)) is None:
                raise _InterruptedError
            metrics |= validation
            self.train_metrics.warn_if_not_finite(metrics, "val_loss", self.tracking.message)
        return throughput

    def _rates(self) -> dict[str, float]:
        """Returns what the schedules have set for the latest update: lr, weight_decay unless constant, momentum."""
        latest, schedule = self.length.batches(UpdateCount(self.progress.step - 1)), self.step.schedule
        others = {"weight_decay": schedule.weight_decay(latest), "momentum": schedule.momentum(latest)}
        return {"lr": float(self.step.rate), **{key: value for key, value in others.items() if value is not None}}

    def _fractional_epoch(self) -> EpochCount:
        """Returns completed epochs, with the fraction of the current one."""
        return EpochCount(self.progress.epoch + self.length.epochs_of(self.progress.position))

    def _is_evaluation_due(self) -> bool:
        """Returns whether to evaluate after this update, within an epoch; at its end, and the run's, `fit` evaluates.

        False after the evaluation: a run that was interrupted before it, or during it, resumes with it.
        """
        progress, length, every = self.progress, self.length, self.intervals.evaluate_every_steps
        if every is None or progress.step % every or progress.step >= length.updates:
            return False
        return 0 < progress.position < length.per_epoch and progress.evaluated != self._fractional_epoch()

    @contextlib.contextmanager
    def _error_handling(self) -> Iterator[None]:
        """Waits for asynchronous saves, and turns expected exceptions into a `RunError` that says what to do."""
        start = self.progress.step
        try:
            yield
            self.checkpoints.wait()
        except Exception as error:  # not KeyboardInterrupt and SystemExit, which end the process without waiting
            with contextlib.suppress(RunError):  # report the first error, not that of a save
                self.checkpoints.wait()
            if isinstance(error, UserError) and self.progress.step > start:
                raise RunError(str(error)) from error
            if isinstance(error, torch.OutOfMemoryError):
                raise RunError(
                    f"out of memory on the device at update {self.progress.step + 1} ({str(error).split('. ')[0]}); "
                    "use a larger accumulate, on_out_of_memory=halve, or a smaller data.batch_size"
                ) from error
            raise

    # -- saving and resuming

    def save(self, *, best: bool = False) -> None:
        """Writes a checkpoint. Raises `Diverged` if the weights are not finite: a checkpoint never contains NaN."""
        # All ranks call this: the check and the state of a sharded model are collectives. Then rank 0 writes, or with
        # sharded checkpoints every rank.
        self.step.check_weights()
        self.measure_memory()
        self.checkpoints.save(self.state_dict(), best=best, snapshot=self._snapshot_name())

    def _refuse_unreadable(self) -> None:
        """Raises `RunError` for a state of the optimizer that no checkpoint can hold, before hours of training."""
        state = tree_map_only(Tensor, local, self.step.optimizer.state_dict())
        if (found := unreadable(state, "optimizer")) is not None:
            raise RunError(f"no checkpoint can hold the state of {type(self.step.optimizer).__name__}: {found}")

    def measure_memory(self) -> None:
        """Keeps the peak so far of the process that needed most memory: of a GPU's, else of the process. Collective."""
        device = self.mode.device
        of_gpu = device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(device) if of_gpu else process_memory("VmHWM")
        peak = int(self.mode.ranks.maximum(torch.tensor([peak])))
        self.progress.peak_memory = max(self.progress.peak_memory, peak)

    def _is_save_due(self) -> bool:
        """Returns whether to save after this update, within an epoch."""
        step, every = self.progress.step, self.intervals.save_every_steps
        return (every is not None and step % every == 0) or self._snapshot_name() is not None

    def _snapshot_name(self) -> str | None:
        return None if self.intervals.snapshot is None else self.intervals.snapshot(self.progress.step)

    def state_dict(self) -> dict[str, Any]:
        # First: this flushes the metrics, which updates the sampler, whose state is taken below.
        train_metrics = self.train_metrics.state_dict()
        return {
            "model": self._gathered(self.module.state_dict()),
            "optimizer": self._gathered(self.step.optimizer.state_dict()),
            "schedule": self.step.schedule.state_dict(),
            "ema": self._evaluated_weights(),
            "rng": rng.state(),
            "progress": {
                **vars(self.progress),
                "length": self.length.state_dict(),
                **self.step.state_dict(),
                "sums": train_metrics,
                "sampler": self.sampler.state_dict() if isinstance(self.sampler, LossAwareSampler) else None,
                "stopping": self.stopping.state_dict(),
                "best": self.best.state_dict(),
                "recovery": self.recovery.state_dict(),
            },
            "config": dict(self.config),
            "normalize": self.normalize.state_dict(),
        }

    def _gathered(self, state: dict[str, Any]) -> dict[str, Any]:
        """Gathers full tensors (a collective), unless every rank saves its own shards."""
        return self.mode.sharding.full(state) if self.checkpoints.shards is None else state

    def _evaluated_weights(self) -> dict[str, Any] | None:
        """Returns the weights to validate and test if they differ from the trained ones (EMA, schedule-free)."""
        optimizer = self.step.optimizer
        if self.average is None and not is_schedule_free(type(optimizer)):
            return None
        with evaluation_weights(optimizer, self.average):
            weights = self._gathered(self.module.state_dict())
            return {name: value.clone() for name, value in weights.items()}  # the context restores in place

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores all but the normalization, which `build_workload` has loaded: initial weights may depend on it."""
        progress = state["progress"]
        self._load_weights(state)
        self.load_optimizer(state["optimizer"])
        self.step.schedule.load_state_dict(state["schedule"])
        t = self.length.batches(progress["step"])
        if t != self.step.schedule.last_epoch:  # after steps=N within an epoch, a batch that grows skips the rest of it
            self.step.schedule.step(t)
        self.step.load_state_dict(progress)
        self.train_metrics.load_state_dict(progress["sums"])
        if isinstance(self.sampler, LossAwareSampler) and progress["sampler"] is not None:
            self.sampler.load_state_dict(progress["sampler"])
        self.stopping.load_state_dict(progress["stopping"])
        self.best.load_state_dict(progress["best"])
        self.recovery.load_state_dict(progress["recovery"])
        self.progress = self.progress.resumed(progress)
        self._load_best(state)
        rng.restore(state["rng"])  # last: nothing above may draw random numbers after it

    def _load_weights(self, state: Mapping[str, Any]) -> None:
        """Loads the model and its average, of which the mode shards the full tensors as it shards the model."""
        if self.average is not None:  # loaded through the model, which gets its own weights after it
            self.mode.sharding.load_model(self.module, state["ema"])
            # Skipped updates do not count.
            self.average.restart(state["progress"]["step"] - state["progress"]["recovery"]["skipped"])
        self.mode.sharding.load_model(self.module, state["model"])

    def _load_best(self, state: Mapping[str, Any]) -> None:
        """Restores best.pt if this checkpoint is the best; forgets the best epoch if its file is missing."""
        best, run_id = self.best, self.config.get("run_id")
        if best.epoch is not None and best.epoch == self.progress.evaluated == self._fractional_epoch():
            self.checkpoints.restore_best(Checkpoint(state).with_run_id(run_id))
        # Rank 0 looks for best.pt: other nodes may not see the folder.
        if not self.mode.ranks.broadcast(best.epoch is None or self.checkpoints.has_best(best.epoch, run_id)):
            log.warning("best.pt of epoch %d is missing; the best model is chosen from later epochs", best.epoch)
            self.best = Best(best.monitor, direction=best.direction)

    def load_optimizer(self, state: Mapping[str, Any]) -> None:
        """Loads the optimizer's state, but keeps the choice of kernels, which depends on the device and the mode."""
        optimizer, keys = self.step.optimizer, ("fused", "foreach", "capturable")
        kernels = [{key: group[key] for key in keys if key in group} for group in optimizer.param_groups]
        groups = [{**saved, **kernel} for saved, kernel in zip(state["param_groups"], kernels, strict=True)]
        self.mode.sharding.load_optimizer(optimizer, {**state, "param_groups": groups})
