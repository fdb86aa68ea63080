"""The progress of a sweep, from its run folders and from Slurm: the jobs and their statuses, what runs them."""

import shlex
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dlopt.basics.errors import DONE, FAILED, INTERRUPTED, FileError
from dlopt.basics.folders import ENDED, LOCK, SPACE, RunFolder, short_path
from dlopt.basics.interruption import print_line
from dlopt.sweeps import series
from dlopt.sweeps.array import JobArray, is_submitted, read_array, stop_reason
from dlopt.sweeps.live import live_workers
from dlopt.sweeps.slurm_queue import Elements, ended_early, queued_elements
from dlopt.sweeps.sweep_file import read_space

if TYPE_CHECKING:  # status prints without them
    from dlopt.results.ranking import Ranking
    from dlopt.results.reading import Damaged, RunReader
    from dlopt.tracking.overview import Overview

QUEUED, RUNNING = "queued", "running"
_POLL_SECONDS = 2.0
_LONGEST_PAUSE = 32.0  # between calls of squeue: each doubles the pause, because all users share the controller
_SHARE = 0.05  # of the time that `wait` spends with looking
_LOST_SECONDS = 20.0  # time without elements or workers after which a sweep counts as dead


@dataclass(frozen=True)
class JobStatus:
    """`status`: the status of a run, `queued`, or `running`; `worker`: what runs it, if known."""

    number: int
    folder: Path
    label: str
    status: str
    worker: str = ""
    reason: str = ""  # of a failure


@dataclass(frozen=True)
class SweepStatus:
    """The state of a sweep.

    Attributes:
        jobs: jobs that have a folder, or that were submitted.
        total: number of jobs, including jobs that are not drawn yet; None if unknown.
        workers: what runs jobs: elements of a grid, or processes.
        waiting: elements or workers that wait for an allocation of Slurm.
        pending: Slurm's reason -> the number of elements that wait for it.
        slurm: the ids of the Slurm jobs that have not ended.
        answers: whether Slurm has answered.
        stop_reason: why the sweep was stopped.
        early: elements that Slurm has ended -> how, for jobs that are left.
    """

    jobs: Sequence[JobStatus]
    total: int | None
    workers: Sequence[str]
    waiting: int
    pending: Mapping[str, int] = field(default_factory=dict)
    slurm: Sequence[str] = ()
    answers: bool = True
    stop_reason: str | None = None
    damaged: Sequence["Damaged"] = ()
    early: Mapping[str, str] = field(default_factory=dict)

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
        """Returns whether jobs are left, but nothing runs them or waits to do so."""
        is_run = self.workers or self.waiting or self.slurm or self.counts[RUNNING]
        return self.code == INTERRUPTED and not is_run and self.answers


class StatusReader:
    """Reads the state of a sweep repeatedly."""

    def __init__(self, sweep: Path) -> None:
        """Raises `UserError` for a folder without a sweep."""
        if not sweep.is_dir():
            raise FileError(f"{sweep}: no such folder")
        self._sweep, self._array = sweep.absolute(), read_array(sweep)
        self._runs: RunReader | None = None
        self.seconds = 0.0  # of CPU that the last look took
        self._series = series.read(sweep)
        if self._series is None and not (sweep / SPACE).exists() and not is_submitted(sweep):
            raise FileError(f"{short_path(sweep)}: not the folder of a series ({series.SERIES} is missing)")
        self._elements, self._last_call, self._pause = Elements({}), float("-inf"), _POLL_SECONDS

    def read(self) -> SweepStatus:
        begin, elements = time.process_time(), self._ask_slurm()
        status = self._of_records(elements) if self._array is None else self._of_array(self._array, elements)
        self.seconds = time.process_time() - begin
        return status

    def _ask_slurm(self) -> Elements:
        """Returns the elements that Slurm lists; asks again after a pause only, which grows."""
        now = time.monotonic()
        if now >= self._last_call + self._pause:
            self._pause = min(2 * self._pause, _LONGEST_PAUSE) if self._last_call > 0 else _POLL_SECONDS
            self._elements, self._last_call = queued_elements(self._sweep), now
        return self._elements

    def _of_array(self, array: JobArray, elements: Elements) -> SweepStatus:
        states = elements.by_index
        jobs = [
            self._of_job(number, array, states.get(array.element_of(number), ""), elements)
            for number in range(len(array.jobs))
        ]
        workers = list(elements.running)
        if RunFolder(self._sweep).is_live():  # a command without Slurm, or a submission that is being written
            workers.append("the command that started it")
        workers += dict.fromkeys(job.worker for job in jobs if job.worker and job.worker not in workers)
        status = SweepStatus(
            jobs, len(jobs), workers, elements.pending, elements.reasons, [*elements.states], elements.answers,
            stop_reason(self._sweep),
        )  # fmt: skip
        return replace(status, early=ended_early(self._sweep)) if status.is_lost else status

    def _of_job(self, number: int, array: JobArray, state: str, elements: Elements) -> JobStatus:
        """Reads the status of a job. `state`: of its element, "" if Slurm does not list it."""
        entry = array.jobs[number]
        run = RunFolder(self._sweep / entry.folder)
        summary = run.summary() or {}
        status, worker, reason = str(summary.get("status", QUEUED)), "", ""
        if status in ENDED:
            status = "pruned" if summary.get("pruned") is True else status
        elif (run.path / LOCK).exists() and run.is_live():
            status, worker = RUNNING, "another process"
            if state not in ("", "PENDING"):
                element = array.element_of(number)
                worker = next(name for name in reversed(elements.running) if name.endswith(f"_{element}"))
        elif status == "interrupted" and state == "PENDING":  # requeued
            status = QUEUED
        elif status == "failed":
            reason = str(summary.get("reason") or "")
        elif status not in (QUEUED, "interrupted"):  # damaged
            status = "unfinished"
        return JobStatus(number, run.path, entry.label, status, worker, reason)

    def _of_records(self, elements: Elements) -> SweepStatus:
        """Reads a sweep that was not submitted, or whose workers choose jobs at run time."""
        from dlopt.results.reading import RunReader

        self._runs = self._runs or RunReader()
        records, damaged = self._runs.read([self._sweep])
        workers = live_workers(self._sweep)
        if RunFolder(self._sweep).is_live():
            workers = [*workers, "the command that started it"]
        jobs = []
        for index, record in enumerate(records):
            number = int(record.path.name) if record.path.name.isdecimal() else index
            reason = record.reason or ""
            jobs.append(JobStatus(number, record.path, " ".join(record.overrides), record.status, reason=reason))
        return SweepStatus(
            jobs,
            self._total(),
            workers,
            elements.pending,
            elements.reasons,
            [*elements.states],
            elements.answers,
            stop_reason=stop_reason(self._sweep),
            damaged=damaged,
        )

    def _total(self) -> int | None:
        """Returns the number of jobs that the files of the series state; None if they do not."""
        space = read_space(self._sweep)
        if isinstance(space, list):
            return len(space)
        total = space.get("jobs", space.get("total")) if isinstance(space, dict) else None
        return total if isinstance(total, int) else None if self._series is None else self._series.total


def wait(sweep: Path) -> "tuple[SweepStatus, Ranking | None]":
    """Shows the progress of a series of other processes, and then the leaderboard of a sweep; returns its end, and it.

    Waits for the last job, or until nothing is left that runs one. Raises `UserError`; on Ctrl-C, KeyboardInterrupt.
    """
    from dlopt.results.printing import show_end
    from dlopt.results.ranking import of_folder

    try:
        status = _follow(sweep)
    except KeyboardInterrupt:
        print_line(f"the sweep continues; to stop it: dlopt sweep stop {shlex.quote(short_path(sweep))}")
        raise
    if not (sweep / SPACE).exists():  # its own command draws the conclusions
        return status, None
    ranking = of_folder(sweep.absolute())
    show_end(ranking, sweep, is_final=status.code != INTERRUPTED)
    return status, ranking


def _follow(sweep: Path) -> SweepStatus:
    """Shows the progress of a sweep until it ends, or nothing is left that runs its jobs."""
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
            time.sleep(max(_POLL_SECONDS, reader.seconds / _SHARE))
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
