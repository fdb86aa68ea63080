"""Runs a fixed list of jobs."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig

from dlopt.sweeps import pool as pools
from dlopt.sweeps.jobs import Job, Result, compose_or_fail, labels
from dlopt.sweeps.pool import JobSource, Pool
from dlopt.tracking.overview import Overview


def launch_jobs(
    loader: Any, config: DictConfig, pool: Pool, job_overrides: Sequence[Sequence[str]], first: int
) -> list[Any]:
    """Runs jobs `first`, `first` + 1, ... except those that are finished already.

    Returns one of Hydra's `JobReturn` per job, whose value is the job's status.
    """
    numbered = enumerate(zip(job_overrides, labels(job_overrides), strict=True), first)
    jobs = (compose_or_fail(loader, config, overrides, number, label) for number, (overrides, label) in numbered)
    statuses = run_jobs(jobs, len(job_overrides), pool)
    return [
        JobReturn(overrides=overrides, status=JobStatus.COMPLETED, _return_value=statuses[first + i])
        for i, overrides in enumerate(job_overrides)
    ]


def run_jobs(jobs: Iterable[Job], total: int, pool: Pool) -> dict[int, str]:
    """Runs jobs and returns their status by number."""
    source = _JobList(iter(jobs))
    pools.run(source, pool, Overview(total))
    return source.statuses


class _JobList(JobSource):
    def __init__(self, jobs: Iterator[Job]) -> None:
        self._jobs = jobs
        self.statuses: dict[int, str] = {}

    def next(self) -> Job | None:
        return next(self._jobs, None)

    def ended(self, job: Job, result: Result) -> None:
        self.statuses[job.number] = result.status
