"""A worker of a submitted sweep: runs jobs one after another until none is left.

Each is forked from a server that has imported torch once (see `pool`). On a signal, at the time limit of its Slurm job
for example, a worker stops its job with a checkpoint; it or another worker resumes the job.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dlopt.basics.errors import DONE, FAILED, INTERRUPTED, UserError
from dlopt.basics.folders import RunFolder, short_path
from dlopt.sweeps import pool as pools
from dlopt.sweeps import queue, slurm, submission
from dlopt.sweeps.pool import Pool
from dlopt.sweeps.submission import Submission


@dataclass(frozen=True)
class Options:
    """`slots`: jobs at once; `requeue`, `stop_on_failure`: see conf/hydra/launcher/slurm.yaml."""

    slots: int
    requeue: int
    stop_on_failure: bool


def work(sweep: Path, submitted: Submission, options: Options, run_command: Callable[[Sequence[str]], int]) -> int:
    """Runs jobs of the sweep until none is left; returns the exit code: 75 if the worker was stopped early.

    `run_command`: runs a command of dlopt, and returns its exit code. Raises `UserError`, `RunError`.
    """
    os.chdir(submitted.cwd)
    if RunFolder(sweep).is_live():
        raise UserError(f"{sweep}: another sweep is active in this folder")
    pool = pools.local(n_jobs=options.slots, stop_on_failure=options.stop_on_failure)
    allocation = slurm.Allocation(submitted.tasks)
    if submitted.tasks > 1:
        pool = replace(pool, slots=1, start=allocation.start)
    # Once a second, because the folder may be on a network file system; the end of a job is noticed at once.
    pool = replace(pool, poll_seconds=1.0, stop_reason=lambda: submission.stop_reason(sweep) or allocation.reason)
    with submission.recorded_code(sweep), _pool_of_commands(pool):
        if submitted.command is None:
            return _take_jobs(sweep, submitted, options, pool, allocation)
        os.environ.update(submitted.environment)
        code = run_command(submitted.command)
    if code == FAILED and options.stop_on_failure and submission.stop_reason(sweep) is None:
        submission.stop(sweep, "a job failed")
    return code


def _take_jobs(sweep: Path, submitted: Submission, options: Options, pool: Pool, allocation: slurm.Allocation) -> int:
    """Runs jobs of a grid; returns 75 if some are left."""
    worker = queue.name_worker()
    if submitted.tasks == 1:
        pools.warm_up()
    with queue.alive(sweep, worker):
        source = queue.Queue(sweep, worker, submitted.environment, submitted.packages, options.requeue)
        if not source.has_jobs_left():
            print(f"{short_path(sweep)}: no job is left to take")
        reason = None
        try:
            reason = pools.run(source, pool, source.overview)
        except KeyboardInterrupt:
            return INTERRUPTED if source.has_jobs_left() else DONE
    if reason is not None and allocation.reason is None and submission.stop_reason(sweep) is None:
        submission.stop(sweep, reason)
    return DONE if reason is None else INTERRUPTED


@contextlib.contextmanager
def _pool_of_commands(pool: Pool) -> Iterator[None]:
    token = pools.of_worker.set(pool)
    try:
        yield
    finally:
        pools.of_worker.reset(token)
