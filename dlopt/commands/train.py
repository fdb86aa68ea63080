"""`dlopt train`: compose, check, find the folder, and only then let Hydra start the run or the sweep."""

import os
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dlopt.commands.hydra_main import nothing, run_hydra
from dlopt.config.compose import Composer, parse_arguments, to_plain
from dlopt.errors import UserError
from dlopt.folders import RunFolder, differences, make_new, newest_unfinished


def train(arguments: list[str]) -> int:
    """Runs the command line behind `dlopt train`; returns the exit code. Raises `UserError`."""
    parsed = parse_arguments(arguments)
    if parsed.help or parsed.hydra_help or parsed.cfg or parsed.info or parsed.shell_completion:
        return _show(arguments, parsed)
    composer = Composer(parsed.config_name, parsed.config_dir)
    if parsed.multirun:
        return _sweep(composer, arguments, parsed.overrides)
    return _run(composer.compose(parsed.overrides), arguments, parsed.overrides)


def _show(arguments: list[str], parsed: Namespace) -> int:
    if parsed.shell_completion:
        from dlopt.commands.completion import complete

        return complete(arguments)
    composer = Composer(parsed.config_name, parsed.config_dir)
    composer.compose(parsed.overrides)  # explains what is wrong better than Hydra does
    run_hydra(arguments, nothing)
    return 0


def _run(config: DictConfig, arguments: list[str], overrides: list[str]) -> int:
    from dlopt.config.experiment import parse
    from dlopt.job import USER_ERROR, complain, describe, execute
    from dlopt.run import Run

    plain, saved = to_plain(config, overrides)
    experiment = parse(plain, saved)
    choices = _choices(config)
    folder, state, is_new = _find_folder(config, saved, overrides)
    if folder.is_finished() and plain["resume"] == "auto":
        return _tell_finished(folder)
    outcome = USER_ERROR

    def task(_: DictConfig) -> None:
        nonlocal outcome
        describe(folder.path, saved, overrides, choices)
        outcome = execute(Run(experiment, folder.path, state, choices))

    try:
        run_hydra([*arguments, f"hydra.run.dir={_quoted(folder.path)}"], task)
    except UserError as error:
        complain(str(error))
    if outcome == USER_ERROR and is_new:
        shutil.rmtree(folder.path, ignore_errors=True)
    return outcome


def _choices(config: DictConfig) -> dict[str, str]:
    chosen = OmegaConf.to_container(config.hydra.runtime.choices)
    assert isinstance(chosen, dict)
    return {str(k): str(v) for k, v in chosen.items() if not str(k).startswith("hydra") and v is not None}


def _find_folder(
    config: DictConfig, saved: Mapping[str, Any], overrides: list[str]
) -> tuple[RunFolder, Mapping[str, Any] | None, bool]:
    """(folder, checkpoint to go on from or None, whether the folder was made just now)."""
    from dlopt.engine.checkpoint import Checkpoints, load

    wanted = Path(str(OmegaConf.select(config, "hydra.run.dir"))).absolute()
    is_typed = any(line.lstrip("+").startswith("hydra.run.dir=") for line in overrides)
    resume = saved["resume"]
    given = RunFolder(wanted)
    if given.is_live():
        raise UserError(f"hydra.run.dir={wanted}: another run is at work in this folder")
    if resume == "auto":
        found = given if is_typed else newest_unfinished(wanted.parent, saved)
        if found is not None and found.holds_a_run():
            _refuse_other_config(found.config() or saved, saved, f"{found.path}", found.history())
            if found.is_finished():
                return found, None, False
            return found, Checkpoints(found.checkpoints).load_newest(), False
    elif given.holds_a_run():
        state = "finished" if given.is_finished() else "unfinished"
        raise UserError(
            f"hydra.run.dir={wanted}: this folder holds a run that is {state}; "
            "go on with it by resume=auto, or name another folder"
        )
    checkpoint = None
    if resume not in (None, "auto"):
        checkpoint = load(Path(resume))
        history = RunFolder(Path(resume).absolute().parents[1]).history()
        _refuse_other_config(checkpoint["config"], saved, resume, history)
    if wanted.is_dir() and is_typed:
        return given, checkpoint, False
    folder = RunFolder(make_new(wanted))
    if checkpoint is not None:
        _take_history(Path(resume).absolute().parents[1], folder.path)
    return folder, checkpoint, True


def _take_history(source: Path, target: Path) -> None:
    """The figures up to the checkpoint belong to the continued run too; the tracking cuts what lies beyond it."""
    if (source / "metrics.jsonl").is_file():
        shutil.copy(source / "metrics.jsonl", target / "metrics.jsonl")


def _refuse_other_config(old: Mapping[str, Any], new: Mapping[str, Any], place: str, typed: list[str]) -> None:
    different = differences(old, new)
    if not different:
        return
    shown = "; ".join(f"{key}: {_show_value(a)} there, {_show_value(b)} now" for key, (a, b) in different.items())
    command = " ".join(["dlopt train", *(line for line in typed if not line.startswith("resume="))])
    raise UserError(f"resume: {place} belongs to another config ({shown}); that run was started with: {command}")


def _show_value(value: object) -> str:
    return "null" if value is None else str(value)


def _tell_finished(folder: RunFolder) -> int:
    from dlopt.tracking.console import ConsoleView

    summary = folder.summary() or {}
    ConsoleView().finish(summary, [f"this run is finished: {folder.path}"])
    return 0


def _quoted(path: Path) -> str:
    """A path as a value of Hydra's override grammar."""
    escaped = str(path).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


# -- sweeps


def _sweep(composer: Composer, arguments: list[str], overrides: list[str]) -> int:
    from dlopt.config.experiment import parse

    if any(name in os.environ for name in ("TORCHELASTIC_RUN_ID", "SLURM_STEP_ID")):
        raise UserError("-m: not inside torchrun or srun, where every rank would start the sweep; start it from a shell")
    whole = composer.compose(overrides, multirun=True)
    for job in _jobs(composer, whole, overrides):
        plain, saved = to_plain(composer.compose(job), overrides)
        parse(plain, saved)
    wanted = Path(str(OmegaConf.select(whole, "hydra.sweep.dir"))).absolute()
    folder = wanted if wanted.is_dir() else make_new(wanted)
    interrupted = False
    try:
        run_hydra([*arguments, f"hydra.sweep.dir={_quoted(folder)}"], start_job)
    except KeyboardInterrupt:
        interrupted = True
    return 75 if interrupted else _sweep_outcome(folder)


def _jobs(composer: Composer, whole: DictConfig, overrides: list[str]) -> list[list[str]]:
    """The overrides of each job of a grid, expanded as Hydra's own sweeper does; other sweepers choose as they go."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.errors import HydraException

    parsed = [o for o in composer.parse(overrides) if not o.get_key_element().lstrip("+~").startswith("hydra")]
    if not str(whole.hydra.sweeper._target_).endswith("BasicSweeper"):
        return []
    try:
        batches = BasicSweeper.split_arguments(parsed, None)
    except HydraException as error:
        raise UserError(str(error)) from None
    return [job for batch in batches for job in batch]


def start_job(config: DictConfig) -> str:
    """One job of a sweep in a process of its own; returns its status. Never raises, so that the others go on."""
    from hydra.core.hydra_config import HydraConfig

    from dlopt.job import INTERRUPTED, describe

    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    overrides = [str(line) for line in hydra.overrides.task]
    whole = OmegaConf.create({**config, "hydra": {"runtime": {"choices": hydra.runtime.choices}}})
    _, saved = to_plain(config, overrides)
    describe(folder, saved, overrides, _choices(whole))
    print(f"job {hydra.job.num}: {' '.join(overrides) or 'as configured'}", flush=True)
    process = subprocess.Popen([sys.executable, "-m", "dlopt.job", str(folder)])
    try:
        code = process.wait()
    except KeyboardInterrupt:
        code = process.wait()
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    return str((RunFolder(folder).summary() or {}).get("status", "failed"))


def _sweep_outcome(folder: Path) -> int:
    jobs = [RunFolder(path) for path in folder.iterdir() if (path / "config.yaml").exists()]
    return 0 if jobs and all(job.is_finished() for job in jobs) else 1
