"""A run, from its config to its summary: `train_run` prepares it, trains (`Trainer.fit`), tests and records.

`dlopt.run.runner.execute` calls it in the process of `dlopt train`, in each rank of a run, and in each job of a sweep:
with the folder of the run locked, and catching what is raised here.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dlopt.basics.errors import RunError, UserError
from dlopt.basics.folders import RunFolder
from dlopt.basics.interruption import Interruption
from dlopt.basics.length import Length
from dlopt.config.resuming import how_to_resume
from dlopt.data.settings import SPLITS
from dlopt.parallel.processes.rendezvous import is_launched
from dlopt.tasks.report import TestReport
from dlopt.tracking.tracking import Tracking
from dlopt.training.averaging import evaluation_weights
from dlopt.training.budget import count_updates
from dlopt.training.builders.batches import training_batches
from dlopt.training.builders.trainer import build_trainer
from dlopt.training.builders.workload import (
    Workload,
    build_mode,
    build_workload,
    load_weights,
    refuse_other_data,
    with_validation_sets,
)
from dlopt.training.checkpoint.checkpoints import load
from dlopt.training.checkpoint.content import blamed
from dlopt.training.evaluate import TestedSplit, check_crops, test_report
from dlopt.training.length import check_horizon, length_of_run
from dlopt.training.loop import Trainer
from dlopt.training.progress import TrainingRun
from dlopt.training.reporting import log_header, notes, open_tracking, show_first_batch, summarize
from dlopt.training.step import Observer
from dlopt.training.user_observers import UserObservers


@dataclass(frozen=True)
class Tools:
    """Functions of rooms that this one does not import, where the config needs them. Only `draw` raises no `UserError`.

    Attributes:
        observe: builds the observers of a run of this length (`instruments.observers.observers`).
        find_lr: returns the learning rate for optimizer.lr=auto (`instruments.lr_range.find_lr`).
        add_teacher: returns the workload with the teacher of its loss (`trained.distillation.with_teacher`).
        draw: draws a run into its folder at its end, with the best model, the restarts of the schedule (in epochs) and
            the report of its test; returns the paths, or how to draw, by description (`run.runner.draw`). An error in
            it does not fail the run. Such a run is tested on the validation set if it has no test set.
    """

    observe: Callable[[Workload, Length, Tracking, Path], Sequence[Observer]] | None = None
    find_lr: Callable[[Workload, Tracking, Path], float] | None = None
    add_teacher: Callable[[Workload], Workload] | None = None
    draw: Callable[[Workload, Path, Sequence[float], TestReport], Mapping[str, Path | str]] | None = None


NO_TOOLS = Tools()


def train_run(
    run: TrainingRun, interruption: Interruption, tools: Tools = NO_TOOLS, *, console: bool = True
) -> dict[str, Any]:
    """Trains, tests the best model, and returns the summary, which is also written to summary.json.

    `interruption` stops the run with a checkpoint when it becomes true: on a signal, or after `max_time`. Until the
    first update is done, a signal may raise `Interrupted` instead. Raises `UserError` before the first update if the
    config cannot work, and `RunError` if the run failed later.
    """
    # 1. Prepare.
    with _prepared(run, tools, console=console) as (workload, trainer):
        # 2. Fit.
        stop = workload.parallel.ranks.synchronized_stop(interruption)
        interruption.raise_if_received()
        status = trainer.fit(stop, interruption.defer)

        average = trainer.average
        if status != "interrupted" and average is not None and average.updates < average.first:
            trainer.tracking.message(
                f"ema={workload.run_config.settings.ema}: the run ended after update {average.updates}, its average "
                f"begins to differ from its weights with update {average.first}: nothing was averaged"
            )

        # 3. Test the best model.
        tested: TestReport | None = TestReport({})
        if status != "interrupted" and workload.run_config.settings.evaluate.test:
            tested = _test(trainer, workload, stop, is_shown=tools.draw is not None)
        if tested is None:  # interrupted in the test: the last checkpoint is that of the whole training
            status, tested = "interrupted", TestReport({})
        if status == "interrupted":
            advice = how_to_resume(RunFolder(run.folder), is_launched())
            trainer.tracking.message(f"{stop.reason}: stopped; {advice}")

        # 4. Record. Last, because summary.json marks the run as finished: one that is killed before, in the test, is
        #    tested again when it is resumed.
        trainer.measure_memory()
        summary = summarize(workload, status, trainer.progress, trainer.best, trainer.recovery)
        summary |= tested.metrics if tested.split == "test" else {}
        trainer.user_observers.at_end(summary)
        pictures = None
        if tools.draw is not None and status != "interrupted":
            schedule = trainer.step.schedule
            restarts = [trainer.length.epochs_of(t) for t in schedule.restarts if t < schedule.last_epoch]
            pictures = partial(tools.draw, workload, run.folder, restarts, tested)
        trainer.checkpoints.refuse_moved()
        trainer.tracking.finish(summary, pictures, tested, workload.class_names or ())
        return summary


@contextlib.contextmanager
def _prepared(run: TrainingRun, tools: Tools, *, console: bool) -> Iterator[tuple[Workload, Trainer]]:
    """Builds a run up to its next update; closes its data and its tracking at the end of the block."""
    # 1. Join the processes of the run, and build data, model and loss.
    mode, count_note = build_mode(run.run_config), None
    if run.run_config.settings.budget is not None:
        run, count_note = count_updates(run, mode, tools.add_teacher or (lambda workload: workload))
    settings = run.run_config.settings
    if mode.device.type == "cuda":  # this process may have trained other runs
        torch.cuda.reset_peak_memory_stats(mode.device)
    checkpoint = mode.ranks.broadcast(run.checkpoint)  # rank 0 has loaded it
    workload = build_workload(run.run_config, checkpoint, parallel=mode, identified=SPLITS)
    if run.run_config.validation:
        workload = with_validation_sets(workload, identifies=True)
    if checkpoint is not None:
        refuse_other_data(workload, checkpoint)  # before the folder is changed
    if tools.add_teacher is not None:
        workload = tools.add_teacher(workload)
    check_crops(workload)
    batches = training_batches(workload)
    mode.ranks.refuse_difference("batches of an epoch", len(batches))
    length = length_of_run(settings, batches, checkpoint)
    horizon_note = None if checkpoint is None else check_horizon(run.run_config, length, checkpoint, run.overrides)
    is_shown = mode.ranks.is_main
    with (
        contextlib.closing(workload),
        open_tracking(run, checkpoint, console) if is_shown else Tracking.silent() as tracking,
    ):
        # 2. Find the learning rate (optimizer.lr=auto); a resumed run keeps its learning rate.
        found_lr = None if checkpoint is None else checkpoint.found_lr
        if workload.run_config.auto_lr and tools.find_lr is not None:
            found_lr = tools.find_lr(workload, tracking, run.folder) if found_lr is None else found_lr
            workload = workload.with_lr(found_lr)

        # 3. Load weights, before the trainer is built: its weight average starts at them.
        if checkpoint is None and settings.init_from is not None:
            for line in load_weights(workload.module, Path(settings.init_from), mode, classes=workload.class_names):
                tracking.message(line)

        # 4. Build optimizer, schedule, step and loop, and resume.
        trainer = build_trainer(
            workload,
            run.folder,
            batches,
            length,
            tracking,
            found_lr=found_lr,
            observers=() if tools.observe is None else tools.observe(workload, length, tracking, run.folder),
            user_observers=UserObservers(run.run_config.user_observers if is_shown else ()),
        )
        if checkpoint is not None:
            with blamed("resume: the checkpoint"):
                trainer.load_state_dict(checkpoint.state)

        # 5. Say what runs: the header, what was chosen for `auto`, warnings, and the first batch of a new run.
        log_header(run, workload, length, trainer.progress, tracking)
        for line in notes(workload, trainer.step.optimizer, trainer.graph_obstacle):
            tracking.message(line)
        if trainer.progress.step == 0 and is_shown:
            show_first_batch(workload, trainer.batches, tracking)
        for note in filter(None, (count_note, horizon_note)):
            tracking.message(note)
        yield workload, trainer


def _test(trainer: Trainer, workload: Workload, stop: Interruption, *, is_shown: bool) -> TestReport | None:
    """Tests the best model, which stays loaded in `workload.module`. None if interrupted. Raises `RunError`.

    A run that `is_shown` is tested on the validation set if it has no test set.
    """
    mode, dataset = workload.parallel, workload.dataset
    # The outputs of other tasks are not kept: their validation has shown what there is.
    has_report = dataset.test is None and dataset.val is not None and workload.task.keeps_outputs
    # Rank 0 knows: all ranks evaluate the same split.
    split: TestedSplit = "val" if mode.ranks.broadcast(is_shown) and has_report else "test"
    progress = partial(trainer.tracking.evaluating, split=split)
    try:
        with contextlib.ExitStack() as stack:
            if trainer.best.epoch is None:
                stack.enter_context(evaluation_weights(trainer.step.optimizer, trainer.average))
            else:
                # Rank 0 reads the file, because other nodes may not see the folder; all ranks test the same weights.
                best = mode.ranks.broadcast(load(trainer.checkpoints.best) if mode.ranks.is_main else None)
                assert best is not None
                workload.load(best)
            tested = test_report(workload, progress, stop, split)
    except UserError as error:
        advice = "fix the cause and repeat the command with resume=auto"
        raise RunError(f"training is finished, but the test failed: {error}; {advice}") from error
    metrics = {} if tested is None else tested.metrics
    trainer.train_metrics.warn_if_not_finite(metrics, "test_loss", trainer.tracking.message)
    return tested
