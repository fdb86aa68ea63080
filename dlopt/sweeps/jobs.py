"""One job of a sweep: its folder before it starts, and how it ended."""

import contextlib
import json
import re
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from dlopt.config.resuming import refuse_other_config
from dlopt.errors import DONE, INTERRUPTED, UserError
from dlopt.files import write_atomically
from dlopt.folders import RunFolder

SPACE = "sweep.yaml"  # in a sweep's folder; of a grid: the overrides of each job; of a search: what it searches
OUTPUT = "output.log"  # what a job says on stdout and stderr
_ODD = re.compile(r"[^\w.,=+@-]+")


@dataclass(frozen=True)
class Job:
    number: int
    folder: RunFolder
    config: Mapping[str, Any]  # as it is saved
    overrides: Sequence[str]
    choices: Mapping[str, str]
    label: str
    environment: Mapping[str, str] = field(default_factory=dict)  # hydra.job.env_set
    error: str = ""  # why it cannot run


@dataclass(frozen=True)
class Result:
    """`status`: one of summary.json's, or `pruned`."""

    status: str
    metrics: Mapping[str, Any]
    reason: str = ""


def compose(loader: Any, sweep: DictConfig, overrides: Sequence[str], number: int, label: str = "") -> Job:
    """The job of a composed sweep that has these overrides; `label`: those that tell it from the others.

    Raises `UserError`.
    """
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from dlopt.config.compose import choices_of, to_plain
    from dlopt.config.parsing import parse

    try:
        config = loader.load_sweep_config(sweep, list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(" ".join(str(error).split())) from None
    with open_dict(config):
        config.hydra.job.num = config.hydra.job.id = number
    plain, saved = to_plain(config, None)  # allow_packages was checked for the sweep as a whole
    parse(plain, saved)
    environment = OmegaConf.to_container(config.hydra.job.env_set, resolve=True)
    assert isinstance(environment, dict)
    folder = RunFolder(Path(str(sweep.hydra.sweep.dir)) / folder_name(str(config.hydra.sweep.subdir)))
    set_there = {str(key): str(value) for key, value in environment.items()}
    return Job(number, folder, saved, list(overrides), choices_of(config), label, set_there)


def compose_or_refuse(loader: Any, sweep: DictConfig, overrides: Sequence[str], number: int, label: str) -> Job:
    """As `compose`; a job that cannot be composed carries the error instead."""
    try:
        return compose(loader, sweep, overrides, number, label)
    except UserError as error:
        folder = RunFolder(Path(str(sweep.hydra.sweep.dir)) / str(number))
        return Job(number, folder, {}, list(overrides), {}, label, error=str(error))


def labels(jobs: Sequence[Sequence[str]]) -> list[str]:
    """Of the overrides of each job those that not all jobs share."""
    common = set.intersection(*map(set, jobs)) if len(jobs) > 1 else set()
    return [" ".join(line for line in job if line not in common) or "as configured" for job in jobs]


def folder_name(subfolder: str) -> str:
    """hydra.sweep.subdir as a path that every file system takes and that stays within the sweep. Raises `UserError`."""
    parts = [_ODD.sub("_", part)[:200] for part in subfolder.split("/") if part]
    if not parts or subfolder.startswith("/") or ".." in parts:
        raise UserError(f"hydra.sweep.subdir={subfolder}: a folder below hydra.sweep.dir is needed")
    return "/".join(parts)


def begin(job: Job) -> Result | None:
    """Writes what the job is into its folder; its result where it has one already. Raises `UserError`."""
    from dlopt.job import describe

    folder = job.folder
    if folder.holds_a_run():
        refuse_other_config(folder.config() or job.config, job.config, str(folder.path), folder.history())
        if folder.is_done(job.config):
            return result_of(folder, DONE)
        with contextlib.suppress(OSError):
            (folder.path / "summary.json").unlink(missing_ok=True)  # of the attempt before
    describe(folder.path, job.config, job.overrides, job.choices)
    return None


def result_of(folder: RunFolder, code: int) -> Result:
    """How the process ended that has just run in this folder; one that left no summary is recorded as failed."""
    summary = folder.summary()
    if summary is None and code == INTERRUPTED:  # stopped before there was anything to write
        return Result("interrupted", {})
    if summary is None or (code not in (DONE, INTERRUPTED) and summary.get("status") != "failed"):
        return record_failure(folder, _ended(code))
    status = str(summary.get("status", "failed"))
    return Result("pruned" if summary.get("pruned") else status, summary, str(summary.get("reason", "")))


def _ended(code: int) -> str:
    if code < 0:
        name = signal.Signals(-code).name
        return f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    return f"its process ended with exit code {code}; what it said is in {OUTPUT}"


def record_failure(folder: RunFolder, reason: str) -> Result:
    summary = {"status": "failed", "reason": reason}
    with contextlib.suppress(OSError):
        folder.path.mkdir(parents=True, exist_ok=True)
        _write_summary(folder, summary)
    return Result("failed", summary, reason)


def record_pruned(folder: RunFolder, epoch: int) -> Result:
    """A stopped job counts as stopped early, with a mark: its metrics are those up to there, and it is not tested."""
    summary = {**(folder.summary() or {}), "status": "stopped_early", "pruned": True, "pruned_at_epoch": epoch}
    _write_summary(folder, summary)
    return Result("pruned", summary)


def record_dead(folder: RunFolder) -> None:
    """Marks a job as failed whose process ended without a word, until it has run again."""
    if folder.holds_a_run() and folder.summary() is None and not folder.is_live():
        record_failure(folder, "its process was killed, with the sweep or before; resume=auto runs it again")


def _write_summary(folder: RunFolder, summary: Mapping[str, Any]) -> None:
    write_atomically(folder.path / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
