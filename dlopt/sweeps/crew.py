"""The loop of a sweep: keeps every place at work until no job is left; nothing one job does stops the others."""

import contextlib
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from dlopt.errors import UserError
from dlopt.interruption import Interruption
from dlopt.sweeps.jobs import INTERRUPTED, Job, Result, begin, record_failure, record_pruned, result_of
from dlopt.sweeps.places import Places, Process
from dlopt.tracking.metrics import parse_metrics
from dlopt.tracking.overview import Overview


@dataclass(frozen=True)
class Refused:
    """A job that could not even be composed."""

    number: int
    label: str
    result: Result


class Source(Protocol):
    """What hands out the jobs."""

    def next(self) -> Job | Refused | None:
        """A job for a free place; None where there is none now."""

    def is_over(self) -> bool:
        """Whether no job will come any more, once none is running."""

    def stops(self, job: Job, line: Mapping[str, Any]) -> bool:
        """Takes a new line of a running job's metrics; whether the job is to be stopped."""

    def ended(self, job: Job | Refused, result: Result) -> None:
        """Takes how a job ended."""


class _Metrics:
    """The lines that a running job adds to metrics.jsonl."""

    def __init__(self, job: Job) -> None:
        self._path, self._position = job.folder.path / "metrics.jsonl", 0

    def new(self) -> list[dict[str, Any]]:
        with contextlib.suppress(OSError), self._path.open("rb") as file:
            if os.fstat(file.fileno()).st_size < self._position:  # a resumed job cuts what lies beyond its checkpoint
                self._position = 0
            file.seek(self._position)
            text = file.read()
            whole = text[: text.rfind(b"\n") + 1]
            self._position += len(whole)
            return parse_metrics(whole)
        return []


@dataclass
class _Work:
    job: Job
    process: Process
    metrics: _Metrics
    is_left: bool  # over from a sweep that was killed
    pruned_at: int | None = None


def work(source: Source, places: Places, overview: Overview) -> None:
    """Runs what `source` hands out. Raises KeyboardInterrupt once a signal has come and the jobs have stopped."""
    crew = _Crew(source, places, overview)
    with Interruption() as interruption:
        try:
            while not interruption and crew.look():
                time.sleep(places.seconds)
            if interruption:
                crew.stop(interruption)
                raise KeyboardInterrupt
        except BaseException:
            crew.kill()
            raise
        finally:
            overview.close()


class _Crew:
    def __init__(self, source: Source, places: Places, overview: Overview) -> None:
        self._source, self._places, self._overview = source, places, overview
        self._at: dict[int, _Work] = {}

    def look(self) -> bool:
        """Takes what has ended, fills free places; False when all is over."""
        for place, work in list(self._at.items()):
            self._follow(work)
            code = work.process.poll()
            if code is not None:
                del self._at[place]
                self._end(place, work, code)
        for place in range(self._places.count):
            while place not in self._at:
                job = self._source.next()
                if job is None:
                    self._overview.refresh()
                    return bool(self._at) or not self._source.is_over()
                self._begin(place, job)
        self._overview.refresh()
        return True

    def _begin(self, place: int, job: Job | Refused) -> None:
        if isinstance(job, Refused):
            self._source.ended(job, job.result)
            self._overview.ended(job.number, job.label, job.result.status, {}, job.result.reason)
            return
        left = self._places.find(job.folder.path)
        if left is not None:
            self._overview.started(job.number, job.label)
            self._at[place] = _Work(job, left, _Metrics(job), is_left=True)
            return
        try:
            result = begin(job)
        except UserError as error:
            result = record_failure(job.folder, str(error))
            self._told(job, result, known=False)
            return
        if result is not None:
            self._told(job, result, known=True)
            return
        self._overview.started(job.number, job.label)
        self._start(place, job)

    def _start(self, place: int, job: Job) -> None:
        try:
            process = self._places.start(place, job.folder.path, job.environment)
        except OSError as error:
            self._told(job, record_failure(job.folder, f"its process could not be started: {error}"), known=False)
            return
        self._at[place] = _Work(job, process, _Metrics(job), is_left=False)

    def _follow(self, work: _Work) -> None:
        for line in work.metrics.new():
            self._overview.progress(work.job.number, line)
            if work.pruned_at is None and not work.is_left and self._source.stops(work.job, line):
                work.pruned_at = int(line.get("epoch", 0))
                work.process.stop()

    def _end(self, place: int, work: _Work, code: int) -> None:
        self._follow(work)
        if work.is_left:
            result = begin(work.job)
            if result is None:
                self._start(place, work.job)
                return
        elif work.pruned_at is not None and code == -signal.SIGTERM and work.job.folder.summary() is None:
            result = record_pruned(work.job.folder, work.pruned_at)  # the signal came when nothing could catch it
        else:
            result = result_of(work.job.folder, code)
        if work.pruned_at is not None and result.status == "interrupted":
            result = record_pruned(work.job.folder, work.pruned_at)
        self._told(work.job, result, known=False)

    def _told(self, job: Job, result: Result, *, known: bool) -> None:
        self._source.ended(job, result)
        self._overview.ended(job.number, job.label, result.status, result.figures, result.reason, known)

    def stop(self, interruption: Interruption) -> None:
        """Asks the jobs to end with a checkpoint, and waits for them; a second Ctrl-C ends the waiting."""
        self._overview.message(f"{interruption.reason}: stopping {len(self._at)} jobs; go on with resume=auto")
        for work in self._at.values():
            work.process.stop()
        while self._at:
            for place, work in list(self._at.items()):
                code = work.process.poll()
                if code is not None:
                    del self._at[place]
                    if not work.is_left:  # the signal may have come before the job could catch it
                        is_silent = work.job.folder.summary() is None
                        result = result_of(work.job.folder, INTERRUPTED if is_silent else code)
                        self._told(work.job, result, known=False)
            time.sleep(self._places.seconds)

    def kill(self) -> None:
        for work in self._at.values():
            work.process.kill()
