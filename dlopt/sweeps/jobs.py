"""One job of a sweep: composes it, prepares its folder, and reads or records its result."""

import contextlib
import re
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from dlopt.config.resolve import choices_of, to_plain
from dlopt.config.resuming import refuse_other_config
from dlopt.errors import DONE, INTERRUPTED, UserError
from dlopt.files import write_json
from dlopt.folders import RunFolder
from dlopt.job import describe

SPACE = "sweep.yaml"  # in a sweep's folder; grid: the overrides of each job; search: its space and config
OUTPUT = "output.log"  # stdout and stderr of a job
_UNSAFE = re.compile(r"[^\w.,=+@-]+")  # in a file name


@dataclass(frozen=True)
class Job:
    number: int
    folder: RunFolder
    config: Mapping[str, Any]  # as saved
    overrides: Sequence[str]
    choices: Mapping[str, str]
    label: str
    environment: Mapping[str, str] = field(default_factory=dict)  # hydra.job.env_set
    error: str = ""  # non-empty: the job cannot be composed


@dataclass(frozen=True)
class Result:
    """`status`: one of summary.json's, or `pruned`."""

    status: str
    metrics: Mapping[str, Any]
    reason: str = ""


def compose(loader: Any, sweep: DictConfig, overrides: Sequence[str], number: int, label: str = "") -> Job:
    """Composes and checks the job of a sweep that has these overrides. `label`: the overrides that vary between jobs.

    Raises `UserError`.
    """
    from dlopt.config.parsing import parse  # imports torch

    try:
        config = loader.load_sweep_config(sweep, list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(" ".join(str(error).split())) from None
    with open_dict(config):
        config.hydra.job.num = config.hydra.job.id = number
    plain, saved = to_plain(config, None)  # allow_packages was checked when the sweep started
    parse(plain, saved)
    folder = RunFolder(Path(str(sweep.hydra.sweep.dir)) / folder_name(str(config.hydra.sweep.subdir)))
    return Job(number, folder, saved, list(overrides), choices_of(config), label, environment_of(config))


def environment_of(config: DictConfig) -> dict[str, str]:
    """Returns the variables of hydra.job.env_set."""
    env_set: Any = OmegaConf.to_container(config.hydra.job.env_set, resolve=True)
    return {str(key): str(value) for key, value in env_set.items()}


def compose_or_fail(loader: Any, sweep: DictConfig, overrides: Sequence[str], number: int, label: str) -> Job:
    """Composes a job as `compose` does; on an error returns a job whose `error` is set."""
    try:
        return compose(loader, sweep, overrides, number, label)
    except UserError as error:
        folder = RunFolder(Path(str(sweep.hydra.sweep.dir)) / str(number))
        return Job(number, folder, {}, list(overrides), {}, label, error=str(error))


def labels(jobs: Sequence[Sequence[str]]) -> list[str]:
    """Joins for each job the overrides that not all jobs share."""
    common = set.intersection(*map(set, jobs)) if len(jobs) > 1 else set()
    return [" ".join(line for line in job if line not in common) or "as configured" for job in jobs]


def folder_name(subfolder: str) -> str:
    """Returns hydra.sweep.subdir with unsafe characters replaced. Raises `UserError` if it is not below the sweep."""
    parts = [_UNSAFE.sub("_", part)[:200] for part in subfolder.split("/") if part]
    if not parts or subfolder.startswith("/") or ".." in parts:
        raise UserError(f"hydra.sweep.subdir={subfolder}: must be a folder below hydra.sweep.dir")
    return "/".join(parts)


def prepare(job: Job) -> Result | None:
    """Writes the job's config into its folder; if the job is done already, returns its result instead.

    Raises `UserError` if the folder holds a run with another config.
    """
    folder = job.folder
    if folder.has_run():
        refuse_other_config(folder.config() or job.config, job.config, str(folder.path), folder.history())
        if folder.is_done(job.config):
            return result_of(folder, DONE)
        with contextlib.suppress(OSError):
            (folder.path / "summary.json").unlink(missing_ok=True)  # of the previous attempt
    describe(folder.path, job.config, job.overrides, job.choices)
    return None


def result_of(folder: RunFolder, code: int) -> Result:
    """Returns the result of the process that ended in this folder with exit code `code`.

    Records a failure if the process left no summary, or one that does not agree with its exit code.
    """
    summary = folder.summary()
    if summary is None and code == INTERRUPTED:  # stopped before it wrote anything
        return Result("interrupted", {})
    if summary is None or (code not in (DONE, INTERRUPTED) and summary.get("status") != "failed"):
        return record_failure(folder, _explain_exit(code), died=True)
    status = str(summary.get("status", "failed"))
    return Result("pruned" if summary.get("pruned") else status, summary, str(summary.get("reason", "")))


def _explain_exit(code: int) -> str:
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        return f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    return f"exit code {code}; see {OUTPUT}"


def record_failure(folder: RunFolder, reason: str, *, died: bool = False) -> Result:
    """Records a failure that the run has not recorded itself. `died`: its process ended without a result."""
    summary = {"status": "failed", "reason": reason} | ({"died": True} if died else {})
    with contextlib.suppress(OSError):
        folder.path.mkdir(parents=True, exist_ok=True)
        write_json(folder.path / "summary.json", summary)
    return Result("failed", summary, reason)


def record_pruned(folder: RunFolder, epoch: int) -> Result:
    """Records a pruned job as stopped early, with its metrics so far and without a test."""
    summary = {**(folder.summary() or {}), "status": "stopped_early", "pruned": True, "pruned_at_epoch": epoch}
    write_json(folder.path / "summary.json", summary)
    return Result("pruned", summary)


def record_dead(folder: RunFolder) -> None:
    """Marks a job as failed if its process died without a summary; a later attempt replaces the mark."""
    if folder.has_run() and folder.summary() is None and not folder.is_live():
        record_failure(folder, "its process was killed; resume=auto runs it again", died=True)
