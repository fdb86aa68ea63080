"""`dlopt train -m`: every job is checked before the first one starts, and runs in a process of its own."""

import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from omegaconf import DictConfig, OmegaConf, open_dict

from dlopt.commands.hydra_main import quoted, run_hydra
from dlopt.config.compose import Composer, choices_of, hydra_arguments, to_plain
from dlopt.errors import UserError
from dlopt.folders import RunFolder, differences, make, make_new, newest, refuse_other_config
from dlopt.tracking.files import write_atomically

if TYPE_CHECKING:
    from dlopt.engine.interruption import Interruption

_SPACE = "sweep.yaml"  # the overrides of each job


@dataclass(frozen=True)
class Job:
    overrides: list[str]
    subfolder: str
    config: Mapping[str, Any]  # as it is saved

    def folder(self, sweep: Path) -> RunFolder:
        return RunFolder(sweep / self.subfolder)


def sweep(composer: Composer, parsed: Namespace) -> int:
    """Runs the sweep and returns its exit code. Raises `UserError` before anything is made."""
    if any(name in os.environ for name in ("TORCHELASTIC_RUN_ID", "SLURM_STEP_ID")):
        raise UserError(
            "-m: not inside torchrun or srun, where every rank would start the sweep; start it from a shell"
        )
    whole = composer.compose(parsed.overrides, multirun=True)
    jobs = _jobs(composer, whole, parsed.overrides)
    path = OmegaConf.select(whole, "hydra.sweep.dir")
    if not path or not str(path).strip():
        raise UserError(f"hydra.sweep.dir={path or ''}: the path of a folder is needed")
    is_typed = any(line.lstrip("+").startswith("hydra.sweep.dir=") for line in parsed.overrides)
    folder = _find_folder(Path(str(path)).absolute(), is_typed, jobs, whole.resume)
    if jobs and all(job.folder(folder).is_done(job.config) for job in jobs):
        print(f"this sweep is finished: {folder}")
        return 0
    with RunFolder(folder).lock():
        write_atomically(folder / _SPACE, yaml.safe_dump([job.overrides for job in jobs], allow_unicode=True).encode())
        try:
            run_hydra(hydra_arguments(parsed, f"hydra.sweep.dir={quoted(folder)}"), start_job)
        except KeyboardInterrupt:
            return 75
    return _outcome(folder, jobs)


def _jobs(composer: Composer, whole: DictConfig, overrides: list[str]) -> list[Job]:
    """The checked jobs of a grid, expanded as Hydra's own sweeper does; other sweepers choose as they go."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.errors import HydraException

    from dlopt.config.experiment import parse

    sweeper = whole.hydra.sweeper
    if not str(sweeper._target_).endswith("BasicSweeper"):
        return []
    lines = [f"{key}={value}" for key, value in (sweeper.params or {}).items()]
    typed = composer.parse([*lines, *overrides])
    swept = [o for o in typed if not o.get_key_element().lstrip("+~").startswith(("hydra.", "hydra/"))]
    hydra = [str(o.input_line) for o in typed if o not in swept]
    try:
        [grid] = BasicSweeper.split_arguments(swept, None)
    except HydraException as error:
        raise UserError(str(error)) from None
    if not grid:
        raise UserError("-m: a list of values is empty, so that there is nothing to run")
    jobs = []
    for number, job in enumerate(grid):
        config = composer.compose([*hydra, *job])
        plain, saved = to_plain(config, overrides)
        parse(plain, saved)
        if saved["resume"] not in (None, "auto"):
            raise UserError(f"resume={saved['resume']}: a sweep goes on by resume=auto")
        with open_dict(config):
            config.hydra.job.num = config.hydra.job.id = number
        jobs.append(Job(job, str(config.hydra.sweep.subdir), saved))
    if len({job.subfolder for job in jobs}) < len(jobs):
        raise UserError(f"hydra.sweep.subdir={jobs[0].subfolder}: every job needs a folder of its own")
    return jobs


def _find_folder(wanted: Path, is_typed: bool, jobs: Sequence[Job], resume: str | None) -> Path:
    """The folder of the sweep, made if need be."""
    if is_typed and RunFolder(wanted).is_live():
        raise UserError(f"hydra.sweep.dir={wanted}: another sweep is at work in this folder")
    if not is_typed:
        goes_on = resume == "auto" and jobs
        found = newest(wanted.parent, lambda folder: _is_unfinished(folder, jobs)) if goes_on else None
        return make_new(wanted, "hydra.sweep.dir") if found is None else found.path
    if not wanted.is_dir():
        return make(wanted, "hydra.sweep.dir")
    for job in jobs:
        folder = job.folder(wanted)
        if folder.holds_a_run():
            if resume != "auto":
                raise UserError(f"hydra.sweep.dir={wanted}: this folder holds a sweep; go on with it by resume=auto")
            refuse_other_config(folder.config() or job.config, job.config, str(folder.path), folder.history())
    return wanted


def _is_unfinished(sweep: RunFolder, jobs: Sequence[Job]) -> bool:
    """Whether this folder holds the same search space, with something left to do."""
    try:
        space = yaml.safe_load((sweep.path / _SPACE).read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return False
    if sweep.is_live() or not isinstance(space, list) or len(space) != len(jobs):
        return False
    folders = [job.folder(sweep.path) for job in jobs]
    configs = [folder.config() for folder in folders]
    if all(f.is_done(job.config) for f, job in zip(folders, jobs, strict=True)):
        return False
    pairs = zip(configs, jobs, strict=True)
    return not any(config is not None and differences(config, job.config) for config, job in pairs)


def start_job(config: DictConfig) -> str:
    """One job of a sweep in a process of its own; returns its status. A job that fails does not stop the others."""
    from hydra.core.hydra_config import HydraConfig

    from dlopt.engine.interruption import Interruption
    from dlopt.job import DONE, INTERRUPTED, complain, describe

    hydra = HydraConfig.get()
    folder = RunFolder(Path(hydra.runtime.output_dir))
    overrides = [str(line) for line in hydra.overrides.task]
    try:
        _, saved = to_plain(config, overrides)
        if folder.holds_a_run():
            refuse_other_config(folder.config() or saved, saved, str(folder.path), folder.history())
            if folder.is_done(saved):
                print(f"job {hydra.job.num}: finished before", flush=True)
                return "finished"
        whole = OmegaConf.create({**config, "hydra": {"runtime": {"choices": hydra.runtime.choices}}})
        describe(folder.path, saved, overrides, choices_of(whole))
    except UserError as error:
        complain(str(error))
        return "failed"
    print(f"job {hydra.job.num}: {' '.join(overrides) or 'as configured'}", flush=True)
    with Interruption() as interruption:
        process = subprocess.Popen([sys.executable, "-m", "dlopt.job", str(folder.path)])
        code = _wait(process, interruption)
    if interruption:
        raise KeyboardInterrupt
    status = (folder.summary() or {}).get("status", "failed")
    return "interrupted" if code == INTERRUPTED else str(status) if code == DONE else "failed"


def _wait(process: "subprocess.Popen[bytes]", interruption: "Interruption") -> int:
    """Waits for the job, which hears of a signal that reached only this process."""
    is_told = False
    try:
        while True:
            try:
                return process.wait(timeout=0.2)
            except subprocess.TimeoutExpired:
                if interruption and not is_told:
                    process.terminate()
                    is_told = True
    except KeyboardInterrupt:
        process.kill()
        process.wait()
        raise


def _outcome(sweep: Path, jobs: Sequence[Job]) -> int:
    folders = [job.folder(sweep) for job in jobs]
    if not jobs:
        folders = [RunFolder(path) for path in sweep.iterdir() if (path / "config.yaml").exists()]
    status = [(folder.summary() or {}).get("status", "failed") for folder in folders]
    if not folders or "failed" in status:
        return 1
    return 75 if "interrupted" in status else 0
