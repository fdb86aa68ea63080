"""Runs a fixed list of jobs, and estimates how long a sweep will take."""

import math
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig

from dlopt.errors import USER_ERROR, RunError, UserError
from dlopt.folders import RunFolder
from dlopt.job import describe
from dlopt.sweeps import pool as pools
from dlopt.sweeps.jobs import Job, Result, compose_or_fail, labels, result_of
from dlopt.sweeps.pool import JobSource, Pool
from dlopt.tracking.layout import format_count, format_duration
from dlopt.tracking.overview import Overview

_PROBES = 3  # jobs to run for an estimate
_PROBE_MINUTES = 0.05  # training time of each
_PROBE_TIMEOUT = 120.0  # seconds, start-up included


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


# -- estimates


def estimate_job_seconds(configs: Sequence[Mapping[str, Any]], choices: Mapping[str, str]) -> float | None:
    """Estimates the mean seconds of a job with these (saved) configs; None if no probe trained.

    Runs the first, middle and last config for a few seconds each in a temporary folder, and warns of failures. Raises
    `UserError` if none of them can work.
    """
    indices = sorted({0, len(configs) // 2, len(configs) - 1})[:_PROBES]
    estimates: list[float | None] = []
    errors: list[UserError | RunError] = []
    for i in indices:
        try:
            estimates.append(_probe(configs[i], choices))
        except (UserError, RunError) as error:
            errors.append(error)
    if not estimates and isinstance(errors[0], UserError):
        raise errors[0]
    for message in dict.fromkeys(map(str, errors)):
        print(f"warning: a job would fail: {message}", flush=True)
    known = [seconds for seconds in estimates if seconds is not None]
    return sum(known) / len(known) if known else None


def _probe(config: Mapping[str, Any], choices: Mapping[str, str]) -> float | None:
    """Trains for a few seconds and extrapolates to all updates; None if the probe times out.

    Raises `UserError` if the config cannot work, `RunError` if the run fails.
    """
    from dlopt.training.checkpoint import Checkpoints  # imports torch

    probe_config = {**config, "max_time": _PROBE_MINUTES, "tracking": [], "resume": None, "dry_run": False}
    probe_config["schedule_epochs"] = None  # the horizon below is then the length of the run
    with tempfile.TemporaryDirectory(prefix="dlopt-") as path:
        folder = RunFolder(Path(path))
        describe(folder.path, probe_config, [], choices)
        process, deadline = pools.spawn(folder.path, {}, None), time.monotonic() + _PROBE_TIMEOUT
        while (code := process.poll()) is None:
            if time.monotonic() > deadline:
                process.kill()
                return None
            time.sleep(0.1)
        result = result_of(folder, code)
        if result.status == "failed":
            raise (UserError if code == USER_ERROR else RunError)(result.reason)
        seconds, steps = result.metrics.get("seconds"), result.metrics.get("steps")
        if result.status in ("finished", "stopped_early") or not seconds or not steps:
            return seconds  # short enough to finish, or nothing was trained
        try:
            state = Checkpoints(folder.checkpoints).load_newest()
        except (RunError, UserError):
            return None
        return None if state is None else float(seconds * state["progress"]["horizon"] / steps)


def print_estimate(
    configs: Sequence[Mapping[str, Any]], choices: Mapping[str, str], jobs: int, at_once: int = 1
) -> None:
    """Prints how long `jobs` jobs with these (saved) configs will take, `at_once` at a time."""
    print(estimate_line(estimate_job_seconds(configs, choices), jobs, at_once))


def estimate_line(seconds: float | None, jobs: int, at_once: int) -> str:
    """Formats the estimate for `jobs` jobs of `seconds` each, `at_once` at a time.

    The total is computed from the rounded time of a job, so that the line adds up.
    """
    parallel = f", {at_once} at once" if at_once > 1 else ""
    if seconds is None:
        return f"{format_count('jobs', jobs)}{parallel}; the duration could not be estimated"
    shown = max(round(seconds, 1), 0.1) if seconds < 60 else math.ceil(seconds)
    if jobs == 1:
        return f"1 job of about {format_duration(shown)}"
    total = format_duration(shown * math.ceil(jobs / at_once))
    return f"{format_count('jobs', jobs)} of about {format_duration(shown)} each{parallel}: about {total} in total"
