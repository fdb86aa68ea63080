"""Runs a comparison in the loop of a sweep: one run after another in this process, or several at once in others."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dlopt.basics.errors import DONE
from dlopt.config.overrides import key_of, quoted_plain
from dlopt.config.saved import checkpoint_file
from dlopt.extend import FAILED, INTERRUPTED, RunError, UserError, short_path
from dlopt.lab.comparison.comparison import Comparison, VariantOutcome, VariantRun, format_final, read
from dlopt.run.runner import exit_code
from dlopt.sweeps import pool as pools
from dlopt.sweeps.jobs import Job, JobResult, PlanJob, result_of
from dlopt.tracking.overview import Overview
from dlopt.training.checkpoint.checkpoints import load_of_run
from dlopt.training.progress import TrainingRun

# In `init_from` and `loss.teacher`: the run of the same seed, of `comparison.before` or of a variant at the same point.
BEFORE = "before:"
NAMES = (BEFORE, "variant:")
START, TEACHER = "init_from", "loss.teacher"


def references(config: Mapping[str, Any]) -> dict[str, str]:
    """Returns the values that name earlier runs of the comparison, by key: `before:NAME` and `variant:NAME`."""
    values = {START: config.get(START), TEACHER: (config.get("loss") or {}).get("teacher")}
    return {key: str(value) for key, value in values.items() if str(value).startswith(NAMES)}


def _run_named(value: str, cell: VariantRun) -> VariantRun:
    """Returns the run that `before:NAME` or `variant:NAME` means in the config of a run."""
    name = value.partition(":")[2]
    return VariantRun(name, (), cell.seed) if value.startswith(BEFORE) else replace(cell, variant=name)


@dataclass(frozen=True)
class _Ended:
    """A run that has ended in this process."""

    code: int

    def poll(self) -> int:
        return self.code

    def stop(self) -> None:
        pass

    kill = stop


class VariantJobs(pools.JobSource):
    """Supplies the runs of a comparison in their order, and reads and prints their results.

    A diverged run counts; after any other failure no run follows.

    Attributes:
        outcomes: of the runs that have ended.
        code: DONE, or why no run follows.
    """

    def __init__(self, folder: Path, comparison: Comparison, jobs: Mapping[VariantRun, Job], plan_job: PlanJob) -> None:
        self.outcomes: dict[VariantRun, VariantOutcome] = {}
        self.code = DONE
        self.series = folder
        self.screen = Overview(len(jobs), silent=True)
        self._comparison, self._jobs, self._plan_job = comparison, jobs, plan_job
        self._cells, self._waiting = list(jobs), deque(jobs)
        self._newest: Job | None = None
        self._code_here: int | None = None  # of the newest run in this process, which has printed its error
        self._error = ""  # of a run in another process

    def run(self, pool: pools.Pool | None) -> int:
        """Runs all; returns the exit code. Raises `UserError`, and `RunError` for a run that failed in another process.

        pool: None to run in this process, because starting another one takes as long as half a small run.
        """
        here = pools.Pool(1, self._start_here, pools.find_local, poll_seconds=0)
        try:
            pools.run(self, pool or here, self.screen)
        except KeyboardInterrupt:
            self.code = INTERRUPTED
        if self.code == INTERRUPTED:
            done = f"stopped after {len(self.outcomes)} of {len(self._jobs)} runs"
            self.screen.message(f"{done}; resume with resume=auto")
        elif self._error:
            raise RunError(self._error)
        return self.code

    def next(self) -> Job | None:
        if self.code or not self._waiting:
            return None
        cell = self._waiting[0]
        job = self._jobs[cell]
        named = {key: _run_named(value, cell) for key, value in references(job.plan.saved).items()}
        if not self.outcomes.keys() >= {*named.values()}:
            return None  # one of them still runs in another slot
        self._waiting.popleft()
        if job.folder.has_diverged():  # on resume: it would diverge again
            self.ended(job, result_of(job.folder, FAILED))
            return self.next()
        self._newest = job if job.is_done or not named else self._with_paths(job, named)
        return self._newest

    def _with_paths(self, job: Job, named: Mapping[str, VariantRun]) -> Job:
        """Returns a job with the paths of the runs that it names, which have ended.

        The saved config keeps `before:NAME`, which is the same for all seeds and folders.
        """
        folders = {key: self._jobs[run].folder.path for key, run in named.items()}
        paths = {key: folder if key == TEACHER else checkpoint_file(folder) for key, folder in folders.items()}
        lines = [f"{key}={quoted_plain(str(path))}" for key, path in paths.items()]
        kept = [line for line in job.plan.texts if key_of(line) not in named]
        plan = self._plan_job([*kept, *lines], job.number)  # whose overrides can be typed
        run_config = replace(plan.run_config, config={**plan.run_config.config, START: job.plan.saved[START]})
        return replace(job, composed=replace(job.plan, run_config=run_config, overrides=plan.overrides))

    def _start_here(self, slot: int, folder: Path, environment: Mapping[str, str]) -> pools.Process:
        assert self._newest is not None
        job, plan = self._newest, self._newest.plan
        # The id that `describe` has written into the folder, for the checkpoints and the summary.
        run_config = replace(plan.run_config, config={"run_id": job.folder.run_id(), **plan.run_config.config})
        run = TrainingRun(run_config, folder, load_of_run(job.folder, plan.saved), plan.choices)
        self._code_here = exit_code(run, console=False, may_diverge=True)
        return _Ended(self._code_here)

    def ended(self, job: Job, result: JobResult) -> None:
        cell, code = self._cells[job.number], self._code_here
        self._code_here = None
        if result.status in ("failed", "interrupted") and not result.metrics.get("diverged"):
            if result.status == "failed" and code is None:
                self._error = self._error or f"{short_path(job.folder.path)}: {result.reason}"
            self.code = self.code or (INTERRUPTED if result.status == "interrupted" else code or FAILED)
            return
        outcome = self.outcomes[cell] = read(job.folder.path, self._comparison.all_metrics)
        for name in self._comparison.all_metrics if cell.variant in self._comparison.variants else ():
            if not outcome.may_have(name):  # it would be shown as diverged
                available = ", ".join(outcome.metrics)
                raise UserError(
                    f"comparison.metrics: the runs have no {name}; they have {available}; more: evaluate.metrics"
                )
        metrics = ", ".join(f"{name} {format_final(name, outcome.final(name))}" for name in self._comparison.metrics)
        self.screen.message(f"  {job.number + 1}/{len(self._jobs)} {job.label}: {metrics}")
