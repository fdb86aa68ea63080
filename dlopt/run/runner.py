"""Runs a checked plan (`run`): finds its folder, and executes the run there, as a job or a rank does (`execute`)."""

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.utils import configure_log, env_override
from omegaconf import DictConfig

from dlopt.basics.errors import DONE, INTERRUPTED, USER_ERROR, ReportedError, RunError, UserError
from dlopt.basics.folders import LAUNCHER_LOCK, SHELL_FOLDER, RunFolder
from dlopt.basics.interruption import Interruption, killed_by_signals, print_message, streams_kept
from dlopt.basics.locks import global_state_held
from dlopt.config.plan import Plan
from dlopt.config.resolve import first_lines, job_variables, resolve_saved
from dlopt.config.resuming import shortened
from dlopt.machine.world import current
from dlopt.parallel.processes import launch, rendezvous
from dlopt.parallel.processes.hung import end_if_hung
from dlopt.run.folder import place
from dlopt.run.record import NotStartedError, described, is_job_of_sweep, report
from dlopt.tracking.notify import notify_of_run
from dlopt.tracking.remote import check as check_tracking

if TYPE_CHECKING:
    from torch.distributed import Store

    from dlopt.tasks.report import TestReport
    from dlopt.training.builders.workload import Workload
    from dlopt.training.progress import TrainingRun
    from dlopt.training.run import Tools

CODE_OF = {"finished": DONE, "stopped_early": DONE, "interrupted": INTERRUPTED}
"""The exit code of a run by the status in its summary."""


def run(
    plan: Plan, *, store: "Store | None" = None, console: bool = True, from_python: bool = False
) -> tuple[RunFolder, dict[str, Any]]:
    """Runs a checked plan; returns its folder, and its summary as in summary.json.

    Args:
        store: through which the other ranks of a launcher `follow`.
        from_python: a call of `dlopt.train`: errors are not printed but raised as they are, and neither logging nor
            the environment of the process change.

    Raises:
        UserError: the run cannot start; a new folder is removed again.
        ReportedError: the run has failed, and has reported why.
    """
    # 1. Find the folder: a new one, or the folder of the run to resume, with its newest checkpoint.
    attempt = place(plan)
    folder, settings = attempt.folder, plan.run_config.settings
    if attempt.is_done:
        summary = folder.summary() or {}
        if not from_python:
            from dlopt.tracking.console import ConsoleView

            longer = shortened(folder, plan.saved)
            after = "" if longer is None else f", after {longer}"
            ConsoleView().finish(summary, [f"this run is already finished{after}: {folder.path}"])
        return folder, summary
    if settings.resume == "auto" and attempt.is_new and not from_python:
        print("resume=auto: no unfinished run of this config found; starting a new run", flush=True)
    attempt.refuse_other_run()

    has_started = False
    try:
        # 2. Prepare this process and the tracking services.
        assert plan.config is not None
        with contextlib.nullcontext() if from_python else job_environment(plan.config, folder.path):
            if attempt.run.checkpoint is None:  # a resumed run warns instead
                check_tracking(settings.tracking, settings.name)

            # 3. Send the run to the other ranks of a launcher. One that was refused above is never sent: `release`
            #    ends the ranks that wait for it.
            if store is not None:
                config = attempt.run.run_config.config
                store.set("run", json.dumps({"config": config, "folder": str(folder.path), "choices": plan.choices}))

            # 4. Lock, describe, train.
            has_started = True
            summary = execute(attempt.run, console=console, prints=not from_python)
            notify_of_run(settings.notify, folder, settings.name)
            return folder, summary
    except BaseException as error:
        # 5. A refused run leaves no folder; a failed or interrupted one leaves its record.
        if not has_started or getattr(error, "code", None) == USER_ERROR:
            attempt.erase_if_new()
        else:
            notify_of_run(settings.notify, folder, settings.name)
        raise


def execute(
    run: "TrainingRun", *, console: bool = True, prints: bool = True, may_diverge: bool = False
) -> dict[str, Any]:
    """Trains in the folder of the run, in as many processes as it needs; returns the summary.

    Raises `ReportedError` for a run that has failed or was interrupted, and has recorded and printed why; what it met,
    unprinted, without `prints`. `may_diverge`: divergence is a result like any other, and not printed.
    """
    settings, console = run.run_config.settings, console and not launch.is_quiet()
    try:
        with global_state_held("dlopt train", may_be_nested=True):
            from dlopt.training.builders.precision import torch_defaults
            from dlopt.training.run import train_run

            # 1. Lock the folder before it is described: a second start must not replace the config of the active run.
            folder, processes = RunFolder(run.folder), 1
            lock: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
            try:
                if current() is None:
                    processes = launch.count_processes(run.run_config.parallel.arguments, settings.device)
                if rendezvous.is_main():
                    # With child processes, rank 0 takes the lock: that lock held here would refuse it.
                    lock = folder.lock(LAUNCHER_LOCK) if processes > 1 else folder.lock()
            except UserError as error:
                raise NotStartedError(str(error)) from None

            with lock, described(run):
                # 2. Train in this process.
                if processes == 1:
                    console = console and rendezvous.is_main()
                    watch = contextlib.nullcontext() if current() is None else end_if_hung()
                    stop = Interruption(settings.max_time, raises=True)
                    with stop as interruption, streams_kept(), watch, torch_defaults():
                        summary = train_run(run, interruption, tools(run, console=console), console=console)
                        # Inside the context: a repeated signal must not end this rank while it waits for others.
                        rendezvous.leave()
                    return summary

                # 3. Or in child processes, one per rank, which report their errors themselves.
                resume = settings.resume
                checkpoint = None if resume in (None, "auto") else str(RunFolder.to_resume(resume))
                is_job = run.overrides is None
                code = launch.run_group(run.folder, processes, checkpoint, record=is_job, console=console)
                summary = folder.summary() or {}
                if code == INTERRUPTED:  # before a rank wrote anything, or in an attempt after the one that wrote it
                    summary["status"] = "interrupted"
                elif code != DONE:
                    reason = f"{run.folder}: the run failed; its processes report why"
                    raise ReportedError(code, summary.get("reason", reason))
                return summary
    except ReportedError:
        raise
    except (Exception, KeyboardInterrupt) as error:
        code = report(run, error, prints=prints, may_diverge=may_diverge)
        if not prints:
            raise
        raise ReportedError(code) from error


def exit_code(run: "TrainingRun", *, console: bool = True, may_diverge: bool = False) -> int:
    """Executes a run as a job, or as one rank of several; returns its exit code."""
    try:
        return CODE_OF[execute(run, console=console, may_diverge=may_diverge)["status"]]
    except ReportedError as error:
        return error.code


@contextlib.contextmanager
def job_environment(config: DictConfig, folder: Path) -> Iterator[None]:
    """Applies hydra.job_logging, and hydra.job.env_set and hydra.job.chdir until it exits. Raises `UserError`."""
    config.hydra.runtime.output_dir = str(folder)
    try:
        configure_log(config.hydra.job_logging, config.hydra.verbose)
    except (ValueError, OSError) as error:
        raise UserError(f"hydra.job_logging: {first_lines(error)}") from None
    working_directory = contextlib.chdir(folder) if config.hydra.job.chdir else contextlib.nullcontext()
    with env_override({**job_variables(config), SHELL_FOLDER: os.getcwd()}), working_directory:
        yield


def follow(store: "Store", overrides: list[str]) -> int:
    """Executes the run that rank 0 sends, as one of its other ranks; returns the exit code."""
    from dlopt.config.parsing import parse
    from dlopt.training.progress import TrainingRun

    try:
        with killed_by_signals():
            message = json.loads(store.get("run"))
    except RuntimeError:
        raise RunError("rank 0 exited, or did not start the run within parallel.timeout_minutes") from None
    if "exit" in message:
        if (world := current()) and world.is_started_by_hand and message["exit"] != DONE:
            print_message(message["reason"])
        return int(message["exit"])
    run_config = parse(resolve_saved(message["config"]), message["config"], message["choices"])
    return exit_code(TrainingRun(run_config, Path(message["folder"]), None, message["choices"], overrides))


def release(store: "Store", code: int, reason: str = "rank 0 has started no run; its output says why") -> None:
    """Ends the ranks that wait in `follow`, with exit code `code`, if rank 0 has not sent a run."""
    with contextlib.suppress(RuntimeError):  # the launcher that hosts the store may be gone
        store.compare_set("run", "", json.dumps({"exit": code, "reason": reason}))


def tools(run: "TrainingRun", *, console: bool) -> "Tools":
    """Returns what the config enables of the rooms that use a trainer, or trained models."""
    from dlopt.trained.distillation import with_teacher
    from dlopt.training.run import Tools

    settings, chosen = run.run_config.settings, Tools(add_teacher=with_teacher)
    if settings.diagnostics or settings.profile:
        from dlopt.instruments.observers import observers

        chosen = replace(chosen, observe=observers)
    if run.run_config.auto_lr:
        from dlopt.instruments.lr_range import find_lr

        chosen = replace(chosen, find_lr=find_lr)
    # A picture for the person who watches the run: jobs of sweeps, comparisons and calls of the library have a report,
    # or draw themselves; tracking=[] requests the fewest files.
    if console and settings.tracking and not is_job_of_sweep(run):
        chosen = replace(chosen, draw=draw)
    return chosen


def draw(workload: "Workload", folder: Path, restarts: Sequence[float], tested: "TestReport") -> dict[str, Path | str]:
    from dlopt.instruments import evaluation, reconstructions  # late: matplotlib takes long to import
    from dlopt.results import curves

    pictures: dict[str, Path | str] = {"curves": curves.write(folder, restarts)}
    pictures |= evaluation.write_of_run(folder, workload, tested)
    # Reconstructions are of test images, by the best model, which the final test has loaded.
    if workload.run_config.settings.evaluate.test and (picture := reconstructions.write(workload, folder)) is not None:
        pictures["reconstructions"] = picture
    return pictures
