"""A run, from its config to its summary.

`train_run` builds a `Workload` (data, model, loss) and a `Trainer`, trains with its loop (`Trainer.fit`), and tests the
best model.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dlopt.basics.errors import RunError, UserError
from dlopt.basics.folders import RunFolder
from dlopt.basics.interruption import Interruption
from dlopt.config.resuming import how_to_resume
from dlopt.data.batches import Batches
from dlopt.data.identity import SPLITS
from dlopt.metrics.sums import MetricSum, sample_losses
from dlopt.parallel.processes.rendezvous import is_launched
from dlopt.tracking.tracking import Tracking
from dlopt.training.averaging import ExponentialAverage, TailAverage, WeightAverage, evaluation_weights
from dlopt.training.batch_norm import check_norm_batches
from dlopt.training.builders.batches import loss_aware_sampler, training_batches
from dlopt.training.builders.optimizer import build_optimizer, build_schedule, snapshot_names
from dlopt.training.builders.step import build_step, build_update
from dlopt.training.builders.workload import (
    Workload,
    build_mode,
    build_workload,
    checkpoint_writer,
    data_spec,
    load_weights,
    refuse_other_data,
)
from dlopt.training.checkpoint.checkpoints import Checkpoints, load
from dlopt.training.checkpoint.content import Checkpoint, blamed
from dlopt.training.evaluate import check_crops, check_tta, has_train_accuracy, reduction, test_metrics, validation
from dlopt.training.loop import Trainer
from dlopt.training.nonfinite import Recovery
from dlopt.training.progress import (
    Intervals,
    Length,
    Progress,
    TrainingRun,
    check_horizon,
    evaluation_interval,
    run_length,
)
from dlopt.training.reporting import log_header, notes, open_tracking, show_first_batch, summarize
from dlopt.training.step import EpochBatches, Network, Observer
from dlopt.training.stopping import Best, Stopping
from dlopt.training.user_observers import NO_OBSERVERS, UserObservers

Observe = Callable[[Workload, Length, Tracking, Path], Sequence[Observer]]
"""Returns the observers of a run, given its length and folder. Raises `UserError`."""
FindLr = Callable[[Workload, Tracking, Path], float]
"""Returns the learning rate for optimizer.lr=auto. Raises `UserError` if none is suitable."""
AddTeacher = Callable[[Workload], Workload]
"""Returns the workload with the teacher of loss=distillation. Raises `UserError`."""
Draw = Callable[[Workload, Path, Sequence[float]], Mapping[str, Path]]
"""Draws a finished run (with its best model) into its folder, with the restarts of the schedule (in epochs).
Returns the paths by description."""


def train_run(
    run: TrainingRun,
    interruption: Interruption,
    *,
    console: bool = True,
    observe: Observe | None = None,
    find_lr: FindLr | None = None,
    add_teacher: AddTeacher | None = None,
    draw: Draw | None = None,
) -> dict[str, Any]:
    """Trains, tests the best model, and returns the summary, which is also written to summary.json.

    Args:
        interruption: stops the run with a checkpoint when it becomes true: on a signal, or after `max_time`. Before the
            end of the first update, a signal may raise `Interrupted` instead.
        console: show progress.
        observe: builds observers (diagnostics, profiler).
        find_lr: runs the range test for optimizer.lr=auto.
        add_teacher: loads the teacher of loss=distillation.
        draw: draws the run at its end, unless it is interrupted; an error in it does not fail the run.

    Raises:
        UserError: the config cannot work; before the first update.
        RunError: the run failed later.
    """
    # 1. Join the processes of the run, and build data, model and loss.
    settings = run.run_config.settings
    mode = build_mode(run.run_config)
    checkpoint = mode.ranks.broadcast(run.checkpoint)  # rank 0 has loaded it
    workload = build_workload(run.run_config, checkpoint, parallel=mode, identified=SPLITS)
    if checkpoint is not None:
        refuse_other_data(workload, checkpoint)  # before the folder is changed
    if add_teacher is not None:
        workload = add_teacher(workload)
    check_crops(workload)
    batches = training_batches(workload)
    length = run_length(settings, len(batches), checkpoint)
    typed = run.overrides
    horizon_note = None if checkpoint is None else check_horizon(run.run_config, length, checkpoint, typed)
    is_shown = mode.ranks.is_main
    with (
        contextlib.closing(workload),
        open_tracking(run, checkpoint, console) if is_shown else Tracking.silent() as tracking,
    ):
        # 2. Find the learning rate (optimizer.lr=auto); a resumed run keeps its learning rate.
        found_lr = None if checkpoint is None else checkpoint.found_lr
        if workload.run_config.auto_lr and find_lr is not None:
            found_lr = find_lr(workload, tracking, run.folder) if found_lr is None else found_lr
            workload = workload.with_lr(found_lr)

        # 3. Load weights, before the trainer is built: its weight average starts at them.
        if checkpoint is None and settings.init_from is not None:
            for line in load_weights(workload.module, Path(settings.init_from), mode, classes=workload.class_names):
                tracking.message(line)

        # 4. Build optimizer, schedule, step and loop, and resume.
        user_observers = UserObservers(run.run_config.user_observers if is_shown else ())
        trainer = build_trainer(
            workload,
            run.folder,
            batches,
            length,
            tracking,
            found_lr=found_lr,
            observers=() if observe is None else observe(workload, length, tracking, run.folder),
            user_observers=user_observers,
        )
        if checkpoint is not None:
            with blamed("resume: the checkpoint"):
                trainer.load_state_dict(checkpoint.state)

        # 5. Say what runs.
        log_header(run, workload, length, trainer.progress, tracking)
        for line in notes(workload, trainer.step.optimizer, trainer.graph_obstacle):
            tracking.message(line)
        if trainer.progress.step == 0 and is_shown:
            show_first_batch(workload, trainer.batches, tracking)
        if horizon_note is not None:
            tracking.message(horizon_note)
        if checkpoint is not None and not checkpoint.is_identified:
            tracking.message(
                "warning: the checkpoint of an older dlopt does not identify its run and its data; whether they are "
                "the same was not checked"
            )

        # 6. Train, and test the best model.
        stop = mode.ranks.synchronized_stop(interruption)
        interruption.raise_if_received()
        status = trainer.fit(stop, interruption.defer)
        tested: dict[str, Any] | None = {}
        if status != "interrupted" and settings.evaluate.test:
            tested = _test_best(trainer, workload, stop)
            trainer.train_metrics.warn_if_not_finite(tested or {}, "test_loss", tracking.message)
        if tested is None:  # interrupted in the test: the last checkpoint is that of the whole training
            status = "interrupted"
        if status == "interrupted":
            how = how_to_resume(RunFolder(run.folder), is_launched())
            tracking.message(f"{stop.reason}: stopped; {how}")

        # 7. Record the results. Last, because summary.json marks the run as finished: one that is killed before, in
        #    the test, is tested again when it is resumed.
        summary = summarize(workload, status, trainer.progress, trainer.best, trainer.recovery) | (tested or {})
        user_observers.at_end(summary)
        pictures = None
        if draw is not None and status != "interrupted":
            steps = (step for step in trainer.step.schedule.restarts if step < trainer.progress.step)
            pictures = partial(draw, workload, run.folder, [step / length.steps_per_epoch for step in steps])
        trainer.checkpoints.refuse_moved()
        tracking.finish(summary, pictures)
    return summary


def _test_best(trainer: Trainer, workload: Workload, stop: Interruption) -> dict[str, Any] | None:
    """Tests the best model, which stays loaded in `workload.module`. None if interrupted. Raises `RunError`."""
    mode, progress = workload.parallel, partial(trainer.tracking.evaluating, split="test")
    try:
        if trainer.best.epoch is None:
            with evaluation_weights(trainer.step.optimizer, trainer.average):
                return test_metrics(workload, progress, stop)
        # Rank 0 reads the file, because other nodes may not see the folder; all ranks test the same weights.
        best = mode.ranks.broadcast(load(trainer.checkpoints.best) if mode.ranks.is_main else None)
        assert best is not None
        workload.load(best)
        return test_metrics(workload, progress, stop)
    except UserError as error:
        advice = "fix the cause and repeat the command with resume=auto"
        raise RunError(f"training is finished, but the test failed: {error}; {advice}") from error


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
    """Builds a trainer at its first update, with optimizer, schedule, step and checkpoints.

    Args:
        found_lr: learning rate of a range test, for the summary.
        checks: false disables the non-finite check.

    Raises:
        UserError: components cannot be combined.
    """
    run_config, settings, mode = workload.run_config, workload.run_config.settings, workload.parallel
    check_norm_batches(workload, batches)
    check_tta(workload)
    sampler = loss_aware_sampler(workload, batches)

    # 1. What changes the weights, and their average.
    optimizer = build_optimizer(workload)
    schedule = build_schedule(workload, optimizer, length)
    average: WeightAverage | None = None
    if settings.ema == "tail":
        average = TailAverage(workload.module, length.steps)
    elif settings.ema is not None:
        average = ExponentialAverage(workload.module, settings.ema, warmup=settings.ema_warmup)

    # 2. What stops, saves and recovers.
    stopping: Stopping = run_config.stopping.build(
        model=workload.module, norm=mode.sharding.norm, monitor_mode=settings.monitor_mode
    )
    checkpoints = Checkpoints(
        folder / "checkpoints",
        settings.checkpoint.keep,
        writes=mode.ranks.is_main,
        asynchronous=settings.checkpoint.asynchronous,
        shards=checkpoint_writer(workload),
    )
    recovery = Recovery(
        settings.on_divergence,
        attempts=settings.recovery.attempts,
        lr_factor=settings.recovery.lr_factor,
        # Rank 0 reads the file, because other nodes may not see the folder. All ranks call this: they find the same
        # non-finite number, and go back to the same state.
        load_newest=lambda: mode.ranks.broadcast(checkpoints.load_newest() if mode.ranks.is_main else None),
        log=tracking.message,
    )

    # 3. The update: of the network as the observers wrap it, with the metrics that it adds up.
    network: Network = workload.network
    observed: EpochBatches = batches
    for observer in observers:
        network, observed = observer.instrument(network, observed)
    update_sampler = None
    if sampler is not None:

        def update_sampler(outputs: torch.Tensor, targets: torch.Tensor) -> None:
            sampler.observe(sample_losses(workload.loss, outputs, targets))

    train_metrics = MetricSum(workload.task, update_sampler, reduction(workload), accuracy=has_train_accuracy(workload))
    step = build_step(workload, network, optimizer, schedule, keep=train_metrics.keep, average=average, checks=checks)
    update, graph_obstacle = build_update(
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
        validate=validation(workload, optimizer, average, tracking.evaluating),
        tracking=tracking,
        checkpoints=checkpoints,
        stopping=stopping,
        best=Best(settings.monitor, mode=settings.monitor_mode),
        recovery=recovery,
        length=length,
        intervals=Intervals(
            evaluate_every=settings.evaluate.every_epochs,
            evaluate_every_steps=evaluation_interval(settings, length),
            save_every_epochs=settings.checkpoint.every_epochs,
            save_every_steps=settings.checkpoint.every_steps,
            log_every_steps=settings.log_every_steps,
            snapshot=snapshot_names(schedule) if settings.checkpoint.at_restarts else None,
        ),
        normalize=workload.normalize,
        config=run_config.config,
        average=average,
        sampler=sampler,
        sampler_metrics=getattr(batches.sampler, "metrics", dict),
        train_metrics=train_metrics,
        timing=workload.placed.timing,
        throughput=workload.throughput,
        progress=Progress(horizon=length.horizon, data=data_spec(workload), found_lr=found_lr),
        graph_obstacle=graph_obstacle,
        user_observers=user_observers,
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
    length = run_length(workload.run_config.settings, len(batches), checkpoint)
    return build_trainer(workload, folder, batches, length, Tracking.silent(), observers=observers, checks=checks)
