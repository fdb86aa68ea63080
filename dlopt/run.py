"""A run: build everything, fit, test the best model once, write the summary."""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from dlopt.analysis import lr_range
from dlopt.analysis.diagnosis.live import Diagnostics
from dlopt.analysis.profiling import Profile, Profiling
from dlopt.analysis.profiling import table as profile_table
from dlopt.assembly.batches import training_batches
from dlopt.assembly.norms import small_batches
from dlopt.assembly.setup import Setup, load_weights, parallel_of, set_up
from dlopt.assembly.speed import chosen
from dlopt.assembly.testing import test_figures
from dlopt.assembly.training import Length, length_of, training_of, unseen
from dlopt.config.experiment import Experiment
from dlopt.config.rules import further_figure
from dlopt.engine.averaging import at_evaluation_point
from dlopt.engine.checkpoint import load
from dlopt.engine.graphed import obstacle
from dlopt.engine.loop import Training, fit
from dlopt.engine.observed import ObservedUpdate, Observer
from dlopt.errors import RunError, UserError
from dlopt.interruption import Interruption
from dlopt.tracking.tracking import Tracking


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
