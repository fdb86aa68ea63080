"""An element of the array of a submitted grid: the jobs of its index, one after another.

An element skips what has ended and continues what was interrupted, so it may be requeued, repeated or doubled.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from dlopt.basics.errors import DONE, UserError, disk_failure
from dlopt.basics.files import digest_file, read_json, write_json
from dlopt.basics.folders import LOCK, RunFolder, short_path
from dlopt.basics.locks import taken
from dlopt.basics.plain_values import read_regular
from dlopt.sweeps.array import STOP_RUN, JobEntry
from dlopt.sweeps.jobs import ELSEWHERE, DescribedPlan, Job, JobResult, prepare, result_of
from dlopt.sweeps.pool import JobSource
from dlopt.tracking.overview import Overview

RESTARTS = ".restarts"  # in the folder of a job: how often it was started again without progress


class Element(JobSource):
    """Supplies the jobs of an element.

    Args:
        jobs: by number.
        environment: additional variables of the jobs.
        packages: packages that the configs of the jobs may name in `allow_packages`.
        restarts: how often a job is started again without progress.
    """

    def __init__(
        self,
        sweep: Path,
        jobs: Mapping[int, JobEntry],
        environment: Mapping[str, str],
        packages: Sequence[str],
        restarts: int,
    ) -> None:
        self.series = self._sweep = sweep
        self._left, self._restarts = dict(jobs), restarts
        self._environment, self._packages = environment, packages
        self.has_failed = False  # a job has, in this process or an earlier one
        self._has_stopped = False  # a job has, with this process
        self.overview = Overview(len(jobs))

    def next(self) -> Job | None:
        while self._left:
            number = next(iter(self._left))
            job = self._job(number, self._left.pop(number))
            try:
                if isinstance(job.composed, UserError) or (ended := self._check_out(job)) is None:
                    return job  # the pool records the error
            except OSError as error:
                if (reason := disk_failure(error)) is None:
                    raise
                return replace(job, composed=UserError(reason))
            self.has_failed |= ended.status == "failed"
            is_known = ended.status != "interrupted"
            self.overview.ended(number, job.label, ended.status, ended.metrics, ended.reason, known=is_known)
        return None

    def _job(self, number: int, entry: JobEntry) -> Job:
        folder = entry.run(self._sweep)
        config = folder.config()
        composed: DescribedPlan | UserError
        if config is None:
            composed = UserError(f"{folder.path}: config.yaml is missing or unreadable")
        elif foreign := sorted({*(config.get("allow_packages") or ())} - {*self._packages}):
            composed = UserError(f"{folder.path}: allow_packages={foreign}: not submitted with this sweep")
        else:
            composed = DescribedPlan(config, self._environment)
        return Job(number, folder, composed, entry.label)

    def _check_out(self, job: Job) -> JobResult | None:
        """Prepares a job to be started; returns the result of one that is not to be started."""
        if job.folder.is_live():
            return JobResult("interrupted", {}, ELSEWHERE)
        # Under the lock of the run: an element that doubles this one must not end the job in between.
        with taken(job.folder.path / LOCK) as is_free:
            if is_free is False:
                return JobResult("interrupted", {}, ELSEWHERE)
            summary = job.folder.summary() or {}
            if job.is_done or summary.get("status") == "failed":
                return result_of(job.folder, DONE)
            if (job.folder.path / STOP_RUN).exists():
                return JobResult("interrupted", summary, f"stopped; dlopt sweep resume {short_path(self._sweep)}")
            if not self._may_restart(job.folder):
                reason = f"no progress in {self._restarts} restarts"
                interrupted = {"status": "interrupted", "run_id": job.folder.run_id(), "reason": reason, **summary}
                write_json(job.folder.path / "summary.json", interrupted)
                return JobResult("interrupted", summary, reason)
            return prepare(job)

    def _may_restart(self, folder: RunFolder) -> bool:
        """Counts a start of a job; returns whether it has not been started too often without progress."""
        before, reached = read_json(folder.path / RESTARTS), _reached(folder)
        count = 0
        if before is not None and before.get("reached") == reached and isinstance(before.get("count"), int):
            count = before["count"] + 1
        if count > self._restarts:
            return False
        write_json(folder.path / RESTARTS, {"reached": reached, "count": count})
        return True

    def ended(self, job: Job, result: JobResult) -> None:
        self.has_failed |= result.status == "failed"
        self._has_stopped |= result.status == "interrupted" and self.is_stopping

    def has_jobs_left(self) -> bool:
        """Returns whether a job has not been started, or was stopped with this process."""
        return bool(self._left) or self._has_stopped


def _reached(folder: RunFolder) -> str:
    """Returns how far a run has come: its updates, or the checksum of its last checkpoint if it was killed."""
    summary = folder.summary() or {}
    if isinstance(summary.get("steps"), int):
        return f"{summary['steps']} steps"
    with suppress(OSError, ValueError):
        return read_regular(digest_file(folder.checkpoints / "last.pt")).decode()
    return "nothing"
