"""A run: build everything, fit, test the best model once, write the summary."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dlopt import build, schedules
from dlopt.analysis import lr_range
from dlopt.analysis.diagnosis.live import Diagnostics
from dlopt.analysis.profiling import Profile, Profiling
from dlopt.analysis.profiling import table as profile_table
from dlopt.build import Setup
from dlopt.config.experiment import Experiment
from dlopt.config.rules import further_figure
from dlopt.data.batches import Batches
from dlopt.data.samplers import Attentive
from dlopt.engine.averaging import ExponentialAverage, at_evaluation_point
from dlopt.engine.checkpoint import Checkpoints, load
from dlopt.engine.evaluate import evaluate
from dlopt.engine.interruption import Interruption
from dlopt.engine.loop import Progress, Training, fit
from dlopt.engine.metrics import Reduce, Sums, sample_losses
from dlopt.engine.observed import ObservedUpdate, Observer
from dlopt.engine.pipelined import PipelinedClosure
from dlopt.engine.recovery import Recovery
from dlopt.engine.shared import SharedClosure
from dlopt.engine.step import Closure, Update
from dlopt.engine.stopping import Best
from dlopt.errors import RunError, UserError
from dlopt.evaluation.validation import further_figures
from dlopt.parallel.pace import Pace
from dlopt.random import stream
from dlopt.tracking.tracking import Tracking


@dataclass(frozen=True)
class Run:
    """What is to be run, and where."""

    experiment: Experiment
    folder: Path
    checkpoint: Mapping[str, Any] | None = None  # go on from here
    choices: Mapping[str, str] = field(default_factory=dict)  # group -> name of the YAML file, for showing


def train(run: Run, *, console: bool = True) -> dict[str, Any]:
    """Trains and tests. Returns the summary, which is also written to summary.json.

    Raises `UserError` before the first update when something cannot work, `RunError` when the run fails later.
    """
    settings, state = run.experiment.settings, run.checkpoint
    with Interruption(settings.max_time) as interruption:
        parallel = build.parallel_of(run.experiment)
        state = parallel.broadcast(state)
        run = replace(run, checkpoint=state)
        setup = build.set_up(run.experiment, None if state is None else state["normalize"], parallel=parallel)
        batches = build.training_batches(setup)
        length = length_of(setup, len(batches), state)
        tracking = _tracking(run, console) if parallel.is_main else Tracking(None, sinks=[], console=False)
        with tracking:
            setup = _with_lr(setup, run, tracking)
            training = training_of(setup, run, batches, length, tracking)
            _observe(training, setup, run, tracking)
            if state is not None:
                training.load_state_dict(state)
                training.best.load_state_dict(parallel.broadcast(training.best.state_dict()))  # what rank 0 found
            elif settings.init_from is not None:
                for line in build.load_weights(setup.module, Path(settings.init_from), parallel.load_model):
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


def _with_lr(setup: Setup, run: Run, tracking: Tracking) -> Setup:
    """Where it is optimizer.lr=auto: with the learning rate of the checkpoint, or one that is found now."""
    experiment = setup.experiment
    if not experiment.auto_lr:
        return setup
    rate = None if run.checkpoint is None else run.checkpoint["progress"].get("found_lr")
    if rate is None:
        lr_range.load_first_weights(setup)
        silent = Tracking(None, sinks=[], console=False)

        def trial(setup: Setup) -> Training:
            batches = build.training_batches(setup)
            return training_of(setup, replace(run, experiment=setup.experiment), batches, Length(1, 1, 1, 1), silent)

        found = lr_range.find(setup, lr_range.Sweep(), trial)
        rate = found.steepest
        if rate is None:
            raise UserError("optimizer.lr=auto: the loss fell with no learning rate; type a number")
        tracking.message(f"optimizer.lr=auto: found {rate:.3g} (see find_lr.png) in {len(found.rates)} updates")
        if setup.parallel.is_main:
            with contextlib.suppress(OSError):  # a full disk shows itself at the first checkpoint
                lr_range.write(found, run.folder, "Learning-rate range test")
    optimizer = experiment.optimizer.partial(lr=rate)
    return replace(setup, experiment=replace(experiment, optimizer=optimizer, auto_lr=False))


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


def _tracking(run: Run, console: bool) -> Tracking:
    settings, progress = run.experiment.settings, (run.checkpoint or {}).get("progress")
    return Tracking(
        run.folder,
        sinks=settings.tracking,
        console=console,
        log_every_steps=settings.log_every_steps,
        resume_from=progress and (progress["epoch"], progress["step"]),
    )


def training_of(setup: Setup, run: Run, batches: Batches, length: Length, tracking: Tracking) -> Training:
    experiment, settings = run.experiment, run.experiment.settings
    sampler = batches.sampler if isinstance(batches.sampler, Attentive) else None
    build.check_single_values(setup)
    optimizer = build.optimizer_of(setup)
    if sampler is not None and setup.parallel.processes > 1:
        if not hasattr(setup.parallel, "maximum"):
            raise UserError(
                f"sampler={experiment.sampler.target.__name__}: its order follows the samples' losses, which "
                f"processes of parallel={setup.parallel.name} do not tell each other; "
                "use parallel=ddp or another sampler"
            )
        sampler.maximum = setup.parallel.maximum
    if sampler is not None and settings.on_divergence == "skip":
        raise UserError(
            f"on_divergence=skip: sampler={experiment.sampler.target.__name__} learns from the losses of every update; "
            "use on_divergence=rollback or another sampler"
        )
    several = setup.parallel.processes > 1
    shared = PipelinedClosure if hasattr(setup.parallel, "run_batch") else SharedClosure
    kind = partial(shared, parallel=setup.parallel) if several else Closure
    closure = kind(
        model=setup.model,
        module=setup.module,
        loss=setup.loss,
        optimizer=optimizer,
        clip=experiment.clip.build(model=setup.module),
        autocast=setup.precision.autocast,
        scaler=setup.precision.scaler(),
        accumulate=settings.accumulate,
        seed=stream(settings.augmentation_seed, build.DROPOUT),
    )
    factor = schedules.build(
        experiment.schedule.build, experiment.warmup, steps=length.horizon, steps_per_epoch=length.steps_per_epoch
    )
    if settings.on_out_of_memory == "halve":
        if several:
            raise UserError(
                f"on_out_of_memory=halve: not with {setup.parallel.processes} processes, which would have to cut their "
                "batches at the same time; set accumulate instead"
            )
        closure.halves = True
    reduce = _reduction(setup)
    checkpoints = Checkpoints(
        run.folder / "checkpoints",
        settings.checkpoint.keep,
        writes=setup.parallel.is_main,
        asynchronous=settings.checkpoint.asynchronous,
    )
    recovery = Recovery(
        settings.on_divergence,
        attempts=settings.recovery.attempts,
        lr_factor=settings.recovery.lr_factor,
        newest=lambda: setup.parallel.broadcast(checkpoints.load_newest() if setup.parallel.is_main else None),
        tell=tracking.message,
    )
    average = None if settings.ema is None else ExponentialAverage(setup.module, settings.ema)
    stopping = experiment.stopping.build(model=setup.module, norm=setup.parallel.norm)
    schedule = schedules.Scheduler(optimizer, factor)
    kind_of_update = ObservedUpdate if settings.diagnostics or settings.profile else Update
    update = kind_of_update(
        closure,
        schedule,
        evaluations=build.evaluations(setup, optimizer),
        after=[each for each in (average and average.update, getattr(stopping, "after_update", None)) if each],
        check_now=setup.device.type == "cpu" or settings.check == "step" or settings.on_divergence == "skip",
        skip=recovery.skip if settings.on_divergence == "skip" else None,
    )
    return Training(
        module=setup.module,
        update=update,
        batches=setup.parallel.batches(batches),
        validate=_validation(setup, optimizer, average, tracking),
        tracking=tracking,
        checkpoints=checkpoints,
        stopping=stopping,
        best=Best(settings.monitor),
        average=average,
        normalize=setup.normalize,
        config=experiment.config,
        steps=length.steps,
        epochs=length.epochs,
        progress=Progress(
            horizon=length.horizon,
            data=build.data_facts(setup),
            found_lr=setup.experiment.optimizer.arguments["lr"] if experiment.auto_lr else None,
        ),
        evaluate_every=settings.evaluate.every_epochs,
        save_every_epochs=settings.checkpoint.every_epochs,
        save_every_steps=settings.checkpoint.every_steps,
        log_every_steps=settings.log_every_steps,
        landmark=_landmarks(setup, schedule),
        sums=Sums(setup.classify, None if sampler is None else _teaching(sampler, setup.loss), reduce),
        align=lambda: _align(setup, average),
        states=setup.parallel,
        sampler=sampler,
        figures=getattr(batches.sampler, "figures", dict),
        pace=Pace(setup.parallel.group, setup.device, getattr(setup.parallel, "waiting", None)) if several else None,
        recovery=recovery,
    )


def _align(setup: Setup, average: ExponentialAverage | None) -> None:
    setup.parallel.align(setup.module)
    if average is not None:
        with average.in_place():
            setup.parallel.align(setup.module)


def _landmarks(setup: Setup, schedule: schedules.Scheduler) -> Callable[[int], str | None]:
    """After how many updates a checkpoint is kept for good, and its name: snapshots of a schedule with restarts
    (Huang et al. 2017, Snapshot Ensembles)."""
    if not setup.experiment.settings.checkpoint.at_restarts:
        return lambda step: None
    if schedule.ended_cycle is None:
        raise UserError(
            "checkpoint.at_restarts=true: this schedule has no restarts; "
            "use schedule=cosine_restarts or schedule=cosine_warmup_restarts"
        )
    ended = schedule.ended_cycle

    def landmark(step: int) -> str | None:
        cycle = ended(step - 1)
        return None if cycle is None else f"restart-{cycle}"

    return landmark


def _teaching(sampler: Attentive, loss: nn.Module) -> Callable[[Tensor, Tensor], None]:
    """Tells `sampler` the losses of the samples that it has served."""
    return lambda outputs, targets: sampler.observe(sample_losses(loss, outputs, targets))


def _reduction(setup: Setup) -> Reduce | None:
    """How sums over a batch become those over all processes' parts of it."""
    return setup.parallel.total if setup.parallel.processes > 1 else None


def _validation(
    setup: Setup, optimizer: torch.optim.Optimizer, average: ExponentialAverage | None, tracking: Tracking
) -> Any:
    """The validation of the model, or of its average; None where there is no validation set."""
    samples, early = setup.dataset.val, "monitor" in setup.experiment.stopping.arguments
    if samples is None:
        if early:
            raise UserError("stopping=early: there is no validation set; set data.val_split=0.1 or stopping=none")
        return None
    further = further_figures(setup)
    module, model = setup.module, setup.precision.autocast(setup.model)
    batches = build.evaluation_batches(setup, samples)

    def shown() -> Iterator[tuple[Tensor, Tensor]]:
        for number, batch in enumerate(batches.epoch(0), 1):
            yield batch
            tracking.evaluating(number, len(batches))

    def validate(interruption: Interruption) -> dict[str, float] | None:
        with at_evaluation_point(optimizer, average), build.norm_statistics(setup, module, model, interruption):
            return evaluate(
                module,
                model,
                shown(),
                setup.loss,
                classify=setup.classify,
                prefix="val",
                interruption=setup.parallel.polled(interruption),
                reduce=_reduction(setup),
                more=further and further(),
            )

    return validate


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
    for line in build.warnings(setup):
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


def test_figures(setup: Setup) -> dict[str, Any]:
    """test_loss and, in a classification, test_accuracy of the model as it stands; {} where there is no test set."""
    if setup.dataset.test is None:
        return {}
    batches = build.evaluation_batches(setup, setup.dataset.test)
    model = setup.precision.autocast(setup.model)
    with build.norm_statistics(setup, setup.module, model):
        figures = evaluate(
            setup.module,
            model,
            batches.epoch(0),
            setup.loss,
            classify=setup.classify,
            prefix="test",
            reduce=_reduction(setup),
        )
    assert figures is not None
    return figures


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
