"""A batch of jobs that are known from the start: Hydra's own sweeper, or another that chooses batch by batch."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig

from dlopt.errors import UserError
from dlopt.folders import RunFolder
from dlopt.sweeps.crew import Refused, work
from dlopt.sweeps.jobs import Job, Result, compose, labels, record_failure
from dlopt.sweeps.places import Places
from dlopt.tracking.overview import Overview


def run_batch(
    loader: Any, config: DictConfig, places: Places, job_overrides: Sequence[Sequence[str]], first: int
) -> list[JobReturn]:
    """Runs jobs `first`, `first` + 1, ...; what is finished already is left alone. A job's return value is its status,
    and its config that of the job."""
    batch = _Batch(loader, config, job_overrides, first)
    work(batch, places, Overview(len(job_overrides)))
    return [_returned(batch.results[first + i], lines) for i, lines in enumerate(job_overrides)]


def run_job(job: Job, places: Places) -> str:
    """Runs one job and returns its status."""
    single = _Single(job)
    work(single, places, Overview(1))
    assert single.result is not None
    return single.result.status


class _Single:
    def __init__(self, job: Job) -> None:
        self._waiting: Job | None = job
        self.result: Result | None = None

    def next(self) -> Job | Refused | None:
        job, self._waiting = self._waiting, None
        return job

    def is_over(self) -> bool:
        return self._waiting is None

    def stops(self, job: Job, line: Mapping[str, Any]) -> bool:
        return False

    def ended(self, job: Job | Refused, result: Result) -> None:
        self.result = result


class _Batch:
    def __init__(self, loader: Any, config: DictConfig, overrides: Sequence[Sequence[str]], first: int) -> None:
        self._loader, self._config = loader, config
        self._waiting = [(first + i, *each) for i, each in enumerate(zip(overrides, labels(overrides), strict=True))]
        self.results: dict[int, Result] = {}

    def next(self) -> Job | Refused | None:
        if not self._waiting:
            return None
        number, overrides, label = self._waiting.pop(0)
        try:
            return compose(self._loader, self._config, overrides, number, label)
        except UserError as error:
            folder = RunFolder(Path(str(self._config.hydra.sweep.dir)) / str(number))
            return Refused(number, label, record_failure(folder, str(error)))

    def is_over(self) -> bool:
        return not self._waiting

    def stops(self, job: Job, line: Mapping[str, Any]) -> bool:
        return False

    def ended(self, job: Job | Refused, result: Result) -> None:
        self.results[job.number] = result


def _returned(result: Result, overrides: Sequence[str]) -> JobReturn:
    returned = JobReturn()
    returned.overrides = overrides
    returned.status = JobStatus.COMPLETED
    returned.return_value = result.status
    return returned
