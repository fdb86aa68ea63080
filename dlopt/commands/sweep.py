"""`dlopt sweep`: looks at a sweep from its folder, and stops, resumes and joins one that was submitted."""

import os
import shlex
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from dlopt.basics.emphasis import print_emphasized
from dlopt.basics.errors import DONE, UserError
from dlopt.basics.folders import ENDED, SPACE, short_path
from dlopt.basics.formats import format_count, printable
from dlopt.basics.names import Names
from dlopt.basics.ranges import Count
from dlopt.commands.command_table import every_command
from dlopt.commands.completion import folders
from dlopt.commands.shared.command_line import take_command_keys
from dlopt.commands.shared.document import print_document
from dlopt.config.packages import function
from dlopt.config.resuming import in_folder

if TYPE_CHECKING:
    from dlopt.sweeps.status import SweepStatus

USAGE = """\
Look at a series of runs, stop or resume it, or run a part of a submitted one

Usage:
  dlopt sweep status FOLDER [--json]
  dlopt sweep wait FOLDER
  dlopt sweep stop FOLDER|RUN
  dlopt sweep resume FOLDER
  dlopt sweep work FOLDER [part=I/N] [n_jobs=N] [trust=SHA256]

FOLDER: of a sweep, a search, a comparison, a benchmark, a ladder or a judged proposal, which runs in another shell or
was submitted: `dlopt train -m hydra/launcher=slurm ...` lets a job array run a sweep without the shell that
started it. (`dlopt train -m` starts a sweep; this command does not.)

  status :: counts of jobs, from their run folders, and of the elements in Slurm's queue. Exit code 0: all jobs have \
ended; 1: they have, and some failed; 75: some are queued, running or interrupted
  wait :: show the progress until the last job has ended, then the leaderboard; exit code as for status
  stop :: stop all of its processes, or cancel its job array (scancel): running jobs write checkpoints. RUN: \
stop this job only; the others continue
  resume :: repeat the command of the series, which runs what is left; of a submitted one, submit an array of the \
elements with jobs that failed, were interrupted or have not started
  work :: run jobs of the sweep on this machine: those of `part`, or of the index of a job array (Slurm, PBS, SGE, \
LSF, AWS Batch, Kubernetes), else all. It must see FOLDER under the same path

Keys of status:
  {_status}

Keys of work:
  {_work}

Examples:
  dlopt sweep status outputs/train/DATE
  dlopt sweep stop outputs/train/DATE/3
  dlopt sweep work outputs/train/DATE part=3/64
"""

_Trust = Annotated[
    str | None, "SHA256: run the code in FOLDER although another user has submitted it; its first 12 digits or more"
]
_MOST_FAILURES = 20  # that status lists
complete = folders


def sweep(arguments: list[str]) -> int:
    """Runs a part of `dlopt sweep`. Raises `UserError`."""
    parts: dict[str, Callable[..., int]] = {
        "status": _status, "wait": _wait, "stop": _stop, "resume": _resume, "work": _work,
    }  # fmt: skip
    if not arguments or arguments[0] not in parts:
        raise UserError(_start(arguments, parts))
    name, function = arguments[0], parts[arguments[0]]
    values, rest = take_command_keys(function, arguments[1:], "sweep")
    if len(rest) != 1:
        raise UserError(f"sweep {name}: needs the folder of one sweep: dlopt sweep {name} outputs/train/DATE")
    return function(Path(rest[0]), **values)


def _start(arguments: Sequence[str], parts: Iterable[str]) -> str:
    """Returns the message for a line that is no part of this command; for the start of a sweep, how to start it."""
    if any("=" in each for each in arguments):
        return f"sweep {' '.join(arguments)}: use `dlopt train -m {' '.join(arguments)}`"
    typed = arguments[0] if arguments else ""
    return f"sweep {typed}: needs one of these words; {Names('word', [*parts]).hint(typed)}"


def _status(folder: Path, *, json: Annotated[bool, "--: print a JSON document"] = False) -> int:
    """Prints how far a sweep is; returns its exit code. Raises `UserError`."""
    status = _read(folder)
    if json:
        print_document(_document(folder, status))
    else:
        _print(folder, status)
    return status.code


def _read(folder: Path) -> "SweepStatus":
    from dlopt.sweeps.status import StatusReader  # imports NumPy, which the help does not need

    return StatusReader(folder).read()


def _print(folder: Path, status: "SweepStatus") -> None:
    from dlopt.sweeps.slurm_queue import array_ids, describe_counts

    counts = status.counts
    names = ("finished", "stopped_early", "pruned", "running", "queued", "interrupted", "unfinished", "failed")
    shown = [f"{counts[name]} {name.replace('_', ' ')}" for name in names if counts[name]]
    print(f"{format_count('jobs', sum(counts.values()))}: {', '.join(shown) or 'none yet'}")
    if workers := describe_counts(len(status.workers), status.waiting):
        what = f"elements of Slurm job {', '.join(status.slurm)}" if status.slurm else "workers"
        print(f"{what}: {workers}")
    for reason, count in status.pending.items():
        print(printable(f"  {count} pending: {reason}"))
    for job in status.jobs:
        if job.status == "running":
            print(printable(f"  job {job.number}: {job.label}" + (f"  ({job.worker})" if job.worker else "")))
    failed = [job for job in status.jobs if job.status == "failed"]
    for job in failed[:_MOST_FAILURES]:
        print(printable(f"  {short_path(job.folder)} failed: {' '.join(job.reason.split())[:200]}"))
    if len(failed) > _MOST_FAILURES:
        print(f"  and {len(failed) - _MOST_FAILURES} more: dlopt runs {_quoted(folder)} status=failed")
    if status.stop_reason is not None:
        print(printable(f"stopped: {status.stop_reason}"))
    if not status.answers:
        print("warning: squeue does not answer")
    if status.early:
        print(printable("ended early: " + ", ".join(f"{name} {state}" for name, state in status.early.items())))
    path = _quoted(folder)
    if status.is_lost:
        from dlopt.sweeps import series
        from dlopt.sweeps.array import is_submitted

        is_left = is_submitted(folder) and not array_ids(folder)
        how = f"dlopt sweep {'work' if is_left else 'resume'} {path}"
        if not is_submitted(folder) and not (folder / series.SERIES).exists():
            how = f"its command with {shlex.join(in_folder(folder))}"
        print(f"nothing runs the jobs that are left; to continue: {how}")
    elif status.code == DONE and (folder / SPACE).exists():  # not the folder of another command
        print_emphasized(f"next:\n  dlopt report {path}")


def _quoted(folder: Path) -> str:
    return shlex.quote(short_path(folder))


def _document(folder: Path, status: "SweepStatus") -> dict[str, Any]:
    from dlopt.results import documents
    from dlopt.results.ranking import of_folder
    from dlopt.sweeps.slurm_queue import array_ids

    has_ended = any(job.status in ENDED for job in status.jobs)
    return {
        "folder": str(folder.absolute()),
        "exit_code": status.code,
        "total": status.total,
        "counts": dict(status.counts),
        "jobs": [
            {
                "number": job.number,
                "folder": str(job.folder.absolute()),
                "label": job.label,
                "status": job.status,
                "worker": job.worker or None,
                "reason": job.reason or None,
            }
            for job in status.jobs
        ],
        "workers": list(status.workers),
        "waiting_workers": status.waiting,
        "pending_reasons": dict(status.pending),
        "slurm_jobs": list(status.slurm),
        "slurm_arrays": array_ids(folder),
        "slurm_answers": status.answers,
        "ended_early": dict(status.early),
        "stop_reason": status.stop_reason,
        "skipped": documents.skipped_entries(status.damaged),
        "leaderboard": documents.leaderboard_entry(of_folder(folder)) if has_ended else None,
    }


def _wait(folder: Path) -> int:
    """Waits for the end of a sweep; returns its exit code. Raises `UserError`."""
    from dlopt.sweeps.status import wait

    status, _ = wait(folder)
    print()
    _print(folder, status)
    return status.code


def _stop(folder: Path) -> int:
    """Stops a series, or one of its runs. Raises `UserError`."""
    from dlopt.sweeps import array, series, submission  # with Hydra, which the help and the status do not need

    if series.of_run(folder) is not None:
        series.stop_run(folder)
        print(f"stopping this job, which writes a checkpoint; the others continue\nto continue it: {_again(folder)}")
        return DONE
    if not array.is_submitted(folder) and series.read(folder) is not None:
        series.stop(folder, "dlopt sweep stop")
        print(f"stopping its jobs, which write checkpoints; to continue: dlopt sweep resume {_quoted(folder)}")
        return DONE
    submitted, _ = submission.read_own(folder, "stop")
    cancelled = submission.stop(folder, submitted, "dlopt sweep stop")
    resume = f"to continue: dlopt sweep resume {_quoted(folder)}"
    if submitted.command is None:
        print(f"cancelled {format_count('elements', cancelled)}, whose jobs write checkpoints; {resume}")
    else:
        print(f"stopping its workers, whose jobs write checkpoints; {resume}")
    return DONE


def _again(run: Path) -> str:
    """Returns the command that runs a job of a series again."""
    from dlopt.sweeps import series

    return f"dlopt sweep resume {_quoted(series.of_run(run) or run)}"


def _resume(folder: Path) -> int:
    """Runs or submits what is left of a series. Raises `UserError`."""
    from dlopt.sweeps import array, series, submission

    if not array.is_submitted(folder) and (found := series.read(folder)) is not None:
        if not found.is_own:
            raise UserError(f"{short_path(folder)}: only the user who has started this series can resume it")
        name, *words = found.command
        print(shlex.join(["dlopt", *found.command]), flush=True)
        os.chdir(found.cwd)
        code: int = function(every_command()[name])(words)
        return code
    count, job_id = submission.resume(folder)
    how = "none was submitted (hydra.launcher.n_jobs=0)" if job_id is None else f"Slurm job {job_id}"
    print(f"resumed: {format_count('elements', count)}, {how}")
    print_emphasized(f"next:\n  dlopt sweep status {_quoted(folder)}")
    return DONE


def _work(
    folder: Path,
    *,
    part: Annotated[str | None, "I/N: run part I of N, from 1 (default: that of a scheduler's index, or all)"] = None,
    n_jobs: Annotated[Count, "N: jobs at once (default: 1)"] = 1,
    trust: _Trust = None,
) -> int:
    """Becomes a process that runs jobs of a submitted sweep. Raises `UserError`."""
    from dlopt.sweeps import submission
    from dlopt.sweeps.array import parse_part

    submission.become_worker(folder, trust, n_jobs, None if part is None else parse_part(part))
    return DONE
