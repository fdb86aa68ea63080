"""`dlopt train`: compose, check, find or make the folder, and only then run."""

import contextlib
import json
import os
import shutil
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.types import RunMode
from omegaconf import DictConfig

from dlopt.config.compose import (
    Composer,
    choices_of,
    job_environment,
    parse_arguments,
    resolve_saved,
    show_config,
    to_plain,
    typed_folder,
)
from dlopt.config.inherit import inherit
from dlopt.config.resuming import newest_unfinished, refuse_other_config
from dlopt.errors import FAILED, USER_ERROR, UserError
from dlopt.folders import FolderSnapshot, RunFolder, make, make_new
from dlopt.parallel.rendezvous import World, current, end_process, join_store

if TYPE_CHECKING:
    from torch.distributed import Store

    from dlopt.training.trainer import Run


def train(arguments: list[str]) -> int:
    """Runs the command line after `dlopt train`; returns the exit code. Raises `UserError`."""
    parsed = parse_arguments(arguments)
    if parsed.help:
        from dlopt.commands.help import help_page

        print(help_page(parsed.config_dir))
        return 0
    _check_flags(parsed)
    world = current()
    if world is not None:
        _prepare_rank(world, parsed)
    composer = Composer(parsed.config_name, parsed.config_dir)
    parsed.overrides = inherit(composer, parsed.overrides)
    if world is not None and not world.is_main:
        return _follow(composer, parsed, world)
    if parsed.hydra_help or parsed.cfg or parsed.info:
        composer.compose(parsed.overrides)  # explains errors better than Hydra does
        show_config(parsed)
        return 0
    config = None if parsed.multirun else composer.compose(parsed.overrides)
    if config is None or config.hydra.mode == RunMode.MULTIRUN:  # which a recipe may set
        from dlopt.commands.sweep import sweep

        return sweep(composer, parsed)
    if config.get("comparison") is not None:
        from dlopt.commands.compare import compare

        return compare(composer, parsed, config)
    return _run(config, parsed) if world is None else _lead(config, parsed, world)


def _check_flags(parsed: Namespace) -> None:
    modes = [f"--{name}" for name in ("run", "multirun", "cfg", "info") if getattr(parsed, name)]
    if len(modes) > 1:
        raise UserError(f"{' '.join(modes)}: only one of these at a time")
    if parsed.resolve and not parsed.cfg:
        raise UserError("--resolve: only with --cfg, whose config it resolves")


def _prepare_rank(world: World, parsed: Namespace) -> None:
    """Sets up one of the processes of a launcher, before it imports torch."""
    from dlopt.parallel.launch import end_with_torchrun

    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # a lost peer is reported in one line, not in C++ frames
    end_with_torchrun()
    if world.restarts and not any(line.startswith("resume=") for line in parsed.overrides):
        parsed.overrides.append("resume=auto")  # the launcher has started the run again


def _lead(config: DictConfig, parsed: Namespace, world: World) -> int:
    """Rank 0 of processes that a launcher started: chooses the folder and sends the run to the other ranks."""
    from dlopt.job import complain

    store = _meet(config, world)
    code = FAILED
    try:
        code = _run(config, parsed, send=lambda what: store.set("run", json.dumps(what)))
    except UserError as error:
        complain(str(error))
        code = USER_ERROR
    finally:
        with contextlib.suppress(RuntimeError):  # the launcher that keeps the store may be gone
            store.compare_set("run", "", json.dumps({"exit": code}))  # unless the run was sent
    end_process(code)


def _follow(composer: Composer, parsed: Namespace, world: World) -> int:
    """Ranks > 0: receives the run from rank 0, which also reports config errors."""
    from dlopt.config.parsing import parse
    from dlopt.job import execute
    from dlopt.training.trainer import Run

    if parsed.multirun or parsed.hydra_help or parsed.cfg or parsed.info:
        return USER_ERROR if parsed.multirun else 0
    try:
        config = composer.compose(parsed.overrides)
    except UserError:
        end_process(USER_ERROR)
    sent = json.loads(_meet(config, world).get("run"))
    if "exit" in sent:
        end_process(sent["exit"])
    experiment = parse(resolve_saved(sent["config"]), sent["config"])
    end_process(execute(Run(experiment, Path(sent["folder"]), None, sent["choices"]), typed=parsed.overrides))


def _meet(config: DictConfig, world: World) -> "Store":
    parallel = config.parallel
    return join_store(
        world,
        minutes=parallel.get("timeout_minutes", 10.0),
        address=parallel.get("master_addr"),
        port=parallel.get("master_port"),
    )


@dataclass(frozen=True)
class Prepared:
    """A checked run and its folder, in which nothing is written yet."""

    run: "Run"
    folder: RunFolder
    before: FolderSnapshot  # of the folder
    is_new: bool
    is_done: bool  # there is nothing left to do


def prepare(config: DictConfig, overrides: Sequence[str]) -> Prepared:
    """Checks the composed `config` and finds or makes its folder. Raises `UserError`."""
    from dlopt.config.parsing import parse
    from dlopt.training.trainer import Run

    plain, saved = to_plain(config, overrides)
    experiment = parse(plain, saved)
    wanted, is_typed = typed_folder(config, "hydra.run.dir", overrides)
    if plain["dry_run"]:
        raise UserError("dry_run=true: only available in `dlopt train`")
    before = FolderSnapshot(wanted)
    folder, state = _find_folder(wanted, is_typed, saved)
    is_done = plain["resume"] == "auto" and folder.is_done(saved)
    run = Run(experiment, folder.path, state, choices_of(config), overrides)
    return Prepared(run, folder, before, folder.config() is None, is_done)


def _estimate(config: DictConfig, overrides: Sequence[str]) -> int:
    from dlopt.config.parsing import parse
    from dlopt.sweeps.grid import estimate_job_seconds, estimate_line

    plain, saved = to_plain(config, overrides)
    parse(plain, saved)
    print(estimate_line(estimate_job_seconds([saved], choices_of(config)), 1, 1))
    return 0


def _run(config: DictConfig, parsed: Namespace, send: Callable[[Mapping[str, Any]], None] | None = None) -> int:
    """`send`: takes what other ranks need to join the run."""
    from dlopt.job import execute

    if config.dry_run is True:
        return _estimate(config, parsed.overrides)
    ready = prepare(config, parsed.overrides)
    run, folder = ready.run, ready.folder
    if ready.is_done:
        return _show_finished(folder)
    if config.resume == "auto" and ready.is_new:
        print("resume=auto: there is no unfinished run of this config, so a new one begins", flush=True)
    if ready.is_new and (folder.config() is not None or folder.is_live()):
        raise UserError(f"hydra.run.dir={folder.path}: another run is active in this folder")  # it was quicker
    outcome = USER_ERROR
    try:
        with job_environment(config, folder.path):
            if send is not None:
                send({"config": run.experiment.config, "folder": str(folder.path), "choices": run.choices})
            outcome = execute(run, typed=parsed.overrides)
    finally:
        if outcome == USER_ERROR and ready.is_new and not folder.is_live():
            ready.before.erase(folder.path)
    return outcome


def _find_folder(wanted: Path, is_typed: bool, saved: Mapping[str, Any]) -> tuple[RunFolder, Mapping[str, Any] | None]:
    """The folder, made if need be, and the checkpoint to go on from or None."""
    from dlopt.training.checkpoint import Checkpoints

    given, resume = RunFolder(wanted), saved["resume"]
    if is_typed and given.is_live():
        raise UserError(f"hydra.run.dir={wanted}: another run is active in this folder")
    if is_typed:
        given.refuse_newer(f"hydra.run.dir={wanted}")
    if resume == "auto":
        found = given if is_typed else newest_unfinished(wanted.parent, saved)
        if found is not None and found.holds_a_run():
            found.refuse_newer("resume=auto")
            refuse_other_config(found.config() or saved, saved, f"{found.path}", found.history())
            if found.is_done(saved):
                return found, None
            return found, Checkpoints(found.checkpoints).load_newest()
    home = None if resume in (None, "auto") else Path(resume).absolute().parent.parent
    if is_typed and given.holds_a_run() and given.path != home:
        state = "finished" if given.is_finished() else "unfinished"
        raise UserError(
            f"hydra.run.dir={wanted}: this folder holds a run that is {state}; "
            "resume it with resume=auto, or name another folder"
        )
    checkpoint = None
    if home is not None:
        RunFolder(home).refuse_newer(f"resume={resume}")
        checkpoint = _load(resume)
        refuse_other_config(checkpoint["config"], saved, resume, RunFolder(home).history())
    if is_typed and wanted.is_dir():
        folder = given
    else:
        folder = RunFolder(make(wanted, "hydra.run.dir") if is_typed else make_new(wanted, "hydra.run.dir"))
    if home is not None and checkpoint is not None and folder.path != home:
        _take_history(RunFolder(home), folder, checkpoint["progress"]["best"]["epoch"])
    return folder, checkpoint


def _load(resume: str) -> dict[str, Any]:
    from dlopt.training.checkpoint import load

    try:
        return load(Path(resume))
    except UserError as error:
        _, _, reason = str(error).partition(": ")
        hint = f"; to start from its weights only: init_from={resume}" if Path(resume).is_file() else ""
        raise UserError(f"resume={resume}: {reason}{'' if 'init_from' in reason else hint}") from None


def _take_history(source: RunFolder, target: RunFolder, best_epoch: int | None) -> None:
    """The metrics up to the checkpoint and its best model belong to the continued run too.

    The tracking cuts the metrics that lie beyond; a best model of a later epoch than the checkpoint knows stays behind.
    """
    from dlopt.training import sharded
    from dlopt.training.checkpoint import Checkpoints, load

    if (source.path / "metrics.jsonl").is_file():
        shutil.copy(source.path / "metrics.jsonl", target.path / "metrics.jsonl")
    best = Checkpoints(source.checkpoints).best
    with contextlib.suppress(UserError):
        if best_epoch is not None and load(best)["progress"]["epoch"] == best_epoch:
            target.checkpoints.mkdir(exist_ok=True)
            sharded.copy(best, target.checkpoints)
            for path in (best.with_name(f"{best.name}.sha256"), best):
                shutil.copy(path, target.checkpoints / path.name)


def _show_finished(folder: RunFolder) -> int:
    from dlopt.tracking.console import ConsoleView

    summary = folder.summary() or {}
    ConsoleView().finish(summary, [f"this run is finished: {folder.path}"])
    return 0
