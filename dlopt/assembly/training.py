"""The training of an experiment: all that the loop works on, put together."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dlopt import schedules
from dlopt.assembly import speed
from dlopt.assembly.batches import training_batches
from dlopt.assembly.norms import check_single_values
from dlopt.assembly.optimizer import evaluations, optimizer_of
from dlopt.assembly.setup import Setup, data_facts
from dlopt.assembly.streams import DROPOUT
from dlopt.assembly.testing import check_views
from dlopt.assembly.validation import reduction, validation
from dlopt.data.batches import Batches
from dlopt.data.samplers import Attentive
from dlopt.engine.averaging import ExponentialAverage
from dlopt.engine.checkpoint import Checkpoints
from dlopt.engine.graphed import GraphedUpdate
from dlopt.engine.loop import Progress, Training
from dlopt.engine.metrics import Sums, sample_losses
from dlopt.engine.observed import ObservedUpdate
from dlopt.engine.pipelined import PipelinedClosure
from dlopt.engine.recovery import Recovery
from dlopt.engine.shared import SharedClosure
from dlopt.engine.step import Closure, Update
from dlopt.engine.stopping import Best
from dlopt.errors import UserError
from dlopt.parallel.pace import Pace
from dlopt.parallel.shard_files import ShardWriter
from dlopt.random import stream
from dlopt.tracking.tracking import Tracking


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
