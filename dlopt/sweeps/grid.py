"""Runs a fixed list of jobs."""

from collections.abc import Iterable, Iterator

from dlopt.sweeps import pool as pools
from dlopt.sweeps.jobs import InvalidJob, Job, JobResult
from dlopt.sweeps.pool import JobSource, Pool
from dlopt.tracking.overview import Overview


def run_jobs(jobs: Iterable[Job | InvalidJob], total: int, pool: Pool) -> dict[int, str]:
    """Runs jobs and returns their status by number."""
    source = _JobList(iter(jobs))
    pools.run(source, pool, Overview(total))
    return source.statuses


class _JobList(JobSource):
    def __init__(self, jobs: Iterator[Job | InvalidJob]) -> None:
        self._jobs = jobs
        self.statuses: dict[int, str] = {}

    def next(self) -> Job | InvalidJob | None:
        return next(self._jobs, None)

    def ended(self, job: Job | InvalidJob, result: JobResult) -> None:
        self.statuses[job.number] = result.status
