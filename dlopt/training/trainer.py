"""The story of a run: how it is built, looped over epochs, evaluated, saved, tested and summarized."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from dlopt.config.experiment import Experiment
from dlopt.data.batches import Batches
from dlopt.errors import RunError, UserError
from dlopt.interruption import Interruption
from dlopt.parallel.mode import EpochBatches, Mode
from dlopt.tracking.tracking import Tracking
from dlopt.training import rng
from dlopt.training.averaging import ExponentialAverage, at_evaluation_point
from dlopt.training.batch_norm import check_single_values
from dlopt.training.build import (
    Workload,
    build_workload,
    checkpoint_writer,
    data_facts,
    load_weights,
    loss_aware_sampler,
    parallel_of,
    training_batches,
)
from dlopt.training.checkpoint import Checkpoints, load
from dlopt.training.evaluate import Validate, check_tta, reduction, test_metrics, validation
from dlopt.training.metrics import MetricSum, sample_losses
from dlopt.training.nonfinite import Diverged, Recovery
from dlopt.training.optimizer import build_schedule, build_step, optimizer_of, snapshot_names
from dlopt.training.progress import Clock, Intervals, Length, Progress, length_of
from dlopt.training.reporting import introduce, open_tracking, summarize
from dlopt.training.step import Observer, Step
from dlopt.training.stopping import Best, Stopping

log = logging.getLogger(__name__)

Status = Literal["finished", "stopped_early", "interrupted"]
Observe = Callable[[Workload, Length, Tracking, Path], Sequence[Observer]]
"""Returns what observes the updates of a run of this length, given its folder. Raises `UserError`."""
FindLr = Callable[[Workload, Tracking, Path], float]
"""Returns the learning rate for optimizer.lr=auto. Raises `UserError` where there is none."""


@dataclass(frozen=True)
class Run:
    """What is to be run, and where."""

    experiment: Experiment
    folder: Path
    checkpoint: Mapping[str, Any] | None = None  # to resume from
    choices: Mapping[str, str] = field(default_factory=dict)  # group -> name of the YAML file, for display


def train(
    run: Run,
    interruption: Interruption | None = None,
    *,
    console: bool = True,
    observe: Observe | None = None,
    find_lr: FindLr | None = None,
) -> dict[str, Any]:
    """Trains, tests the best model once, and returns the summary, which is also written to summary.json.

    Stops early when `interruption` becomes true (None: on a signal, or after `max_time`). Raises `UserError` before the
    first update when something cannot work, `RunError` when the run fails later.
    """
    settings = run.experiment.settings
    if interruption is None:
        with Interruption(settings.max_time) as interruption:
            return train(run, interruption, console=console, observe=observe, find_lr=find_lr)
    mode = parallel_of(run.experiment)
    state = mode.broadcast(run.checkpoint)
    workload = build_workload(run.experiment, None if state is None else state["normalize"], parallel=mode)
    batches = training_batches(workload)
    length = length_of(settings, len(batches), state)
    with open_tracking(run, state, console) if mode.is_main else Tracking(None, sinks=[], console=False) as tracking:
        found_lr = None
        if workload.experiment.auto_lr and find_lr is not None:
            found_lr = None if state is None else state["progress"].get("found_lr")
            found_lr = find_lr(workload, tracking, run.folder) if found_lr is None else found_lr
            workload = workload.with_lr(found_lr)
        observers = () if observe is None else observe(workload, length, tracking, run.folder)
        trainer = build_trainer(workload, run.folder, batches, length, tracking, found_lr=found_lr, observers=observers)
        if state is not None:
            trainer.load_state_dict(state)
            trainer.best.load_state_dict(mode.broadcast(trainer.best.state_dict()))  # rank 0 has seen the files
        elif settings.init_from is not None:
            for line in load_weights(workload.module, Path(settings.init_from), mode):
                tracking.message(line)
        introduce(trainer, workload, length, run.choices)
        stop = mode.synchronized_stop(interruption)
        status = trainer.fit(stop)
        summary = summarize(trainer, workload, status)
        if status == "interrupted":
            tracking.message(f"{stop.reason}: stopped; go on with the same command and resume=auto")
        else:
            summary |= _test_best(trainer, workload)
        tracking.finish(summary)
    return summary


def build_trainer(
    workload: Workload,
    folder: Path,
    batches: Batches,
    length: Length,
    tracking: Tracking,
    *,
    found_lr: float | None = None,
    observers: Sequence[Observer] = (),
    checks: bool = True,
) -> "Trainer":
    """Builds optimizer, schedule, step and what surrounds them, for a run that begins in `folder`.

    `found_lr`: of a range test. `checks`: false lets updates pass that are not finite. Raises `UserError` where parts
    do not fit together.
    """
    experiment, settings, mode = workload.experiment, workload.experiment.settings, workload.parallel
    check_single_values(workload)
    check_tta(workload)
    optimizer = optimizer_of(workload)
    sampler = loss_aware_sampler(workload, batches)
    schedule = build_schedule(workload, optimizer, length)
    average = None if settings.ema is None else ExponentialAverage(workload.module, settings.ema)
    stopping: Stopping = experiment.stopping.build(model=workload.module, norm=mode.norm)
    checkpoints = Checkpoints(
        folder / "checkpoints",
        settings.checkpoint.keep,
        writes=mode.is_main,
        asynchronous=settings.checkpoint.asynchronous,
        shards=checkpoint_writer(workload),
    )
    recovery = Recovery(
        settings.on_divergence,
        attempts=settings.recovery.attempts,
        lr_factor=settings.recovery.lr_factor,
        newest=lambda: mode.broadcast(checkpoints.load_newest() if mode.is_main else None),
        tell=tracking.message,
    )
    own_batches = mode.track_batches(batches)
    network = workload.network
    for observer in observers:
        network, own_batches = observer.instrument(network, own_batches)
    step, graph_obstacle = build_step(
        workload,
        network,
        optimizer,
        schedule,
        average=average,
        stopping=stopping,
        skip=recovery.skip if checks and settings.on_divergence == "skip" else None,
        observers=observers if mode.is_main else (),
        checks=checks,
        batch_size=batches.batch_size,
    )
    teach = None
    if sampler is not None:

        def teach(outputs: torch.Tensor, targets: torch.Tensor) -> None:
            sampler.observe(sample_losses(workload.loss, outputs, targets))

    return Trainer(
        step=step,
        batches=own_batches,
        validate=validation(workload, optimizer, average, tracking.evaluating),
        tracking=tracking,
        checkpoints=checkpoints,
        stopping=stopping,
        best=Best(settings.monitor),
        recovery=recovery,
        intervals=Intervals(
            steps=length.steps,
            evaluate_every=settings.evaluate.every_epochs,
            save_every_epochs=settings.checkpoint.every_epochs,
            save_every_steps=settings.checkpoint.every_steps,
            log_every_steps=settings.log_every_steps,
            snapshot=snapshot_names(schedule) if settings.checkpoint.at_restarts else None,
        ),
        normalize=workload.normalize,
        config=experiment.config,
        average=average,
        sampler=sampler,
        sampler_metrics=getattr(batches.sampler, "metrics", dict),
        sums=MetricSum(workload.classify, teach, reduction(workload)),
        progress=Progress(horizon=length.horizon, data=data_facts(workload), found_lr=found_lr),
        graph_obstacle=graph_obstacle,
    )


def dry_run(
    workload: Workload,
    folder: Path,
    state: Mapping[str, Any] | None = None,
    *,
    observers: Sequence[Observer] = (),
    checks: bool = True,
) -> "Trainer":
    """Builds a trainer without output, for probes: `folder` stands where a run's would, and is not written.

    `state`: of a checkpoint, for the length of its run. `checks`: see `build_trainer`.
    """
    batches = training_batches(workload)
    silent = Tracking(None, sinks=[], console=False)
    length = length_of(workload.experiment.settings, len(batches), state)
    return build_trainer(workload, folder, batches, length, silent, observers=observers, checks=checks)


@dataclass
class Trainer:
    """A run in progress; `state_dict` is all that a checkpoint holds."""

    step: Step
    batches: EpochBatches
    validate: Validate | None
    tracking: Tracking
    checkpoints: Checkpoints
    stopping: Stopping
    best: Best
    recovery: Recovery
    intervals: Intervals
    normalize: nn.Module
    config: Mapping[str, Any]
    average: ExponentialAverage | None = None
    sampler: Any = None  # where the order of the samples depends on their losses
    sampler_metrics: Callable[[], Mapping[str, float]] = dict
    sums: MetricSum = field(default_factory=lambda: MetricSum(classify=True))
    progress: Progress = field(default_factory=Progress)
    graph_obstacle: str | None = None  # why updates are not replayed from a CUDA graph

    @property
    def module(self) -> nn.Module:
        return self.step.module

    @property
    def mode(self) -> Mode:
        return self.step.mode

    # -- the loop

    def fit(self, stop: Interruption) -> Status:
        """Trains from `progress` on until the end, early stopping, or `stop`. The newest checkpoint is on disk then.

        Invalid input (a damaged image) raises `UserError` before the first update and `RunError` later.
        """
        steps, log_every = self.intervals.steps, self.intervals.log_every_steps
        with self._failures_explained():
            if self.recovery.policy == "rollback" and self.recovery.newest() is None:
                self.save()  # a checkpoint to roll back to
            clock = Clock(self)
            if self.stopping.met and self.progress.position == 0 and self.progress.step < steps:
                return "stopped_early"  # killed between the last checkpoint and the summary
            while self.progress.step < steps or self.progress.position > 0:
                self.module.train()
                progress = self.progress
                try:
                    for inputs, targets in self.batches.epoch(progress.epoch, progress.position, progress.step):
                        if progress.step == steps or self.stopping.met:
                            break  # resumed after the last update, whose evaluation was interrupted
                        logs = log_every is not None and (progress.step + 1) % log_every == 0
                        self.step.update(inputs, targets, progress.step, self.sums, log_norm=logs)
                        progress.step += 1
                        progress.position += 1
                        self.tracking.advance(progress.step)
                        if logs:
                            self.step.check_updates()
                            self.tracking.step(progress.step, clock.metrics())
                        if stop or self.stopping.met:
                            break
                        if self._save_is_due():
                            clock.stop()
                            self.save()
                    self.step.check_weights()
                    if stop or not self._end_epoch(clock, stop):
                        clock.stop()
                        self.save()
                        return "interrupted"
                except Diverged as error:
                    self._roll_back(error)
                    clock = Clock(self)
                    continue
                if self.stopping.met and progress.step < steps:
                    return "stopped_early"
            return "finished"

    def _end_epoch(self, clock: "Clock", stop: Interruption) -> bool:
        """Evaluates, informs stopping rule and schedule, and saves, each where it is due.

        Returns False when the evaluation was interrupted: nothing has changed then, and a resumed run evaluates again.
        """
        progress, intervals, epoch = self.progress, self.intervals, self.progress.epoch + 1
        last = progress.step >= intervals.steps or self.stopping.met
        evaluated = last or epoch % intervals.evaluate_every == 0
        metrics: dict[str, Any] = {
            "epoch": epoch,
            "step": progress.step,
            "lr": float(self.step.rate),
            **self.sums.means("train"),
            **self.sampler_metrics(),
        }
        if evaluated and self.validate is not None:
            validated = self.validate(stop)
            if validated is None:
                return False
            metrics |= validated
        self.sums = self.sums.fresh()
        progress.epoch, progress.position = epoch, 0
        clock.stop()
        improved = False
        if evaluated:
            metrics["seconds"] = progress.seconds
            if self.validate is not None:
                improved = self.best.update(metrics)
                self.stopping.update(metrics)
                self.step.schedule.update(metrics)
            self.tracking.epoch(metrics, best=improved)
        due = intervals.save_every_epochs is not None and epoch % intervals.save_every_epochs == 0
        if improved or due or last or self.stopping.met:
            self.save(best=improved)
            clock.stop()
        return True

    @contextlib.contextmanager
    def _failures_explained(self) -> Iterator[None]:
        """Waits for the last save at the end; after a failure, that failure is reported and not one of the save."""
        start = self.progress.step
        try:
            yield
            self.checkpoints.settle()
        except Exception as error:  # KeyboardInterrupt and SystemExit end the run at once
            with contextlib.suppress(RunError):
                self.checkpoints.settle()
            if isinstance(error, UserError) and self.progress.step > start:
                raise RunError(str(error)) from error
            if isinstance(error, torch.OutOfMemoryError):
                raise RunError(
                    f"out of memory on the device at update {self.progress.step + 1} ({str(error).split('. ')[0]}); "
                    "use a larger accumulate, on_out_of_memory=halve, or a smaller data.batch_size"
                ) from error
            raise

    def _roll_back(self, error: Diverged) -> None:
        """Returns to the newest checkpoint with a smaller learning rate; raises `error` where that is not enabled."""
        recovery = self.recovery
        state = recovery.goal(error)
        counted, resumed_from = recovery.state_dict(), self.progress.resumed_from
        self.step.check.forget()
        self.sums = self.sums.fresh()
        self.load_state_dict(state)
        self.progress.resumed_from = resumed_from
        # The checkpoint may have been written after earlier rollbacks: only the difference is applied.
        self.step.schedule.scale(counted["lr_scale"] / recovery.lr_scale)
        recovery.load_state_dict(counted)
        self.tracking.rewind(self.progress.epoch, self.progress.step)

    # -- saving and resuming

    def save(self, *, best: bool = False) -> None:
        """Writes a checkpoint. Raises `Diverged` instead where the weights are not finite."""
        self.step.check_weights()
        self.checkpoints.save(self.state_dict(), best=best, landmark=self._snapshot())

    def _save_is_due(self) -> bool:
        """Whether the updates done call for a checkpoint, wherever in an epoch they are."""
        step, every = self.progress.step, self.intervals.save_every_steps
        return (every is not None and step % every == 0) or self._snapshot() is not None

    def _snapshot(self) -> str | None:
        return None if self.intervals.snapshot is None else self.intervals.snapshot(self.progress.step)

    def state_dict(self) -> dict[str, Any]:
        sums = self.sums.state_dict()  # settles them, which informs the sampler: before the sampler's state
        return {
            "model": self._saved(self.module.state_dict()),
            "optimizer": self._saved(self.step.optimizer.state_dict()),
            "schedule": self.step.schedule.state_dict(),
            "ema": self._evaluated_weights(),
            "rng": rng.state(),
            "progress": {
                **vars(self.progress),
                **self.step.state_dict(),
                "sums": sums,
                "sampler": None if self.sampler is None else self.sampler.state_dict(),
                "stopping": self.stopping.state_dict(),
                "best": self.best.state_dict(),
                "recovery": self.recovery.state_dict(),
            },
            "config": dict(self.config),
            "normalize": self.normalize.state_dict(),
        }

    def _saved(self, state: dict[str, Any]) -> dict[str, Any]:
        """With full tensors, unless every rank saves its own shards."""
        return self.mode.full_state(state) if self.checkpoints.shards is None else state

    def _evaluated_weights(self) -> dict[str, Any] | None:
        """The weights that are validated and tested, where these are not the model's own."""
        optimizer = self.step.optimizer
        if self.average is None and not hasattr(optimizer, "eval"):
            return None
        with at_evaluation_point(optimizer, self.average):
            weights = self._saved(self.module.state_dict())
            return {name: value.clone() for name, value in weights.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Returns to where `state` was taken. The normalization was loaded before: the model's first weights may
        depend on it."""
        progress = dict(state["progress"])
        if self.average is not None:
            self.mode.load_model(self.module, state["ema"])
            self.average.restart()
        self.mode.load_model(self.module, state["model"])
        self.load_optimizer(state["optimizer"])
        self.step.schedule.load_state_dict(state["schedule"])
        self.step.load_state_dict({key: progress.pop(key) for key in ("lr", "scaler", "accumulate")})
        self.sums.load_state_dict(progress.pop("sums"))
        sampler = progress.pop("sampler")
        if self.sampler is not None and sampler is not None:
            self.sampler.load_state_dict(sampler)
        self.stopping.load_state_dict(progress.pop("stopping"))
        self.best.load_state_dict(progress.pop("best"))
        self.recovery.load_state_dict(progress.pop("recovery"))
        self.progress = Progress(**{**progress, "horizon": self.progress.horizon, "data": self.progress.data})
        if self.best.epoch == self.progress.epoch and self.progress.position == 0:
            self.checkpoints.restore_best(dict(state))
        if self.best.epoch is not None and not self.checkpoints.has_best():
            log.warning("the best model so far, of epoch %d, did not come along: epochs to come count", self.best.epoch)
            self.best = Best(self.best.monitor)
        self.progress.resumed_from = [*self.progress.resumed_from, self.progress.step]
        rng.restore(state["rng"])

    def load_optimizer(self, state: Mapping[str, Any]) -> None:
        """Which kernels make the update depends on this process, its device and mode, not on the checkpoint."""
        optimizer, kernels = self.step.optimizer, ("fused", "foreach", "capturable")
        own = [{key: group[key] for key in kernels if key in group} for group in optimizer.param_groups]
        groups = [{**saved, **mine} for saved, mine in zip(state["param_groups"], own, strict=True)]
        self.mode.load_optimizer(optimizer, {**state, "param_groups": groups})


def _test_best(trainer: Trainer, workload: Workload) -> dict[str, Any]:
    """Tests the best model, which stays in `workload.module`. Raises `RunError`: the run has begun."""
    mode = workload.parallel
    try:
        if trainer.best.epoch is None:
            with at_evaluation_point(trainer.step.optimizer, trainer.average):
                return test_metrics(workload)
        state = mode.broadcast(load(trainer.checkpoints.best) if mode.is_main else None)
        assert state is not None
        mode.load_model(workload.module, state["ema"] or state["model"])
        return test_metrics(workload)
    except UserError as error:
        raise RunError(f"the run is trained, but its test failed: {error}; mend it and type resume=auto") from error
