"""The job queue that the workers of a submitted sweep share: the status of every job, and the worker that runs it.

FOLDER/workers/log holds one JSON line per event, appended under a lock. A live worker also holds its own lock. The
kernel releases the lock of a killed worker, whose jobs are then free again. A network file system shows new lines as
soon as the file is opened.
"""

import json
import os
import re
import socket
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dlopt.basics.errors import UserError
from dlopt.basics.files import NewLines
from dlopt.basics.folders import RunFolder, inside
from dlopt.basics.locks import hold, is_held, locked
from dlopt.basics.plain_values import parse_json
from dlopt.basics.secrets import redact
from dlopt.sweeps.jobs import DescribedPlan, Job, JobResult
from dlopt.sweeps.pool import JobSource
from dlopt.sweeps.slurm import is_job_id

WORKERS = "workers"  # in the folder of a sweep: the locks of its processes, and the files of a submitted one
LOG, LOG_LOCK = "log", "log.lock"  # in that folder
QUEUED, RUNNING = "queued", "running"


def name_worker() -> str:
    """Returns a name for this process that is unique among the processes of a sweep."""
    return f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"


@contextmanager
def alive(sweep: Path, worker: str) -> Iterator[None]:
    """Holds the lock that shows other processes that this worker is alive."""
    path = sweep / WORKERS / f"{worker}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with hold(path):
        yield
    path.unlink(missing_ok=True)


def live_workers(sweep: Path) -> list[str]:
    """Returns the names of the processes that work on the sweep."""
    locks = sorted((sweep / WORKERS).glob("*-*.lock"))
    return [path.stem for path in locks if is_held(path)]


@dataclass
class JobState:
    """A job in the log. `status`: `queued`, `running`, or the status of its summary; `worker`: its worker."""

    folder: str
    label: str
    status: str = QUEUED
    worker: str = ""
    starts: int = 0


@dataclass
class Log:
    """The events of a submitted sweep.

    Attributes:
        jobs: by number.
        slurm: the ids of the Slurm jobs that were submitted for it.
        damaged: ignored lines: not written by dlopt, or truncated by a full disk.
    """

    sweep: Path
    jobs: dict[int, JobState] = field(default_factory=dict)
    slurm: list[str] = field(default_factory=list)
    damaged: int = 0

    def __post_init__(self) -> None:
        self._path = self.sweep / WORKERS / LOG
        self._lines = NewLines(self._path)

    def read(self) -> "Log":
        """Reads the events since the last call. Raises `UserError` for a log that cannot be read."""
        try:
            lines = self._lines.read().splitlines()
        except FileNotFoundError:
            return self
        except (OSError, ValueError) as error:
            raise UserError(f"{self._path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
        for line in lines:
            try:
                is_known = self._apply(parse_json(line))
            except ValueError:
                is_known = False
            self.damaged += not is_known
        return self

    def _apply(self, event: Any) -> bool:
        """Processes an event; returns whether it is an event of dlopt."""
        match event:
            case {"job": int(number), "folder": str(folder), "label": str(label)} if "\0" not in folder:
                self.jobs[number] = JobState(folder, label)
            case {"claimed": int(number), "worker": str(worker)} if number in self.jobs and _is_name(worker):
                job = self.jobs[number]
                job.status, job.worker, job.starts = RUNNING, worker, job.starts + 1
            case {"returned": int(number)} if number in self.jobs:
                self.jobs[number].status = QUEUED
            case {"ended": int(number), "status": str(status)} if number in self.jobs:
                self.jobs[number].status = status
            case {"slurm": str(job_id)} if is_job_id(job_id):
                self.slurm.append(job_id)
            case _:
                return False
        return True

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Reads the log, and keeps others from writing to it in the block."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with locked(self._path.with_name(LOG_LOCK)):
            self.read()
            yield

    def append(self, **event: Any) -> None:
        """Writes an event, within `locked`."""
        with self._path.open("ab+") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(end - 1, 0))
            is_cut = file.read(1) not in (b"", b"\n")  # the disk was full, or the machine went down
            file.write((b"\n" if is_cut else b"") + json.dumps(event).encode() + b"\n")
        self.read()

    def add(self, jobs: Sequence[Job]) -> None:
        """Queues jobs, including jobs that have ended before."""
        for job in jobs:
            self.append(job=job.number, folder=str(job.folder.path.relative_to(self.sweep)), label=redact(job.label))

    def counts(self) -> Counter[str]:
        return Counter(job.status for job in self.jobs.values())

    def free(self) -> Iterator[int]:
        """Yields the jobs that a worker may take: queued jobs, then jobs of dead workers."""
        yield from (number for number, job in self.jobs.items() if job.status == QUEUED)
        dead: dict[str, bool] = {}
        for number, job in self.jobs.items():
            if job.status == RUNNING:
                if job.worker not in dead:
                    dead[job.worker] = not is_held(self.sweep / WORKERS / f"{job.worker}.lock")
                if dead[job.worker]:
                    yield number


def _is_name(worker: str) -> bool:
    """Returns whether this may be the name of a worker (a part of its lock's file name)."""
    return re.fullmatch(r"[\w.-]{1,200}", worker) is not None


class Queue(JobSource):
    """Claims the jobs of a submitted grid one at a time, and records their ends.

    Args:
        environment: additional variables of the jobs.
        packages: packages that the configs of the jobs may name in `allow_packages`.
        restarts: how often a job that was interrupted with its worker is started again.
    """

    def __init__(
        self, sweep: Path, worker: str, environment: Mapping[str, str], packages: Sequence[str], restarts: int
    ) -> None:
        from dlopt.tracking.overview import Overview  # with rich, which the status of a sweep does not need

        self._sweep, self._worker, self._restarts = sweep, worker, restarts
        self._environment, self._packages = environment, packages
        self._log = Log(sweep).read()
        self.overview = Overview(len(self._log.jobs))

    def next(self) -> Job | None:
        # Read and claimed under one lock: no two workers take the same job.
        with self._log.locked():
            number = next(self._log.free(), None)
            if number is None:
                return None
            if self._log.jobs[number].starts > self._restarts:
                self._log.append(ended=number, status="interrupted")
                return self.next()
            self._log.append(claimed=number, worker=self._worker)
        self.overview.update_shared(self._ended(), [])
        return self._job(number)

    def _job(self, number: int) -> Job:
        state = self._log.jobs[number]
        if Path(state.folder).is_absolute() or ".." in Path(state.folder).parts:
            raise UserError(f"{self._sweep}: the folder of job {number} must be below the sweep's: {state.folder}")
        folder = RunFolder(inside(self._sweep, state.folder, f"{self._sweep}"))
        config = folder.config()
        composed: DescribedPlan | UserError
        if config is None:
            composed = UserError(f"{folder.path}: config.yaml is missing or unreadable")
        elif foreign := sorted({*(config.get("allow_packages") or ())} - {*self._packages}):
            composed = UserError(f"{folder.path}: allow_packages={foreign}: not submitted with this sweep")
        else:
            composed = DescribedPlan(config, self._environment)
        return Job(number, folder, composed, state.label)

    def _ended(self) -> Mapping[str, int]:
        counts = self._log.read().counts()
        finished = counts.pop("stopped_early", 0)
        return {status: count for status, count in counts.items() if status not in (QUEUED, RUNNING)} | {
            "finished": counts["finished"] + finished
        }

    def ended(self, job: Job, result: JobResult) -> None:
        with self._log.locked():
            if result.status == "interrupted" and self.is_stopping:
                self._log.append(returned=job.number)
            else:
                self._log.append(ended=job.number, status=result.status)

    def has_jobs_left(self) -> bool:
        """Returns whether a job is queued, or was running in a dead worker."""
        return next(self._log.read().free(), None) is not None
