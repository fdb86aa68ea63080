"""One run as a job: exit code, error messages, and the files that describe the run.

`python -m dlopt.run.job FOLDER [CHECKPOINT]` runs the config FOLDER/config.yaml from that checkpoint, by default from
the newest one in the folder. The jobs of a sweep and the ranks of a parallel run are started this way, each as a
separate process: a killed job does not affect the others.
"""

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlopt.basics.errors import DONE, FAILED, INTERRUPTED, USER_ERROR, RunError, UserError
from dlopt.basics.files import read_json, write_atomically, write_json, write_yaml
from dlopt.basics.folders import FORMAT, LAUNCHER_LOCK, RunFolder, new_run_id
from dlopt.basics.interruption import Interruption, flush_streams, print_line, streams_kept
from dlopt.basics.secrets import RedactedStream, note_environment, redact_bytes
from dlopt.config.keys import LABELS
from dlopt.config.overrides import is_typed, storable
from dlopt.config.resuming import how_to_resume
from dlopt.parallel.processes import launch, rendezvous
from dlopt.parallel.processes.hung import end_if_hung
from dlopt.run import environment

if TYPE_CHECKING:
    from dlopt.training.builders.workload import Workload
    from dlopt.training.progress import Run

CODE_OF = {"finished": DONE, "stopped_early": DONE, "interrupted": INTERRUPTED}


class NotStartedError(UserError):
    """A run that cannot start, for example because another process has it: its folder stays as it is."""


@dataclass
class Outcome:
    """What became of a run."""

    code: int = FAILED


def execute(run: "Run", *, console: bool = True, may_diverge: bool = False) -> int:
    """Runs in this process and returns the exit code; see `reported`."""
    outcome = Outcome()
    with reported(run, outcome, may_diverge=may_diverge):
        outcome.code = start(run, console=console and not is_quiet())
    return outcome.code


def is_quiet() -> bool:
    return os.environ.get(launch.QUIET) == "1"


@contextlib.contextmanager
def reported(run: "Run", outcome: Outcome, *, may_diverge: bool = False) -> Iterator[None]:
    """Context of `start`: turns an error into one message, a record in the run's folder, and an exit code.

    A context instead of a function that calls `start`: few frames separate `main` from the update.
    `may_diverge`: divergence is a result of the run like any other, and only recorded.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        outcome.code = record(run, error, may_diverge=may_diverge)


def record(run: "Run", error: Exception | KeyboardInterrupt, *, prints: bool = True, may_diverge: bool = False) -> int:
    """Writes why `start` ended to the run's folder, prints it, and returns the exit code; see `reported`."""
    from dlopt.training.nonfinite import Diverged

    if isinstance(error, KeyboardInterrupt):
        if prints and rendezvous.is_main():
            print_error(f"interrupted; {how_to_resume(RunFolder(run.folder), rendezvous.is_launched())}")
        return INTERRUPTED
    if isinstance(error, NotStartedError):
        if prints:
            print_error(str(error))
        return error.code
    code, reason = failure(error)
    if not rendezvous.first_to_fail():
        return code
    diverged, frames = isinstance(error, Diverged), None
    message = reason
    if reason is None:
        frames = traceback.format_exc()
        with contextlib.suppress(OSError):
            write_atomically(run.folder / "traceback.txt", frames)
        reason = f"{_rank_prefix()}{type(error).__name__}: {error}"
        message = f"{_rank_prefix()}the run failed: {type(error).__name__}: {error}"
    if prints and not (may_diverge and diverged):
        print_error(str(message))
    # A folder that existed before keeps the reason of a UserError; a new one is removed.
    if code == FAILED or _is_job_of_sweep(run):
        _record_failure(run.folder, reason, diverged=diverged)
    if prints and frames is not None:
        print_line(frames)
    return code


def failure(error: Exception) -> tuple[int, str | None]:
    """Returns the exit code of a rank for an error, and its message; None for a bug, which needs a traceback.

    All ranks that the error reaches call this together.
    """
    if isinstance(error, UserError | RunError):
        return error.code, f"{_rank_prefix()}{error}"
    if missing := rendezvous.missing_ranks(error):
        ranks = ", ".join(map(str, missing))
        return FAILED, f"rank {ranks} exited, or did not respond within parallel.timeout_minutes (hung or overloaded)"
    return FAILED, None


def _rank_prefix() -> str:
    world = rendezvous.current()
    return "" if world is None or world.is_main else f"rank {world.rank}: "


def _is_job_of_sweep(run: "Run") -> bool:
    """Returns whether a sweep has described the run, which this process, or one rank of it, executes."""
    return run.overrides is None if rendezvous.current() is None else os.environ.get(launch.RECORD) == "1"


def _claim(run: "Run") -> tuple[int, contextlib.AbstractContextManager[object]]:
    """Returns the number of processes of the run (1: this one) and the lock on its folder."""
    processes = 1
    try:
        if rendezvous.current() is None:
            processes = launch.count_processes(run.experiment.parallel.arguments, run.experiment.settings.device)
        if not rendezvous.is_main():
            return processes, contextlib.nullcontext()
        # With child processes, rank 0 takes the lock: that lock held here would refuse it.
        return processes, RunFolder(run.folder).lock(*([LAUNCHER_LOCK] if processes > 1 else []))
    except UserError as error:
        raise NotStartedError(str(error)) from None


def start(run: "Run", *, console: bool) -> int:
    """Describes a run in its folder, trains, and returns the exit code.

    Raises `UserError`, `RunError` and unexpected exceptions. A resumed run that is refused keeps the files that
    describe it.
    """
    from dlopt.training.builders.precision import torch_defaults
    from dlopt.training.run import train_run

    processes, lock = _claim(run)
    with lock, _described(run) as outcome:
        if processes > 1:
            resume = run.experiment.settings.resume
            checkpoint = None if resume in (None, "auto") else str(RunFolder.to_resume(resume))
            outcome.code = launch.run_group(
                run.folder, processes, checkpoint, record=run.overrides is None, console=console
            )
            return outcome.code
        is_shown = console and rendezvous.is_main()
        watch = contextlib.nullcontext() if rendezvous.current() is None else end_if_hung()
        stop = Interruption(run.experiment.settings.max_time)
        with stop as interruption, streams_kept(), watch, torch_defaults():
            summary = train_run(run, interruption, console=is_shown, **tools(run, console=is_shown))
            rendezvous.leave()  # inside the context: a repeated signal must not end this rank while it waits for others
    return CODE_OF[summary["status"]]


@contextlib.contextmanager
def _described(run: "Run") -> Iterator[Outcome]:
    """Writes the files that describe a run; a refused run that was resumed gets its former ones back."""
    is_described_here, outcome = run.overrides is not None and rendezvous.is_main(), Outcome()
    names = ("config.yaml", "overrides.yaml", "environment.json", environment.DIFF)
    paths = [run.folder / name for name in names] if is_described_here and run.checkpoint is not None else []
    former = {path: path.read_bytes() if path.is_file() else None for path in paths}
    try:
        if run.overrides is not None and is_described_here:
            describe(run.folder, run.experiment.config, run.overrides, run.choices)
        elif rendezvous.is_main():
            _record_machine(run.folder)
        yield outcome
    except UserError:
        outcome.code = USER_ERROR
        raise
    finally:
        if outcome.code == USER_ERROR:  # here, or in child processes
            for path, data in former.items():
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True) if data is None else write_atomically(path, data)


def tools(run: "Run", *, console: bool) -> dict[str, Any]:
    """Returns the observers, the range test, the teacher and the picture that the config enables, for `train_run`.

    They and the teacher of a distillation are passed in because the trainer does not import what uses trained models.
    """
    from dlopt.trained.distillation import with_teacher

    settings = run.experiment.settings
    chosen: dict[str, Any] = {"add_teacher": with_teacher}
    if settings.diagnostics or settings.profile:
        from dlopt.instruments.observers import observers

        chosen["observe"] = observers
    if run.experiment.auto_lr:
        from dlopt.instruments.lr_range import find_lr

        chosen["find_lr"] = find_lr
    # A picture for the person who watches the run: jobs of sweeps, comparisons and calls of the library have a report,
    # or draw themselves; tracking=[] requests the fewest files.
    if console and settings.tracking and not _is_job_of_sweep(run):
        chosen["draw"] = _draw
    return chosen


def _draw(workload: "Workload", folder: Path, restarts: Sequence[float]) -> dict[str, Path]:
    from dlopt.instruments import reconstructions  # late: matplotlib takes long to import
    from dlopt.results import curves

    pictures = {"curves": curves.write(folder, restarts)}
    # Reconstructions are of test images, by the best model, which the final test has loaded.
    if workload.experiment.settings.evaluate.test and (picture := reconstructions.write(workload, folder)) is not None:
        pictures["reconstructions"] = picture
    return pictures


def print_error(message: str) -> None:
    """Prints an error or a warning to stderr."""
    print_line(f"dlopt: {message}")


def describe(folder: Path, config: Mapping[str, Any], overrides: Sequence[str], choices: Mapping[str, str]) -> None:
    """Writes config.yaml, overrides.yaml, environment.json and, for uncommitted changes of the user's code, code.diff.

    A resumed run keeps its tags and its note, which `dlopt runs tag` may have changed, unless others are typed; and its
    id. Raises `UserError` if the folder is not writable.
    """
    overrides = storable(overrides)
    former, before = RunFolder(folder).config() or {}, RunFolder(folder).history()
    config = {"run_id": RunFolder(folder).run_id() or new_run_id(), **config}
    typed = [line for line in overrides if line not in before]
    config = {**config, **{key: former[key] for key in LABELS if key in former and not is_typed(key, typed)}}
    code, diff = environment.repository()
    facts = {
        "folder_format": FORMAT,
        "choices": dict(choices),
        **environment.versions(),
        **environment.machine(),
        "code": code,
        "allow_packages": environment.packages(config.get("allow_packages") or ()),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_yaml(folder / "config.yaml", config)
        write_yaml(folder / "overrides.yaml", overrides)
        write_json(folder / "environment.json", facts)
        if diff:
            write_atomically(folder / environment.DIFF, redact_bytes(diff))
        else:
            (folder / environment.DIFF).unlink(missing_ok=True)  # of the run that is resumed
    except OSError as error:
        raise UserError(f"hydra.run.dir={folder}: cannot write to this folder: {error.strerror}") from None


def _record_machine(folder: Path) -> None:
    """Updates the machine in environment.json, which the sweep of this job may have written on another one."""
    path = folder / "environment.json"
    saved = read_json(path)
    if saved is not None and saved != (facts := saved | environment.machine()):
        with contextlib.suppress(OSError):
            write_json(path, facts)


def _record_failure(folder: Path, reason: str, *, diverged: bool = False) -> None:
    summary = {"status": "failed", "run_id": RunFolder(folder).run_id(), "reason": reason}
    with contextlib.suppress(OSError):
        write_json(folder / "summary.json", summary | ({"diverged": True} if diverged else {}))


def redact_output() -> None:
    """Redacts what this process prints: the output of a job is stored in its folder.

    A forked job has another environment than the server that imported `dlopt.basics.secrets`.
    """
    note_environment()
    for name in ("stdout", "stderr"):
        setattr(sys, name, RedactedStream(getattr(sys, name)))


def main() -> int:
    """Runs the job given by `sys.argv` and returns its exit code."""
    if rendezvous.RANK in os.environ:
        launch.end_rank_with_parent()
    from dlopt.config.parsing import parse
    from dlopt.config.resolve import resolve_saved
    from dlopt.training.checkpoint.checkpoints import load, load_own
    from dlopt.training.progress import Run

    folder = RunFolder(Path(sys.argv[1]))
    try:
        folder.refuse_newer("dlopt.run.job")
        config = folder.config()
        if config is None:
            raise UserError(f"{folder.path}: config.yaml is missing or unreadable")
        choices = json.loads((folder.path / "environment.json").read_text())["choices"]
        experiment = parse(resolve_saved(config), config, choices)
        state = None
        if rendezvous.is_main():  # the other ranks receive the state from rank 0
            checkpoint = sys.argv[2:]
            state = load(Path(checkpoint[0])) if checkpoint else load_own(folder, config)
        run = Run(experiment, folder.path, state, choices)
    except (UserError, RunError) as error:
        if rendezvous.is_main():
            print_error(str(error))
            _record_failure(folder.path, str(error))
        return error.code
    return execute(run)


if __name__ == "__main__":
    redact_output()
    exit_code = main()
    if rendezvous.current() is not None:
        rendezvous.end_process(exit_code)
    flush_streams()
    sys.exit(exit_code)
