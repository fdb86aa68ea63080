"""The progress of a sweep, read from its folder: the jobs and their statuses, the workers, the remaining jobs."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dlopt.basics.errors import DONE, FAILED, INTERRUPTED, UserError
from dlopt.basics.folders import SPACE, RunFolder, short_path
from dlopt.basics.interruption import print_line
from dlopt.results.leaderboard import Leaderboard, Record, job_record, leaderboard
from dlopt.results.reading import Damaged, RunReader
from dlopt.sweeps.queue import QUEUED, RUNNING, WORKERS, Log, live_workers
from dlopt.sweeps.slurm import waiting
from dlopt.sweeps.submission import is_submitted, stop_reason
from dlopt.sweeps.sweep_file import read_space

if TYPE_CHECKING:
    from dlopt.tracking.overview import Overview

_POLL_SECONDS = 2.0
_LOST_SECONDS = 20.0  # time without workers after which a sweep counts as dead


@dataclass(frozen=True)
class JobStatus:
    """`status`: the status of a run, `queued`, or `running`; `worker`: its worker, if known."""

    number: int
    folder: Path
    label: str
    status: str
    worker: str = ""


@dataclass(frozen=True)
class SweepStatus:
    """The state of a sweep.

    Attributes:
        jobs: jobs that have a folder, or wait in the queue.
        total: number of jobs, including jobs that are not drawn yet; None if unknown.
        workers: live workers; `waiting`: workers that wait for an allocation of Slurm.
        stop_reason: why the workers must stop.
        damaged_lines: ignored lines of the log.
    """

    jobs: Sequence[JobStatus]
    total: int | None
    workers: Sequence[str]
    waiting: int
    stop_reason: str | None
    records: Sequence[Record]
    damaged: Sequence[Damaged]
    damaged_lines: int = 0

    @property
    def counts(self) -> Counter[str]:
        """Returns the number of jobs by status; jobs that are not drawn yet are queued."""
        counts = Counter(job.status for job in self.jobs)
        if self.total is not None and self.total > len(self.jobs):
            counts[QUEUED] += self.total - len(self.jobs)
        return counts

    @property
    def code(self) -> int:
        """Returns 0 if all jobs have ended well, 1 if they have ended and some failed, 75 otherwise."""
        counts = self.counts
        if any(counts[status] for status in (QUEUED, RUNNING, "interrupted", "unfinished")):
            return INTERRUPTED
        return FAILED if counts["failed"] else DONE

    @property
    def is_lost(self) -> bool:
        """Returns whether jobs are left, but no workers."""
        return self.code == INTERRUPTED and not self.workers and not self.waiting

    def board(self) -> Leaderboard:
        summaries = [(record, RunFolder(record.path).summary() or {}) for record in self.records]
        return leaderboard(
            [job_record(each.path, each.config, summary, each.overrides, each.origin) for each, summary in summaries]
        )


class StatusReader:
    """Reads the state of a sweep repeatedly; each time only the changes."""

    def __init__(self, sweep: Path) -> None:
        """Raises `UserError` for a folder without a sweep."""
        self._sweep, self._reader, self._log = sweep.absolute(), RunReader(), Log(sweep)
        if not sweep.is_dir():
            raise UserError(f"{sweep}: no such folder")
        if not (sweep / SPACE).exists() and not is_submitted(sweep):
            raise UserError(f"{short_path(sweep)}: not the folder of a sweep ({SPACE} is missing)")

    def read(self) -> SweepStatus:
        records, damaged = self._reader.read([self._sweep])
        log, space = self._log.read(), read_space(self._sweep)
        workers = live_workers(self._sweep)
        jobs, total = self._of_log(workers, records) if log.jobs else (self._of_records(records), _total(space))
        if RunFolder(self._sweep).is_live():
            workers = [*workers, "the command that started it"]
        waits = waiting(log.slurm, self._sweep / WORKERS)
        return SweepStatus(jobs, total, workers, waits, stop_reason(self._sweep), records, damaged, log.damaged)

    def _of_log(self, workers: Sequence[str], records: Sequence[Record]) -> tuple[list[JobStatus], int]:
        ended = {record.path: record.status for record in records if record.status in ("finished", "stopped_early")}
        jobs = []
        for number, job in sorted(self._log.jobs.items()):
            is_lost = job.status == RUNNING and job.worker not in workers
            folder = self._sweep / job.folder
            # A command in another shell may have finished the job since.
            status = QUEUED if is_lost else job.status
            if status != RUNNING:
                status = ended.get(folder, status)
            jobs.append(JobStatus(number, folder, job.label, status, job.worker if status == RUNNING else ""))
        return jobs, len(jobs)

    def _of_records(self, records: Sequence[Record]) -> list[JobStatus]:
        jobs = []
        for index, record in enumerate(records):
            number = int(record.path.name) if record.path.name.isdecimal() else index
            jobs.append(JobStatus(number, record.path, " ".join(record.overrides), record.status))
        return jobs


def _total(space: object) -> int | None:
    """Returns the number of jobs that the file of a sweep states; None if it does not."""
    if isinstance(space, list):
        return len(space)
    total = space.get("jobs", space.get("total")) if isinstance(space, dict) else None
    return total if isinstance(total, int) else None


def wait(sweep: Path) -> SweepStatus:
    """Shows the progress of a sweep of other processes, and then its leaderboard; returns its end.

    Waits for the last job, or until no workers are left. Raises `UserError` and, on Ctrl-C, KeyboardInterrupt.
    """
    try:
        status = _follow(sweep)
    except KeyboardInterrupt:
        print_line(f"the sweep continues; to stop it: dlopt sweep stop {short_path(sweep)}")
        raise
    if status.records:
        from dlopt.results.printing import show_leaderboard  # with NumPy, which the status does not need

        show_leaderboard(status.board())
    return status


def _follow(sweep: Path) -> SweepStatus:
    """Shows the progress of a sweep until it ends or no workers are left."""
    from dlopt.tracking.overview import Overview

    reader = StatusReader(sweep)
    status = reader.read()
    overview = Overview(status.total or len(status.jobs))
    before: dict[int, str] = {}
    lost_since: float | None = None
    try:
        while True:
            for job in status.jobs:
                if before.get(job.number) != job.status:
                    _show(overview, job, is_known=not before)
            before |= {job.number: job.status for job in status.jobs} or {-1: ""}
            overview.refresh()
            if status.code != INTERRUPTED:
                return status
            lost_since = (lost_since or time.monotonic()) if status.is_lost else None
            if lost_since is not None and time.monotonic() - lost_since >= _LOST_SECONDS:
                return status
            time.sleep(_POLL_SECONDS)
            status = reader.read()
    finally:
        overview.close()


def _show(overview: "Overview", job: JobStatus, *, is_known: bool) -> None:
    """Shows a job whose status has changed. `is_known`: before this command started."""
    if job.status == RUNNING:
        overview.started(job.number, job.label)
    elif job.status not in (QUEUED, "unfinished"):
        summary = RunFolder(job.folder).summary() or {}
        overview.ended(job.number, job.label, job.status, summary, str(summary.get("reason", "")), known=is_known)
