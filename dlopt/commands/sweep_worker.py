"""The process of an element or a worker: `python -m dlopt.commands.sweep_worker FOLDER SHA256 OPTIONS`.

Slurm starts it, and `dlopt sweep work FOLDER` becomes one. OPTIONS is a JSON object (`Options`). An element runs the
jobs of a grid, a worker those of a search, a benchmark or a ladder. They are forked from a server that has imported
torch once (see `dlopt.sweeps.pool`). On a signal, at the time limit of its Slurm job for example, the process stops
them with checkpoints; Slurm starts it again, and it resumes them.
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dlopt.basics.errors import DONE, FAILED, INTERRUPTED, ReportedError, RunError, UserError, disk_failure
from dlopt.basics.folders import RunFolder, short_path
from dlopt.basics.interruption import end_on_signals, flush_streams, print_message
from dlopt.commands.command_table import every_command
from dlopt.config.packages import function
from dlopt.run.job import redact_output
from dlopt.sweeps import pool as pools
from dlopt.sweeps import slurm, submission
from dlopt.sweeps.array import WORKERS, own_numbers, stop_reason
from dlopt.sweeps.element import Element
from dlopt.sweeps.submission import Submission


@dataclass(frozen=True)
class Options:
    """`slots`: jobs at once; `part`: see `array.own_numbers`; the others: see conf/hydra/launcher/slurm.yaml."""

    slots: int
    requeue: int
    stop_on_failure: bool
    part: Sequence[int] | None


def main() -> int:
    """Runs the process given by `sys.argv`; returns its exit code."""
    end_on_signals()
    redact_output()  # Slurm stores it beside the sweep
    sweep, digest, options = Path(sys.argv[1]), sys.argv[2], Options(**json.loads(sys.argv[3]))
    slurm.note_start(sweep / WORKERS)
    try:
        with submission.in_use(sweep):
            submitted = submission.read(sweep)
            if submitted.digest != digest:
                print(f"{sweep}: submitted again since; nothing to do")
                return DONE
            submitted.check(sweep)
            code = work(sweep, submitted, options)
    except (UserError, RunError) as error:
        print_message(str(error))
        return error.code
    except ReportedError as error:
        return error.code
    except OSError as error:
        if (reason := disk_failure(error)) is None:
            raise
        print_message(reason)
        return FAILED
    except KeyboardInterrupt as error:  # before the first job
        print_message(str(error) or "interrupted")
        code = INTERRUPTED
    if code == INTERRUPTED and stop_reason(sweep) is None:
        flush_streams()
        slurm.requeue_element()
    return code


def work(sweep: Path, submitted: Submission, options: Options) -> int:
    """Runs the jobs of this process; returns the exit code: 75 if it was stopped early, 1 if a job failed.

    Raises `UserError`, `RunError`.
    """
    os.chdir(submitted.cwd)
    pool = pools.local(n_jobs=options.slots, stop_on_failure=options.stop_on_failure)
    allocation = slurm.Allocation(submitted.tasks)
    if submitted.tasks > 1:
        pool = replace(pool, slots=1, start=allocation.start)
    # Once a second, because the folder may be on a network file system; the end of a job is noticed at once.
    pool = replace(pool, poll_seconds=1.0, stop_reason=lambda: allocation.reason)
    with submission.recorded_code(sweep, submitted):
        if submitted.command is None:
            return _run_element(sweep, submitted, options, pool, allocation)
        if RunFolder(sweep).is_live():
            raise UserError(f"{sweep}: another sweep is active in this folder")
        pool = replace(pool, stop_reason=lambda: stop_reason(sweep) or allocation.reason)
        pools.of_worker.set(pool)
        os.environ.update(submitted.environment)
        name, *words = submitted.command
        code: int = function(every_command()[name])(words)
    if code == FAILED and options.stop_on_failure and stop_reason(sweep) is None:
        submission.stop(sweep, submitted, "a job failed")
    return code


def _run_element(
    sweep: Path, submitted: Submission, options: Options, pool: pools.Pool, allocation: slurm.Allocation
) -> int:
    """Runs the jobs of an element of a grid, or of a part of one; see `work`."""
    array = submission.own_array(sweep, submitted)
    numbers = own_numbers(array, options.part, os.environ)
    jobs = {number: array.jobs[number] for number in numbers}
    element = Element(sweep, jobs, submitted.environment, submitted.packages, options.requeue)
    if submitted.tasks == 1:
        pools.warm_up()
    try:
        reason = pools.run(element, pool, element.overview)
    except KeyboardInterrupt:
        return INTERRUPTED if element.has_jobs_left() else FAILED if element.has_failed else DONE
    if reason is not None and reason == allocation.reason:
        return INTERRUPTED
    if reason is not None:
        print(f"{short_path(sweep)}: {reason}: stopping the other elements", flush=True)
        submission.stop(sweep, submitted, reason)
    return FAILED if element.has_failed else DONE


if __name__ == "__main__":
    exit_code = main()
    flush_streams()
    os._exit(exit_code)
