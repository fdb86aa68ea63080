"""A run: build everything, fit, test the best model once, write the summary."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dlopt import schedules
from dlopt.config.experiment import Experiment
from dlopt.config.rules import further_figure
from dlopt.data.batches import Batches
from dlopt.data.samplers import Attentive
from dlopt.errors import RunError, UserError
from dlopt.interruption import Interruption
from dlopt.parallel.pace import Pace
from dlopt.parallel.shard_files import ShardWriter
from dlopt.parallel.single import Whole
from dlopt.random import stream
from dlopt.tracking.tracking import Tracking
from dlopt.train import rng, speed
from dlopt.train.averaging import ExponentialAverage, at_evaluation_point
from dlopt.train.batch_norm import check_single_values, small_batches
from dlopt.train.build import Setup, data_facts, load_weights, parallel_of, set_up, training_batches
from dlopt.train.checkpoint import Checkpoints, load
from dlopt.train.cuda_graphs import GraphedUpdate, obstacle
from dlopt.train.evaluate import check_views, reduction, test_figures, validation
from dlopt.train.metrics import Sums, sample_losses
from dlopt.train.nonfinite import Diverged, Recovery
from dlopt.train.optimizer import evaluations, optimizer_of
from dlopt.train.rng import DROPOUT
from dlopt.train.speed import chosen
from dlopt.train.step import Closure, ObservedUpdate, Observer, PipelinedClosure, SharedClosure, Update
from dlopt.train.stopping import Best, Stopping


@dataclass(frozen=True)
class Run:
    """What is to be run, and where."""

    experiment: Experiment
    folder: Path
    checkpoint: Mapping[str, Any] | None = None  # go on from here
    choices: Mapping[str, str] = field(default_factory=dict)  # group -> name of the YAML file, for showing


def train(run: Run, interruption: Interruption | None = None, *, console: bool = True) -> dict[str, Any]:
    """Trains and tests until `interruption` is true (None: a signal, or `max_time`). Returns the summary, which is also
    written to summary.json.

    Raises `UserError` before the first update when something cannot work, `RunError` when the run fails later.
    """
    settings, state = run.experiment.settings, run.checkpoint
    if interruption is None:
        with Interruption(settings.max_time) as interruption:
            return train(run, interruption, console=console)
    parallel = parallel_of(run.experiment)
    state = parallel.broadcast(state)
    run = replace(run, checkpoint=state)
    setup = set_up(run.experiment, None if state is None else state["normalize"], parallel=parallel)
    batches = training_batches(setup)
    length = length_of(setup, len(batches), state)
    tracking = _tracking(run, console) if parallel.is_main else Tracking(None, sinks=[], console=False)
    with tracking:
        setup, found_lr = _with_lr(setup, run, tracking)
        training = training_of(setup, run.folder, batches, length, tracking, found_lr=found_lr)
        _observe(training, setup, run, tracking)
        if state is not None:
            training.load_state_dict(state)
            training.best.load_state_dict(parallel.broadcast(training.best.state_dict()))  # what rank 0 found
        elif settings.init_from is not None:
            for line in load_weights(setup.module, Path(settings.init_from), parallel.load_model):
                tracking.message(line)
        _introduce(setup, run, training, length, tracking)
        asked = parallel.agree(interruption)
        status = fit(training, asked)
        summary = _summary(training, setup, status)
        if status != "interrupted":
            summary |= _test_best(training, setup)
        else:
            tracking.message(f"{asked.reason}: stopped; go on with the same command and resume=auto")
        tracking.finish(summary)
    return summary


def _observe(training: Training, setup: Setup, run: Run, tracking: Tracking) -> None:
    """Diagnostics and the profiler look on, on the main process; without them the update is a plain one."""
    from dlopt.analysis.diagnosis.live import Diagnostics
    from dlopt.analysis.profiling import Profile, Profiling
    from dlopt.analysis.profiling import table as profile_table

    update, settings = training.update, run.experiment.settings
    if not isinstance(update, ObservedUpdate):
        return
    observers: list[Observer] = []
    if settings.diagnostics:
        kinds, every = settings.diagnostics, settings.diagnostics_every
        observers.append(Diagnostics(setup, update, kinds, every, tracking.diagnostics))
    if settings.profile:
        if settings.profile_steps[1] > training.steps:
            shown = ",".join(map(str, settings.profile_steps))
            raise UserError(f"profile_steps=[{shown}]: the run ends after {training.steps} updates; choose earlier")
        folder = run.folder / "profile"

        def tell(found: Profile) -> None:
            for line in profile_table(found, folder):
                tracking.message(line)

        profiling = Profiling(setup, update, settings.profile_steps, folder, tell)
        training.batches = profiling.batches(training.batches)
        observers.append(profiling)
    if setup.parallel.is_main:
        update.observers = observers


def _with_lr(setup: Setup, run: Run, tracking: Tracking) -> tuple[Setup, float | None]:
    """Where it is optimizer.lr=auto: with the learning rate of the checkpoint, or one that is found now; and the rate
    that was found."""
    from dlopt.analysis import lr_range

    experiment = setup.experiment
    if not experiment.auto_lr:
        return setup, None
    rate = None if run.checkpoint is None else run.checkpoint["progress"].get("found_lr")
    if rate is None:
        lr_range.load_first_weights(setup)
        found = lr_range.find(setup, lr_range.Sweep(), lambda setup: unseen(setup, run.folder))
        rate = found.steepest
        if rate is None:
            raise UserError("optimizer.lr=auto: the loss fell with no learning rate; type a number")
        tracking.message(f"optimizer.lr=auto: found {rate:.3g} (see find_lr.png) in {len(found.rates)} updates")
        if setup.parallel.is_main:
            with contextlib.suppress(OSError):  # a full disk shows itself at the first checkpoint
                lr_range.write(found, run.folder, "Learning-rate range test")
    optimizer = experiment.optimizer.partial(lr=rate)
    return replace(setup, experiment=replace(experiment, optimizer=optimizer, auto_lr=False)), rate


def _tracking(run: Run, console: bool) -> Tracking:
    settings, progress = run.experiment.settings, (run.checkpoint or {}).get("progress")
    return Tracking(
        run.folder,
        sinks=settings.tracking,
        console=console,
        log_every_steps=settings.log_every_steps,
        resume_from=progress and (progress["epoch"], progress["step"]),
    )


def _introduce(setup: Setup, run: Run, training: Training, length: Length, tracking: Tracking) -> None:
    """Shows what is about to be trained."""
    dataset, settings = setup.dataset, run.experiment.settings
    facts: dict[str, Any] = {
        "parameters": sum(p.numel() for p in setup.module.parameters()),
        "train": len(dataset.train),
        "val": len(dataset.val) if dataset.val is not None else 0,
        "test": len(dataset.test) if dataset.test is not None else 0,
        "device": str(setup.device),
        "precision": setup.precision.name,
    }
    if setup.device.type == "cpu":
        facts["threads"] = torch.get_num_threads()
    tracking.begin(
        dict(run.experiment.config),
        facts,
        epochs=length.epochs,
        steps_per_epoch=length.steps_per_epoch,
        first_step=training.progress.step,
        steps=length.steps,
        choices=run.choices,
    )
    unrecorded = obstacle(setup.module, training.update, device=setup.device, processes=setup.parallel.processes)
    told = chosen(run.experiment, setup.precision, setup.uncompiled, unrecorded)
    for line in [*([told] if told else []), *dataset.notes, *setup.parallel.notes, *small_batches(setup)]:
        tracking.message(line)
    if training.progress.step == 0 and len(dataset.train.shape) == 3 and settings.tracking and setup.parallel.is_main:
        inputs, _ = next(iter(training.batches.epoch(0)))
        tracking.images(inputs[:64].float().cpu())


def _test_best(training: Training, setup: Setup) -> dict[str, Any]:
    """The test figures of the best model, which stays in `setup.module`. Raises `RunError`: the run has begun."""
    checkpoints = training.checkpoints
    try:
        if training.best.epoch is not None:
            state = setup.parallel.broadcast(load(checkpoints.best) if setup.parallel.is_main else None)
            setup.parallel.load_model(setup.module, state["ema"] or state["model"])
        else:
            with at_evaluation_point(training.update.optimizer, training.average):
                return test_figures(setup)
        return test_figures(setup)
    except UserError as error:
        raise RunError(f"the run is trained, but its test failed: {error}; mend it and type resume=auto") from error


def _summary(training: Training, setup: Setup, status: str) -> dict[str, Any]:
    """summary.json before the test; a regression has no accuracies."""
    best, progress = training.best, training.progress
    summary = {
        "status": status,
        "epochs": progress.epoch,
        "steps": progress.step,
        "best_epoch": best.epoch,
        "best_val_loss": best.val_loss,
        "best_val_accuracy": best.val_accuracy,
        "test_loss": None,
        "test_accuracy": None,
        "seconds": progress.seconds,
        "parameters": sum(p.numel() for p in setup.module.parameters()),
        "parallel": setup.parallel.name,
        "processes": setup.parallel.processes,
        "resumed_from": progress.resumed_from,
        **({} if progress.found_lr is None else {"found_lr": progress.found_lr}),
        **({} if training.recovery is None else training.recovery.summary()),
    }
    if further_figure(best.monitor) is not None and best.epoch is not None:
        summary[f"best_{best.monitor}"] = best.figure
    return {key: value for key, value in summary.items() if setup.classify or not key.endswith("accuracy")}


@dataclass(frozen=True)
class Length:
    steps: int
    epochs: int
    steps_per_epoch: int
    horizon: int  # updates over which the schedule runs


def length_of(setup: Setup, steps_per_epoch: int, state: Mapping[str, Any] | None) -> Length:
    settings = setup.experiment.settings
    steps = settings.steps if settings.steps is not None else settings.epochs * steps_per_epoch
    horizon = steps if settings.schedule_epochs is None else round(settings.schedule_epochs * steps_per_epoch)
    if state is not None and settings.schedule_epochs is None:
        horizon = state["progress"]["horizon"]  # a lengthened run keeps its schedule
    return Length(steps, math.ceil(steps / steps_per_epoch), steps_per_epoch, horizon)


def training_of(
    setup: Setup, folder: Path, batches: Batches, length: Length, tracking: Tracking, *, found_lr: float | None = None
) -> Training:
    """A training that begins; `folder` is the run's. Raises `UserError` where parts of it do not go together.

    `found_lr`: the learning rate, where it was looked for.
    """
    experiment, settings = setup.experiment, setup.experiment.settings
    check_single_values(setup)
    check_views(setup)
    optimizer = optimizer_of(setup)
    sampler = _attentive(setup, batches)
    schedule = _schedule(setup, optimizer, length)
    average = None if settings.ema is None else ExponentialAverage(setup.module, settings.ema)
    stopping = experiment.stopping.build(model=setup.module, norm=setup.parallel.norm)
    checkpoints = Checkpoints(
        folder / "checkpoints",
        settings.checkpoint.keep,
        writes=setup.parallel.is_main,
        asynchronous=settings.checkpoint.asynchronous,
        shards=_shard_writer(setup),
    )
    recovery = _recovery(setup, checkpoints, tracking)
    align = setup.parallel.aligning(setup.module)
    average_on = average and average.update
    kind: Callable[..., Update] = ObservedUpdate if settings.diagnostics or settings.profile else Update
    if kind is Update and setup.device.type == "cuda" and setup.parallel.processes == 1:
        kind, average_on = partial(GraphedUpdate, inside=[average_on] if average_on else []), None
    update = kind(
        _closure(setup, optimizer),
        schedule,
        evaluations=evaluations(setup, optimizer),
        after=[each for each in (align, average_on, getattr(stopping, "after_update", None)) if each],
        check_now=setup.device.type == "cpu" or settings.check == "step" or settings.on_divergence == "skip",
        skip=recovery.skip if settings.on_divergence == "skip" else None,
    )
    speed.record(update, experiment, setup.parallel, setup.module, batches.batch_size)
    return Training(
        module=setup.module,
        update=update,
        batches=setup.parallel.batches(batches),
        validate=validation(setup, optimizer, average, tracking.evaluating),
        tracking=tracking,
        checkpoints=checkpoints,
        stopping=stopping,
        best=Best(settings.monitor),
        average=average,
        normalize=setup.normalize,
        config=experiment.config,
        steps=length.steps,
        epochs=length.epochs,
        progress=Progress(horizon=length.horizon, data=data_facts(setup), found_lr=found_lr),
        evaluate_every=settings.evaluate.every_epochs,
        save_every_epochs=settings.checkpoint.every_epochs,
        save_every_steps=settings.checkpoint.every_steps,
        log_every_steps=settings.log_every_steps,
        landmark=_landmark(schedule) if settings.checkpoint.at_restarts else None,
        sums=Sums(setup.classify, None if sampler is None else _teaching(sampler, setup.loss), reduction(setup)),
        states=setup.parallel,
        sampler=sampler,
        figures=getattr(batches.sampler, "figures", dict),
        pace=_pace(setup),
        recovery=recovery,
    )


def unseen(setup: Setup, folder: Path, state: Mapping[str, Any] | None = None) -> Training:
    """A training that is looked at from outside: nothing is shown or written, `folder` stands where a run's would.

    `state`: of the checkpoint from which it is to go on, for its length.
    """
    batches = training_batches(setup)
    silent = Tracking(None, sinks=[], console=False)
    return training_of(setup, folder, batches, length_of(setup, len(batches), state), silent)


def _closure(setup: Setup, optimizer: torch.optim.Optimizer) -> Closure:
    settings, parallel = setup.experiment.settings, setup.parallel
    several = parallel.processes > 1
    shared = PipelinedClosure if hasattr(parallel, "run_batch") else SharedClosure
    closure: Closure = (partial(shared, parallel=parallel) if several else Closure)(
        model=setup.model,
        module=setup.module,
        loss=setup.loss,
        optimizer=optimizer,
        clip=setup.experiment.clip.build(model=setup.module),
        autocast=setup.precision.autocast,
        scaler=setup.precision.scaler(),
        accumulate=settings.accumulate,
        seed=stream(settings.augmentation_seed, DROPOUT),
    )
    closure.halves = settings.on_out_of_memory == "halve"
    if closure.halves and several:
        raise UserError(
            f"on_out_of_memory=halve: not with {parallel.processes} processes, which would have to cut their "
            "batches at the same time; set accumulate instead"
        )
    return closure


_SHARDED_FROM = 100_000_000  # parameters: fewer are gathered and written by one process in no time


def _shard_writer(setup: Setup) -> ShardWriter | None:
    """By which every process writes its own part of the checkpoints; None: the main one writes all of it."""
    wanted, parallel = setup.experiment.settings.checkpoint.sharded, setup.parallel
    if not hasattr(parallel, "shard_writer"):
        if wanted is True:
            why = "one process has it all" if parallel.processes == 1 else f"parallel={parallel.name} writes one file"
            raise UserError(
                f"checkpoint.sharded=true: {why}; use parallel=fsdp with several processes, or checkpoint.sharded=auto"
            )
        return None
    if wanted == "auto":
        wanted = sum(p.numel() for p in setup.module.parameters()) >= _SHARDED_FROM
    writer: ShardWriter | None = parallel.shard_writer() if wanted else None
    return writer


def _schedule(setup: Setup, optimizer: torch.optim.Optimizer, length: Length) -> schedules.Scheduler:
    experiment = setup.experiment
    factor = schedules.build(
        experiment.schedule.build, experiment.warmup, steps=length.horizon, steps_per_epoch=length.steps_per_epoch
    )
    return schedules.Scheduler(optimizer, factor, freezes=setup.parallel.processes == 1)


def _recovery(setup: Setup, checkpoints: Checkpoints, tracking: Tracking) -> Recovery:
    settings, parallel = setup.experiment.settings, setup.parallel
    return Recovery(
        settings.on_divergence,
        attempts=settings.recovery.attempts,
        lr_factor=settings.recovery.lr_factor,
        newest=lambda: parallel.broadcast(checkpoints.load_newest() if parallel.is_main else None),
        tell=tracking.message,
    )


def _pace(setup: Setup) -> Pace | None:
    """How long each of several processes works by itself."""
    parallel = setup.parallel
    if parallel.processes == 1:
        return None
    return Pace(parallel.group, setup.device, getattr(parallel, "waiting", None))


def _attentive(setup: Setup, batches: Batches) -> Attentive | None:
    """The sampler, where it follows the samples' losses."""
    sampler, experiment, parallel = batches.sampler, setup.experiment, setup.parallel
    if not isinstance(sampler, Attentive):
        return None
    if parallel.processes > 1:
        if not hasattr(parallel, "maximum"):
            raise UserError(
                f"sampler={experiment.sampler.target.__name__}: its order follows the samples' losses, which "
                f"processes of parallel={parallel.name} do not tell each other; use parallel=ddp or another sampler"
            )
        sampler.maximum = parallel.maximum
    if experiment.settings.on_divergence == "skip":
        raise UserError(
            f"on_divergence=skip: sampler={experiment.sampler.target.__name__} learns from the losses of every update; "
            "use on_divergence=rollback or another sampler"
        )
    return sampler


def _teaching(sampler: Attentive, loss: nn.Module) -> Callable[[Tensor, Tensor], None]:
    """Tells `sampler` the losses of the samples that it has served."""
    return lambda outputs, targets: sampler.observe(sample_losses(loss, outputs, targets))


def _landmark(schedule: schedules.Scheduler) -> Callable[[int], str | None]:
    """After how many updates a checkpoint is kept for good, and its name: snapshots of a schedule with restarts
    (Huang et al. 2017, Snapshot Ensembles)."""
    ended = schedule.ended_cycle
    if ended is None:
        raise UserError(
            "checkpoint.at_restarts=true: this schedule has no restarts; "
            "use schedule=cosine_restarts or schedule=cosine_warmup_restarts"
        )

    def landmark(step: int) -> str | None:
        cycle = ended(step - 1)
        return None if cycle is None else f"restart-{cycle}"

    return landmark


log = logging.getLogger(__name__)

Status = Literal["finished", "stopped_early", "interrupted"]


class EpochBatches(Protocol):
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
    batches: EpochBatches
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


def _end_epoch(t: Training, clock: _Clock, interruption: Interruption) -> bool:
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
