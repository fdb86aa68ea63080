"""Jobs that are known from the start: how long they will take, and a run of all of them."""

import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from dlopt.folders import RunFolder
from dlopt.sweeps import pool as pools
from dlopt.sweeps.jobs import Job, Result, compose_or_refuse, labels
from dlopt.sweeps.pool import Pool, Source
from dlopt.tracking.overview import Overview

_PROBES = 3  # jobs that an estimate runs
_MINUTES = 0.05  # that each of them trains
_PATIENCE = 120.0  # seconds after which a probe is given up


def run_batch(
    loader: Any, config: DictConfig, pool: Pool, job_overrides: Sequence[Sequence[str]], first: int
) -> list[Any]:
    """Runs jobs `first`, `first` + 1, ...; what is finished already is left alone.

    Returns Hydra's `JobReturn` of each, whose value is the job's status.
    """
    from hydra.core.utils import JobReturn, JobStatus

    numbered = enumerate(zip(job_overrides, labels(job_overrides), strict=True), first)
    jobs = (compose_or_refuse(loader, config, overrides, number, label) for number, (overrides, label) in numbered)
    statuses = run_jobs(jobs, len(job_overrides), pool)
    return [
        JobReturn(overrides=overrides, status=JobStatus.COMPLETED, _return_value=statuses[first + i])
        for i, overrides in enumerate(job_overrides)
    ]


def run_jobs(jobs: Iterable[Job], total: int, pool: Pool) -> dict[int, str]:
    """Runs jobs and returns their status by number."""
    batch = _Batch(iter(jobs))
    pools.run(batch, pool, Overview(total))
    return batch.statuses


class _Batch(Source):
    def __init__(self, jobs: Iterator[Job]) -> None:
        self._jobs = jobs
        self.statuses: dict[int, str] = {}

    def next(self) -> Job | None:
        return next(self._jobs, None)

    def ended(self, job: Job, result: Result) -> None:
        self.statuses[job.number] = result.status


# -- estimates


def seconds_of(configs: Sequence[Mapping[str, Any]], choices: Mapping[str, str]) -> float | None:
    """Mean seconds of a job of these configs (as they are saved), by the first, the middle and the last of them, which
    run for some seconds in a temporary folder; None where none of them came to train."""
    picked = sorted({0, len(configs) // 2, len(configs) - 1})[:_PROBES]
    known = [seconds for i in picked if (seconds := _probe(configs[i], choices)) is not None]
    return sum(known) / len(known) if known else None


def _probe(config: Mapping[str, Any], choices: Mapping[str, str]) -> float | None:
    from dlopt.errors import RunError, UserError
    from dlopt.job import describe
    from dlopt.training.checkpoint import Checkpoints

    probing = {**config, "max_time": _MINUTES, "tracking": [], "resume": None, "dry_run": False}
    with tempfile.TemporaryDirectory(prefix="dlopt-") as path:
        folder = RunFolder(Path(path))
        describe(folder.path, probing, [], choices)
        process, deadline = pools.spawn(folder.path, {}, None), time.monotonic() + _PATIENCE
        while process.poll() is None:
            if time.monotonic() > deadline:
                process.kill()
                return None
            time.sleep(0.1)
        summary = folder.summary() or {}
        seconds, steps = summary.get("seconds"), summary.get("steps")
        if summary.get("status") in ("finished", "stopped_early") or not seconds or not steps:
            return seconds
        try:
            state = Checkpoints(folder.checkpoints).load_newest()
        except (RunError, UserError):
            return None
        return None if state is None else float(seconds * state["progress"]["horizon"] / steps)


def estimate_line(seconds: float | None, jobs: int, at_once: int) -> str:
    """One line for `jobs` jobs of `seconds` each, `at_once` of them at a time."""
    from dlopt.tracking.layout import clock

    if seconds is None:
        return f"{jobs} jobs, {at_once} at once; how long they take could not be found out"
    whole = seconds * -(-jobs // at_once)
    return f"{jobs} jobs of about {clock(seconds)} each, {at_once} at once: about {clock(whole)} in all"
