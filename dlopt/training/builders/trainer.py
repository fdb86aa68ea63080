"""Builds the trainer of a workload: the step and everything that the loop needs around it."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from dlopt.basics.errors import UserError
from dlopt.basics.length import Length
from dlopt.data.batches import Batches
from dlopt.data.samplers import LossAwareSampler
from dlopt.metrics.sums import MetricSum, sample_losses
from dlopt.parallel.shard_files import ShardWriter
from dlopt.schedules import Scheduler
from dlopt.tracking.tracking import Tracking
from dlopt.training.averaging import ExponentialAverage, TailAverage, WeightAverage
from dlopt.training.batch_growth import GrowingBatches
from dlopt.training.batch_norm import LaggingStatistics, check_norm_batches
from dlopt.training.builders.batches import loss_aware_sampler, training_batches
from dlopt.training.builders.optimizer import build_optimizer, build_schedule, snapshot_names
from dlopt.training.builders.step import build_step, build_update_function
from dlopt.training.builders.workload import Workload, data_spec
from dlopt.training.checkpoint.checkpoints import Checkpoints
from dlopt.training.checkpoint.content import Checkpoint
from dlopt.training.evaluate import check_tta, has_train_accuracy, reduction, validation
from dlopt.training.length import evaluation_interval, length_of_run
from dlopt.training.loop import Trainer
from dlopt.training.micro_loss import Network
from dlopt.training.nonfinite import Recovery
from dlopt.training.progress import Clock, Intervals, Progress
from dlopt.training.replicas import ReplicaCheck
from dlopt.training.step import EpochBatches, Observer
from dlopt.training.stopping import Best, Stopping
from dlopt.training.user_observers import NO_OBSERVERS, UserObservers


def build_trainer(
    workload: Workload,
    folder: Path,
    batches: Batches,
    length: Length,
    tracking: Tracking,
    *,
    found_lr: float | None = None,
    observers: Sequence[Observer] = (),
    user_observers: UserObservers = NO_OBSERVERS,
    checks: bool = True,
) -> Trainer:
    """Builds a trainer at its first update.

    Args:
        found_lr: learning rate of a range test, for the summary.
        checks: false disables the non-finite check.

    Raises:
        UserError: components cannot be combined.
    """
    settings = workload.run_config.settings
    check_norm_batches(workload, batches)
    check_tta(workload)
    sampler = loss_aware_sampler(workload, batches)

    # 1. What changes the weights, and their average.
    optimizer = build_optimizer(workload)
    schedule = build_schedule(workload, optimizer, length)
    average = build_average(workload, length)

    # 2. What stops, saves and recovers.
    rule, direction_of = workload.run_config.stopping, workload.run_config.direction_of
    stopping = rule.build_as(
        Stopping,  # type: ignore[type-abstract]
        model=workload.module,
        norm=workload.parallel.sharding.norm,
        monitor_mode=direction_of(rule.arguments.get("monitor", "auto")),
    )
    rule.require_call(stopping.update, "update(metrics)")
    checkpoints = build_checkpoints(workload, folder)
    recovery = Recovery(settings.recovery.attempts, tracking.message)

    # 3. The update: of the network as the observers wrap it, with the metrics that it adds up.
    network: Network = workload.network
    observed: EpochBatches = batches
    if length.grows:
        observed = GrowingBatches(batches, length, tracking.message)
    for observer in observers:
        network, observed = observer.instrument(network, observed)
    if not workload.parallel.ranks.is_main:
        observers = ()  # all ranks run the instrumented network; rank 0 alone observes its updates
    if settings.check == "step" and workload.parallel.ranks.processes > 1:
        observers = (*observers, ReplicaCheck(workload.parallel, workload.module))
    train_metrics = build_train_metrics(workload, sampler)
    step = build_step(
        workload,
        network,
        optimizer,
        schedule,
        metrics=train_metrics,
        average=average,
        checks=checks,
        observers=observers,
    )
    update, graph_obstacle = build_update_function(
        workload,
        step,
        average=average,
        stopping=stopping,
        skip=recovery.skip if checks and settings.on_divergence == "skip" else None,
        observers=observers,
        batch_size=batches.batch_size,
    )

    # 4. The loop.
    return Trainer(
        step=step,
        run_update=update,
        batches=observed,
        length=length,
        progress=Progress(data=data_spec(workload), found_lr=found_lr),
        intervals=build_intervals(workload, schedule, length),
        validate=validation(workload, optimizer, average, tracking.evaluating),
        best=Best(settings.monitor, direction=direction_of(settings.monitor)),
        stopping=stopping,
        recovery=recovery,
        train_metrics=train_metrics,
        clock=partial(Clock, timing=workload.placed.timing, throughput=workload.throughput),
        tracking=tracking,
        user_observers=user_observers,
        checkpoints=checkpoints,
        lagging=LaggingStatistics(workload.module) if settings.norm_statistics == "running" else None,
        average=average,
        sampler=batches.sampler,
        normalize=workload.normalize,
        config=workload.run_config.config,
        graph_obstacle=graph_obstacle,
    )


def probe_trainer(
    workload: Workload,
    folder: Path,
    checkpoint: Checkpoint | None = None,
    *,
    observers: Sequence[Observer] = (),
    checks: bool = True,
) -> Trainer:
    """Builds a trainer without output, for probes and diagnostics; nothing is written to `folder`.

    `checkpoint`: sets the length of the schedule. `checks`: see `build_trainer`.
    """
    batches = training_batches(workload)
    length = length_of_run(workload.run_config.settings, batches, checkpoint)
    return build_trainer(workload, folder, batches, length, Tracking.silent(), observers=observers, checks=checks)


def build_average(workload: Workload, length: Length) -> WeightAverage | None:
    settings = workload.run_config.settings
    if settings.ema is None:
        return None
    if settings.ema == "tail":
        return TailAverage(workload.module, length.updates)
    return ExponentialAverage(workload.module, settings.ema, warmup=settings.ema_warmup)


def build_checkpoints(workload: Workload, folder: Path) -> Checkpoints:
    settings = workload.run_config.settings.checkpoint
    return Checkpoints(
        folder / "checkpoints",
        settings.keep,
        writes=workload.parallel.ranks.is_main,
        asynchronous=settings.asynchronous,
        shards=checkpoint_writer(workload),
    )


def build_train_metrics(workload: Workload, sampler: LossAwareSampler | None) -> MetricSum:
    """Builds the sums of the training metrics. `sampler`: receives the losses of the samples."""
    update_sampler = None
    if sampler is not None:

        def update_sampler(outputs: torch.Tensor, targets: torch.Tensor) -> None:
            sampler.observe(sample_losses(workload.loss, outputs, targets))

    return MetricSum(workload.task, update_sampler, reduction(workload), accuracy=has_train_accuracy(workload))


def build_intervals(workload: Workload, schedule: Scheduler, length: Length) -> Intervals:
    """Raises `UserError` if no evaluation would be within an epoch."""
    settings = workload.run_config.settings
    return Intervals(
        evaluate_every=settings.evaluate.every_epochs,
        evaluate_every_steps=evaluation_interval(settings, length),
        save_every_epochs=settings.checkpoint.every_epochs,
        save_every_steps=settings.checkpoint.every_steps,
        log_every_steps=settings.log_every_steps,
        snapshot=snapshot_names(schedule) if settings.checkpoint.at_restarts else None,
    )


_MIN_SHARDED_PARAMETERS = 100_000_000  # one process quickly gathers and writes fewer


def checkpoint_writer(workload: Workload) -> ShardWriter | None:
    """Returns the writer of sharded checkpoints; None if rank 0 writes a single file. Raises `UserError`."""
    sharded, mode = workload.run_config.settings.checkpoint.sharded, workload.parallel
    writer = workload.placed.writer
    if writer is None:
        if sharded is True:
            reason = (
                "one process has nothing to shard" if mode.ranks.processes == 1 else f"not with parallel={mode.name}"
            )
            raise UserError(
                f"checkpoint.sharded=true: {reason}; "
                "use parallel=fsdp with several processes, or checkpoint.sharded=auto"
            )
        return None
    if sharded == "auto":
        sharded = sum(p.numel() for p in workload.module.parameters()) >= _MIN_SHARDED_PARAMETERS
    return writer if sharded else None
