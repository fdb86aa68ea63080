"""One job of a sweep: prepares its folder, and reads or records its result."""

import contextlib
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlopt.basics.errors import DONE, INTERRUPTED, UserError
from dlopt.basics.files import write_json, write_yaml
from dlopt.basics.folders import ENDED, SPACE, RunFolder, inside
from dlopt.config.overrides import storable
from dlopt.config.resuming import refuse_other_config
from dlopt.run.record import describe, record_failure
from dlopt.sweeps.array import STOP_RUN

if TYPE_CHECKING:
    from dlopt.config.plan import Plan

OUTPUT = "output.log"  # stdout and stderr of a job
ELSEWHERE = "running elsewhere"  # the reason of a job that was not started, because a process is running it


@dataclass(frozen=True)
class DescribedPlan:
    """The plan of a job that its folder describes, for a process that did not compose it."""

    saved: Mapping[str, Any]
    environment: Mapping[str, str]


@dataclass(frozen=True)
class Job:
    """A job of a sweep.

    Attributes:
        composed: the plan, or the error of composing it.
        label: the overrides that vary between jobs.
    """

    number: int
    folder: RunFolder
    composed: "Plan | DescribedPlan | UserError"
    label: str

    @property
    def checked(self) -> "Plan | DescribedPlan":
        """Raises `UserError` for a job that cannot be composed."""
        if isinstance(self.composed, UserError):
            raise self.composed
        return self.composed

    @property
    def plan(self) -> "Plan":
        """The plan, in the process that has composed it. Raises `UserError`."""
        plan = self.checked
        assert not isinstance(plan, DescribedPlan)
        return plan

    @property
    def is_done(self) -> bool:
        return self.folder.is_done(self.checked.saved)


@dataclass(frozen=True)
class JobResult:
    """`status`: one of summary.json's, or `pruned`."""

    status: str
    metrics: Mapping[str, Any]
    reason: str = ""


PlanJob = Callable[[Sequence[str], int], "Plan"]
"""Composes and checks the job of a sweep with these overrides and this number. Raises `UserError`."""


def build_job(plan_job: PlanJob, sweep: Path, overrides: Sequence[str], number: int, label: str) -> Job:
    """Composes a job in the folder `sweep`; one that cannot be composed fails when it is started.

    Raises `UserError` if a link leads to the job's folder.
    """
    composed: Plan | UserError
    try:
        composed = plan_job(overrides, number)
    except UserError as error:
        composed = error
    name = str(number) if isinstance(composed, UserError) else composed.subfolder
    return Job(number, RunFolder(inside(sweep, name, f"hydra.sweep.dir={sweep}")), composed, label)


def labels(jobs: Sequence[Sequence[str]]) -> list[str]:
    """Joins the overrides of each job that not all jobs share, in the form to store (without secrets)."""
    jobs = [storable(job) for job in jobs]
    common = set.intersection(*map(set, jobs)) if len(jobs) > 1 else set()
    return [" ".join(line for line in job if line not in common) or "as configured" for job in jobs]


def list_jobs(sweep: Path, jobs: Sequence[Job], space: Any = None) -> None:
    """Writes the overrides of the jobs into the folder of a sweep. `space`: its content, which may have other jobs."""
    former = dict(enumerate(space if isinstance(space, list) else []))
    listed = former | {job.number: storable(job.plan.texts) for job in jobs}
    write_yaml(sweep / SPACE, [listed[number] for number in sorted(listed)])


def prepare(job: Job) -> JobResult | None:
    """Writes the job's config into its folder, unless it is there; returns the result of a job that is done already.

    Raises `UserError` if the job cannot be composed, or the folder holds a run with another config.
    """
    folder, plan = job.folder, job.checked
    (folder.path / STOP_RUN).unlink(missing_ok=True)
    if folder.has_begun():
        refuse_other_config(folder.config() or plan.saved, plan.saved, str(folder.path), folder.typed())
        if job.is_done:
            return result_of(folder, DONE)
        # Before the job starts: if its process dies without a summary, the previous summary would count as its result.
        with contextlib.suppress(OSError):
            (folder.path / "summary.json").unlink(missing_ok=True)  # of the previous attempt
    if not isinstance(plan, DescribedPlan):
        describe(folder.path, plan.saved, plan.typed, plan.choices)
    return None


def result_of(folder: RunFolder, code: int) -> JobResult:
    """Returns the result of the process that ended in this folder with exit code `code`.

    Records a failure if the process left no summary, or one that does not agree with its exit code.
    """
    summary = folder.summary()
    if summary is None and code == INTERRUPTED:  # stopped before it wrote anything
        return JobResult("interrupted", {})
    if summary is None or (code not in (DONE, INTERRUPTED) and summary.get("status") != "failed"):
        reason = f"exit code {code}; see {OUTPUT}"
        if code < 0:
            name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
            reason = f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
        return failed(folder, reason, died=True)
    status = str(summary.get("status", "failed"))
    return JobResult("pruned" if summary.get("pruned") else status, summary, str(summary.get("reason", "")))


def failed(folder: RunFolder, reason: str, *, died: bool = False) -> JobResult:
    """Records a failure that the run has not recorded itself. `died`: its process ended without a result."""
    with contextlib.suppress(OSError):
        folder.path.mkdir(parents=True, exist_ok=True)
    return JobResult("failed", record_failure(folder.path, reason, died=died), reason)


def record_pruned(folder: RunFolder, epoch: int) -> JobResult:
    """Records a pruned job as stopped early, with its metrics so far and without a test."""
    summary = {**(folder.summary() or {}), "status": "stopped_early", "pruned": True, "pruned_at_epoch": epoch}
    write_json(folder.path / "summary.json", summary)
    return JobResult("pruned", summary)


def record_dead(folder: RunFolder) -> None:
    """Marks a job as failed if its process died without a summary; a later attempt replaces the mark."""
    if folder.has_begun() and folder.summary() is None and not folder.is_live():
        failed(folder, "its process was killed; resume=auto runs it again", died=True)


def seconds_of_ended(folder: Path) -> list[float]:
    """Returns the seconds of the jobs in `folder` that have ended by themselves."""
    summaries = [RunFolder(path.parent).summary() or {} for path in sorted(folder.glob("*/summary.json"))]
    ended = [each.get("seconds") for each in summaries if each.get("status") in ENDED]
    return [float(seconds) for seconds in ended if isinstance(seconds, int | float)]
