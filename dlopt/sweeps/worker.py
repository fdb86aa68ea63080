"""The process of a submitted sweep: an element of a grid's array, or a worker of a search, a benchmark or a ladder.

Its jobs are forked from a server that has imported torch once (see `pool`). On a signal, at the time limit of its Slurm
job for example, it stops them with checkpoints; Slurm starts it again, and it resumes them.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dlopt.basics.errors import DONE, FAILED, INTERRUPTED, UserError
from dlopt.basics.folders import RunFolder, short_path
from dlopt.sweeps import pool as pools
from dlopt.sweeps import slurm, submission
from dlopt.sweeps.array import own_numbers
from dlopt.sweeps.element import Element
from dlopt.sweeps.pool import Pool
from dlopt.sweeps.submission import Submission


@dataclass(frozen=True)
class Options:
    """`slots`: jobs at once; `part`: see `array.own_numbers`; the others: see conf/hydra/launcher/slurm.yaml."""

    slots: int
    requeue: int
    stop_on_failure: bool
    part: Sequence[int] | None


def work(sweep: Path, submitted: Submission, options: Options, run_command: Callable[[Sequence[str]], int]) -> int:
    """Runs the jobs of this process; returns the exit code: 75 if it was stopped early, 1 if a job failed.

    `run_command`: runs a command of dlopt, and returns its exit code. Raises `UserError`, `RunError`.
    """
    os.chdir(submitted.cwd)
    pool = pools.local(n_jobs=options.slots, stop_on_failure=options.stop_on_failure)
    allocation = slurm.Allocation(submitted.tasks)
    if submitted.tasks > 1:
        pool = replace(pool, slots=1, start=allocation.start)
    # Once a second, because the folder may be on a network file system; the end of a job is noticed at once.
    pool = replace(pool, poll_seconds=1.0, stop_reason=lambda: allocation.reason)
    if submitted.command is None:
        with submission.recorded_code(sweep):
            return _run_element(sweep, submitted, options, pool, allocation)
    if RunFolder(sweep).is_live():
        raise UserError(f"{sweep}: another sweep is active in this folder")
    pool = replace(pool, stop_reason=lambda: submission.stop_reason(sweep) or allocation.reason)
    with submission.recorded_code(sweep), _pool_of_commands(pool):
        os.environ.update(submitted.environment)
        code = run_command(submitted.command)
    if code == FAILED and options.stop_on_failure and submission.stop_reason(sweep) is None:
        submission.stop(sweep, submitted, "a job failed")
    return code


def _run_element(sweep: Path, submitted: Submission, options: Options, pool: Pool, allocation: slurm.Allocation) -> int:
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


@contextlib.contextmanager
def _pool_of_commands(pool: Pool) -> Iterator[None]:
    token = pools.of_worker.set(pool)
    try:
        yield
    finally:
        pools.of_worker.reset(token)
